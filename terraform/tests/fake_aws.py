"""An AWS on loopback for tests: moto, with what it lacks: placement groups, AMI parameters, quotas, no capacity.

fake_aws.py PORT FOLDER
For the addresses in FOLDER/no_capacity there is no instance; FOLDER/asked gets a line a question."""
import json
import sys
import time
from pathlib import Path

from moto.core.responses import ActionResult
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import ec2_backends
from moto.ec2.responses import EC2Response
from moto.server import ThreadedMotoServer
from moto.servicequotas.responses import ServiceQuotasResponse
from moto.ssm.models import Parameter, ssm_backends

ACCOUNT, REGION = '123456789012', 'us-east-1'
AMI_PARAMETERS = ('/aws/service/canonical/ubuntu/server/24.04/stable/current/arm64/hvm/ebs-gp3/ami-id',
                  '/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id')
GROUPS = {}
QUOTA = 64  # vCPUs of any family


def create_placement_group(self):
    name = self._get_param('GroupName')
    tags = self._parse_tag_specification().get('placement-group', {}).items()
    GROUPS[name] = dict(GroupName=name, GroupId=f'pg-{len(GROUPS):017x}', Strategy=self._get_param('Strategy'),
                        State='available', GroupArn=f'arn:aws:ec2:{REGION}:{ACCOUNT}:placement-group/{name}',
                        Tags=[dict(Key=key, Value=value) for key, value in tags])
    return ActionResult({'PlacementGroup': GROUPS[name]})


def describe_placement_groups(self):
    names, ids = self._get_param('GroupNames', []), self._get_param('GroupIds', [])
    found = [group for group in GROUPS.values()
             if not (names or ids) or group['GroupName'] in names or group['GroupId'] in ids]
    if not found and (names or ids):
        raise EC2ClientError('InvalidPlacementGroup.Unknown', f'The Placement Group {names or ids} is unknown')
    return ActionResult({'PlacementGroups': found})


def delete_placement_group(self):
    GROUPS.pop(self._get_param('GroupName'))
    return ActionResult({})


def get_service_quota(self):
    service, code = (json.loads(self.body)[name] for name in ('ServiceCode', 'QuotaCode'))
    quota = dict(ServiceCode=service, QuotaCode=code, QuotaName='vCPUs', Value=QUOTA, Unit='None', Adjustable=True,
                 GlobalQuota=False, QuotaArn=f'arn:aws:servicequotas:{REGION}:{ACCOUNT}:{service}/{code}')
    return json.dumps({'Quota': quota})


class NoCapacity(EC2ClientError):
    code = 'InsufficientInstanceCapacity'
    status_code = 500


def with_capacity(run_instances, folder):
    "`run_instances` that refuses what FOLDER/no_capacity names, as AWS does: with a fault that its clients try again"
    def run(self):
        missing = folder/'no_capacity'
        wanted = self._get_param('NetworkInterfaces', [{}])[0].get('PrivateIpAddress')
        if not missing.exists() or wanted not in missing.read_text().split(): return run_instances(self)
        with open(folder/'asked', 'a') as file: file.write(f'{wanted}\n')
        raise NoCapacity('We currently do not have sufficient capacity in the Availability Zone you requested.')
    return run


def seed_ami(name):
    image = ec2_backends[ACCOUNT][REGION].describe_images()[0].id
    ssm_backends[ACCOUNT][REGION]._parameters[name].append(
        Parameter(account_id=ACCOUNT, name=name, value=image, parameter_type='String', description=None,
                  allowed_pattern=None, keyid=None, last_modified_date=time.time(), version=1, data_type='text'))


if __name__ == '__main__':
    for action in (create_placement_group, describe_placement_groups, delete_placement_group):
        setattr(EC2Response, action.__name__, action)
    EC2Response.run_instances = with_capacity(EC2Response.run_instances, Path(sys.argv[2]))
    for name in ('get_service_quota', 'get_aws_default_service_quota'):
        setattr(ServiceQuotasResponse, name, get_service_quota)
    for name in AMI_PARAMETERS: seed_ami(name)
    server = ThreadedMotoServer(ip_address='127.0.0.1', port=int(sys.argv[1]), verbose=False)
    server.start()
    print('ready', flush=True)
    while True: time.sleep(60)
