"The Terraform configuration: checked, tested with a mocked provider, then applied to a fake EC2 on loopback with the real provider. Nothing here touches AWS."
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
TERRAFORM, TOOLS = REPO/'terraform', REPO/'terraform'/'.venv'/'bin'
TYPES = 'c8gn.8xlarge', 'g5.xlarge'
SECRETS = {'credentials': 'fake-secret-of-the-credentials', 'key': 'fake-content-of-the-private-key'}


def run(*words, expect=0, **options):
    result = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=900, **options)
    assert expect is None or result.returncode == expect, f'{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}'
    return result


def tool(name):
    if not (TOOLS/name).exists(): pytest.skip(f'no {name}: python3 -m venv terraform/.venv && terraform/.venv/bin/pip install -r terraform/requirements.txt')
    return TOOLS/name


def terraform_settings(folder):
    "Environment of terraform: the user's own settings where they exist, else a mirror of providers on this machine, else the registry"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('AWS_', 'TF_VAR_'))} | dict(TF_IN_AUTOMATION='1', CHECKPOINT_DISABLE='1')
    if os.path.isfile(environment.get('TF_CLI_CONFIG_FILE', '')): return environment
    environment.pop('TF_CLI_CONFIG_FILE', None)
    mirrors = [path.parents[5] for root in (Path('/opt'), Path('/usr/share'), Path.home()) for path in root.glob('*tf-plugins*/*/hashicorp/aws/*/*/terraform-provider-aws_*')]
    if mirrors:
        (folder/'terraformrc').write_text(f'disable_checkpoint = true\nprovider_installation {{\n  filesystem_mirror {{\n    path    = "{mirrors[0]}"\n    include = ["*/*"]\n  }}\n}}\n')
        environment['TF_CLI_CONFIG_FILE'] = str(folder/'terraformrc')
    return environment


@pytest.fixture(scope='module')
def configuration(tmp_path_factory):
    "A repository that holds the configuration, initialized, and the environment of terraform"
    if not shutil.which('terraform'): pytest.skip('terraform is not installed')
    folder = tmp_path_factory.mktemp('terraform')
    environment = terraform_settings(folder)
    shutil.copytree(TERRAFORM, folder/'repo'/'terraform', ignore=shutil.ignore_patterns('.venv', '.terraform*', '*.tfstate*', '__pycache__'))
    run('git', 'init', '-q', cwd=folder/'repo')
    run('git', 'add', '-A', cwd=folder/'repo')
    try: result = run('terraform', 'init', '-input=false', '-no-color', expect=None, cwd=folder/'repo'/'terraform', env=environment)
    except subprocess.TimeoutExpired: pytest.skip('terraform init: no provider within 15 minutes')
    if result.returncode: pytest.skip(f'terraform init cannot get the AWS provider here: {result.stderr.strip()[-300:]}')
    return folder/'repo'/'terraform', environment


def test_format():
    if not shutil.which('terraform'): pytest.skip('terraform is not installed')
    run('terraform', 'fmt', '-check', '-diff', '-recursive', TERRAFORM, env=os.environ | {'TF_CLI_CONFIG_FILE': os.devnull})


def test_validate_and_terraform_test(configuration):
    folder, environment = configuration
    run('terraform', 'validate', '-no-color', cwd=folder, env=environment)
    result = run('terraform', 'test', '-no-color', cwd=folder, env=environment)
    assert re.search(r'\d+ passed, 0 failed', result.stdout)


def test_order_and_diagram(configuration):
    "ML servers wait for prep, prep for the jump host, and the diagram in the README shows it"
    folder, environment = configuration
    sys.path.insert(0, str(TERRAFORM))
    from diagram import LABELS, contract, edges, mermaid
    dot = run('terraform', 'graph', cwd=folder, env=environment).stdout
    pairs = contract(edges(dot), set(LABELS))
    assert {('aws_instance.jump', 'terraform_data.prep'), ('terraform_data.prep', 'aws_instance.mlserver')} <= pairs
    assert mermaid(dot) in (TERRAFORM/'README.md').read_text(), 'the diagram is out of date: python terraform/diagram.py --write'


def test_contract_joins_and_prunes():
    sys.path.insert(0, str(TERRAFORM))
    from diagram import contract
    assert contract({('a', 'x'), ('x', 'b'), ('b', 'c'), ('a', 'c')}, {'a', 'b', 'c'}) == {('a', 'b'), ('b', 'c')}


def test_checkov():
    result = run(tool('checkov'), '--framework', 'terraform', '--skip-download', '--output', 'json', '-d', TERRAFORM, '--skip-path', '.venv', '--skip-path', '.terraform', expect=None)
    report = json.loads(result.stdout)['results']
    assert not [(check['check_id'], check['resource']) for check in report['failed_checks']]
    assert len(report['passed_checks']) > 50 and all(check['check_result'].get('suppress_comment') for check in report['skipped_checks'])


@pytest.fixture(scope='module')
def fake_aws(tmp_path_factory):
    "Environment that leads the AWS provider and boto3 to a fake on loopback"
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([tool('python'), TERRAFORM/'tests'/'fake_aws.py', str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout.readline().strip() == 'ready'
    yield dict(AWS_ENDPOINT_URL=f'http://127.0.0.1:{port}', AWS_ACCESS_KEY_ID='test', AWS_SECRET_ACCESS_KEY=SECRETS['credentials'], AWS_EC2_METADATA_DISABLED='true', AWS_MAX_ATTEMPTS='2',
               NO_PROXY='127.0.0.1')
    server.kill()
    server.wait()


FAKE_SSH = '''#!/bin/sh
cat >/dev/null
echo "$@" >>"$SSH_LOG"
case "$*" in *prep.sh*) exit "$PREP_EXIT" ;; esac
'''


USER_DATA = """
import base64, boto3, json
ec2 = boto3.client('ec2', region_name='us-east-1')
machines = [machine for reservation in ec2.describe_instances()['Reservations'] for machine in reservation['Instances']]
read = lambda machine: ec2.describe_instance_attribute(InstanceId=machine['InstanceId'], Attribute='userData')['UserData']['Value']
print(json.dumps({tag['Value']: base64.b64decode(read(machine)).decode() for machine in machines for tag in machine['Tags'] if tag['Key'] == 'Name'}))
"""


@pytest.fixture(scope='module')
def applied(configuration, fake_aws):
    "Apply with a prep that fails, then with one that succeeds; afterwards destroy"
    folder, environment = configuration
    (folder.parent/'bin').mkdir()
    (folder.parent/'bin'/'ssh').write_text(FAKE_SSH)
    (folder.parent/'bin'/'ssh').chmod(0o755)
    (folder.parent/'user key').write_text(SECRETS['key'])
    environment = environment | fake_aws | dict(PATH=f"{folder.parent}/bin:{environment['PATH']}", SSH_LOG=str(folder.parent/'ssh.log'))
    options = dict(cwd=folder, env=environment | dict(TF_VAR_ssh_cidr='203.0.113.7/32', TF_VAR_ssh_public_key='tests/user_key.pub', TF_VAR_ssh_private_key=str(folder.parent/'user key'), TF_VAR_ml_count='2',
                                                      TF_VAR_parameters='{"epochs": "2"}'))
    steps = {}
    def terraform(step, *words, prep=0, expect=0):
        steps[step] = run('terraform', *words, expect=expect, **options | dict(env=options['env'] | dict(PREP_EXIT=str(prep)))).stdout
    terraform('plan', 'plan', '-input=false', '-no-color', '-out=plan')
    terraform('failed', 'apply', '-input=false', '-no-color', 'plan', prep=3, expect=1)
    terraform('after failure', 'state', 'list')
    # the fake reads some attributes back differently from what was set, so it is not asked again
    terraform('applied', 'apply', '-refresh=false', '-auto-approve', '-input=false', '-no-color')
    terraform('outputs', 'output', '-json')
    terraform('state', 'show', '-json')
    steps['user data'] = run(tool('python'), '-c', USER_DATA, env=environment).stdout
    steps['terminated'] = run(tool('python'), TERRAFORM/'scripts'/'terminate.py', 'yolov9001', 'us-east-1', env=environment).stdout
    terraform('destroyed', 'destroy', '-refresh=false', '-auto-approve', '-input=false', '-no-color')
    terraform('after destroy', 'state', 'list')
    steps['ssh'] = (folder.parent/'ssh.log').read_text()
    return steps


def test_a_failed_prep_creates_no_ml_server(applied):
    assert 'aws_instance.jump' in applied['after failure'].split()
    assert 'aws_instance.mlserver' not in applied['after failure'] + applied['failed']
    assert 'aws_instance.mlserver[1]: Creation complete' in applied['applied']


def test_the_cost_is_shown_before_anything_is_created(applied):
    cost = re.search(r'about 3.97 USD an hour: .*\)', applied['plan'])[0]
    assert cost in (TERRAFORM/'COSTS.md').read_text(), 'the page on costs shows another sum than terraform plan'


def test_outputs(applied):
    outputs = {name: entry['value'] for name, entry in json.loads(applied['outputs']).items()}
    assert len(set(outputs['mlserver_public_ips'])) == 2
    key, = set(re.findall("-i '([^']+)'", ' '.join(outputs['attach'])))
    assert Path(key).read_text() == SECRETS['key']
    assert outputs['attach'] == [f"ssh -i '{key}' -t ubuntu@{ip} screen -x ddptrain" for ip in outputs['mlserver_public_ips']]
    assert f"ubuntu@{outputs['jump_public_ip']} sudo bash /srv/yolov9001/repo/terraform/scripts/prep.sh /etc/yolov9001.env" in applied['ssh']


def test_results_are_fetched_into_a_folder_that_need_not_exist(applied, tmp_path):
    fetch, jump = (json.loads(applied['outputs'])[name]['value'] for name in ('fetch_results', 'jump_public_ip'))
    (tmp_path/'rsync').write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\n')
    (tmp_path/'rsync').chmod(0o755)
    run('bash', '-c', fetch, cwd=tmp_path, env=os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}"))
    *_, identity, source, target = (tmp_path/'words').read_text().splitlines()
    assert identity.startswith("ssh -i '") and source == f'ubuntu@{jump}:/srv/yolov9001/results/' and (tmp_path/target).parent.is_dir()


def test_tags_and_no_secret_in_the_state(applied):
    resources = json.loads(applied['state'])['values']['root_module']['resources']
    servers = [resource['values'] for resource in resources if resource['address'].startswith('aws_instance.mlserver')]
    assert [(server['tags_all']['Cluster'], server['tags_all']['Role'], server['iam_instance_profile']) for server in servers] == [('yolov9001', 'mlserver', '')] * 2
    for secret in SECRETS.values(): assert secret not in applied['state'] + applied['user data'] + applied['ssh']


def test_user_data_is_valid_for_cloud_init(applied, tmp_path):
    texts = json.loads(applied['user data'])
    assert texts.keys() == {'yolov9001-jump', 'yolov9001-ml0', 'yolov9001-ml1'}
    if not shutil.which('cloud-init'): pytest.skip('cloud-init is not installed')
    for name, text in texts.items():
        (tmp_path/'user-data').write_text(text)
        assert 'Valid' in run('cloud-init', 'schema', '--config-file', tmp_path/'user-data').stdout, name


def test_the_jump_host_ends_servers_that_hang(applied):
    assert len(re.findall(r'i-[0-9a-f]+', applied['terminated'])) == 2


def test_destroy_leaves_nothing(applied):
    assert 'Destroy complete!' in applied['destroyed'] and not applied['after destroy'].strip()


def find(environment, *words, expect=0):
    own = {name: value for name, value in os.environ.items() if not name.startswith('AWS_')}
    return run(tool('python'), TERRAFORM/'find_instance.py', *words, expect=expect, env=own | environment)


def test_zones_that_offer_both_types(fake_aws):
    result = json.loads(find(fake_aws, *TYPES, '--json', '--regions', 'us-east-1', 'eu-west-3', 'eu-central-2').stdout)
    assert [row['zone'] for row in result['zones']] == ['us-east-1a', 'us-east-1b', 'us-east-1c', 'us-east-1d', 'us-east-1f', 'eu-west-3a', 'eu-west-3b']
    assert result['zones'][0]['vcpus'] == dict(zip(TYPES, (32, 4))) and result['failed'] == {}
    assert set(result['zones'][0]['spot_usd_per_hour']) == set(result['zones'][0]['vcpu_quota']) == set(TYPES)


def test_table_of_all_regions(fake_aws):
    lines = find(fake_aws, *TYPES).stdout.splitlines()
    assert lines[0].startswith('zone') and any(line.startswith('eu-west-3a') for line in lines) and not any(line.startswith('eu-west-3c') for line in lines)


def test_no_zone_is_told_apart_from_an_unknown_type(fake_aws):
    assert 'no zone offers all of' in find(fake_aws, *TYPES, '--regions', 'us-west-1', expect=1).stderr
    assert 'g5.xlarg: no such instance type' in find(fake_aws, 'g5.xlarg', '--regions', 'us-west-1', expect=2).stderr
    assert 'did you mean us-east-2, us-east-1' in find(fake_aws, 'g5.xlarge', '--regions', 'us-east-9', expect=2).stderr


def test_errors_without_access(fake_aws, tmp_path):
    nothing = dict(HOME=str(tmp_path), AWS_EC2_METADATA_DISABLED='true')
    assert 'no AWS credentials; run `aws configure`' in find(nothing, 'g5.xlarge', expect=2).stderr
    assert 'could not be found' in find(nothing | {'AWS_PROFILE': 'none'}, 'g5.xlarge', expect=2).stderr
    unreachable = fake_aws | nothing | dict(AWS_ENDPOINT_URL='http://127.0.0.1:9')
    error = find(unreachable, 'g5.xlarge', expect=2).stderr
    assert 'AWS does not answer' in error and 'Traceback' not in error


@pytest.mark.parametrize('instance_type, code', [('g5.xlarge', 'L-DB2E81BA'), ('gr6.4xlarge', 'L-DB2E81BA'), ('p4d.24xlarge', 'L-417A185B'), ('c8gn.8xlarge', 'L-1216C47A'),
                                                 ('trn1.2xlarge', 'L-2C3B7624'), ('i4i.large', 'L-1216C47A'), ('inf2.xlarge', 'L-1945791B')])
def test_quota_code(instance_type, code):
    code_of = f"import sys; sys.path.insert(0, {str(TERRAFORM)!r}); from find_instance import quota_code; print(quota_code({instance_type!r}))"
    assert run(tool('python'), '-c', code_of).stdout.strip() == code


def test_skypilot_calls_the_launch_script(tmp_path):
    "Its `run` on the second of two nodes, with a stub in the place of the installed command"
    yaml = pytest.importorskip('yaml')
    task = yaml.safe_load((TERRAFORM/'skypilot.yaml').read_text())
    stub = tmp_path/'yolov9001'/'venv'/'bin'/'yolov9001'
    stub.parent.mkdir(parents=True)
    stub.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\n')
    stub.chmod(0o755)
    run('bash', '-n', '-c', task['setup'])
    run('bash', '-c', task['run'], cwd=REPO, env=os.environ | task['envs'] | dict(HOME=str(tmp_path), SKYPILOT_NODE_IPS='10.0.0.1\n10.0.0.2', SKYPILOT_NODE_RANK='1'))
    assert (tmp_path/'words').read_text().split() == ['train', '--data', f'{tmp_path}/yolov9001/store/data/coco', '--out', f'{tmp_path}/yolov9001/results/train',
        '--hosts', '10.0.0.1,10.0.0.2', '--address', '10.0.0.2', '--devices', 'auto', '--resume', '-p', 'epochs=300']
