"An AWS on loopback for tests: moto, plus the placement groups and AMI parameters that it lacks. Usage: fake_aws.py PORT"
import sys
import time

from moto.core.responses import ActionResult
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import ec2_backends
from moto.ec2.responses import EC2Response
from moto.server import ThreadedMotoServer
from moto.ssm.models import Parameter, ssm_backends

ACCOUNT, REGION = '123456789012', 'us-east-1'
AMI_PARAMETERS = ('/aws/service/canonical/ubuntu/server/24.04/stable/current/arm64/hvm/ebs-gp3/ami-id',
                  '/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id')
GROUPS = {}


def create_placement_group(self):
    name = self._get_param('GroupName')
    GROUPS[name] = dict(GroupName=name, GroupId=f'pg-{len(GROUPS):017x}', Strategy=self._get_param('Strategy'), State='available',
                        GroupArn=f'arn:aws:ec2:{REGION}:{ACCOUNT}:placement-group/{name}',
                        Tags=[dict(Key=key, Value=value) for key, value in self._parse_tag_specification().get('placement-group', {}).items()])
    return ActionResult({'PlacementGroup': GROUPS[name]})


def describe_placement_groups(self):
    names, ids = self._get_param('GroupNames', []), self._get_param('GroupIds', [])
    found = [group for group in GROUPS.values() if group['GroupName'] in names or group['GroupId'] in ids or not (names or ids)]
    if not found and (names or ids): raise EC2ClientError('InvalidPlacementGroup.Unknown', f'The Placement Group {names or ids} is unknown')
    return ActionResult({'PlacementGroups': found})


def delete_placement_group(self):
    GROUPS.pop(self._get_param('GroupName'))
    return ActionResult({})


def seed_ami(name):
    image = ec2_backends[ACCOUNT][REGION].describe_images()[0].id
    ssm_backends[ACCOUNT][REGION]._parameters[name].append(
        Parameter(account_id=ACCOUNT, name=name, value=image, parameter_type='String', description=None, allowed_pattern=None, keyid=None,
                  last_modified_date=time.time(), version=1, data_type='text'))


if __name__ == '__main__':
    for action in (create_placement_group, describe_placement_groups, delete_placement_group): setattr(EC2Response, action.__name__, action)
    for name in AMI_PARAMETERS: seed_ami(name)
    server = ThreadedMotoServer(ip_address='127.0.0.1', port=int(sys.argv[1]), verbose=False)
    server.start()
    print('ready', flush=True)
    while True: time.sleep(60)
