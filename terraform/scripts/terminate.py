"Terminate the ML servers of a cluster that still run: terminate.py NAME REGION"
import sys

import boto3


def terminate(
    name:str, # of the cluster
    region:str, # where it runs
)->list: # ids of what was terminated
    "Terminate by tag; the role of the jump host allows nothing else"
    ec2 = boto3.client('ec2', region_name=region)
    states = ['pending', 'running', 'stopping', 'stopped']
    wanted = {'tag:Cluster': [name], 'tag:Role': ['mlserver'], 'instance-state-name': states}
    filters = [dict(Name=key, Values=values) for key, values in wanted.items()]
    pages = ec2.get_paginator('describe_instances').paginate(Filters=filters)
    reservations = [row for page in pages for row in page['Reservations']]
    found = [instance['InstanceId'] for reservation in reservations for instance in reservation['Instances']]
    if found: ec2.terminate_instances(InstanceIds=found)
    return found


if __name__ == '__main__': print('terminated:', ' '.join(terminate(*sys.argv[1:])) or 'none, all had ended')
