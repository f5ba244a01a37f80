"Terminate the ML servers of a cluster that still run: terminate.py NAME REGION"
import sys

import boto3


def terminate(
    name:str, # of the cluster
    region:str, # where it runs
)->list: # ids of what was terminated
    "Terminate by tag; the role of the jump host allows nothing else"
    ec2 = boto3.client('ec2', region_name=region)
    filters = {'tag:Cluster': [name], 'tag:Role': ['mlserver'], 'instance-state-name': ['pending', 'running', 'stopping', 'stopped']}
    pages = ec2.get_paginator('describe_instances').paginate(Filters=[dict(Name=key, Values=values) for key, values in filters.items()])
    found = [instance['InstanceId'] for page in pages for reservation in page['Reservations'] for instance in reservation['Instances']]
    if found: ec2.terminate_instances(InstanceIds=found)
    return found


if __name__ == '__main__': print('terminated:', ' '.join(terminate(*sys.argv[1:])) or 'none, all had ended')
