"""The Terraform configuration: checked, tested with a mocked provider, then applied to a fake EC2 on loopback with the real provider.

Nothing here touches AWS."""
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
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
    if not (TOOLS/name).exists(): pytest.skip(f'no {name} in terraform/.venv: see terraform/requirements.txt')
    return TOOLS/name


MIRROR = """disable_checkpoint = true
provider_installation {{
  filesystem_mirror {{
    path    = "{}"
    include = ["*/*"]
  }}
}}
"""


def terraform_settings(folder):
    "Environment of terraform: the user's own settings where they exist, else a mirror of providers on this machine, else the registry"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('AWS_', 'TF_VAR_'))}
    environment |= dict(TF_IN_AUTOMATION='1', CHECKPOINT_DISABLE='1')
    if os.path.isfile(environment.get('TF_CLI_CONFIG_FILE', '')): return environment
    environment.pop('TF_CLI_CONFIG_FILE', None)
    places = Path('/opt'), Path('/usr/share'), Path.home()
    mirrors = [path.parents[5] for place in places for path in place.glob('*tf-plugins*/*/hashicorp/aws/*/*/terraform-provider-aws_*')]
    if mirrors:
        (folder/'terraformrc').write_text(MIRROR.format(mirrors[0]))
        environment['TF_CLI_CONFIG_FILE'] = str(folder/'terraformrc')
    return environment


@pytest.fixture(scope='module')
def configuration(tmp_path_factory):
    "A repository that holds the configuration, initialized, and the environment of terraform"
    if not shutil.which('terraform'): pytest.skip('terraform is not installed')
    folder = tmp_path_factory.mktemp('terraform')
    environment = terraform_settings(folder)
    left_out = shutil.ignore_patterns('.venv', '.terraform', '.caller', '*.tfstate*', '__pycache__')
    shutil.copytree(TERRAFORM, folder/'repo'/'terraform', ignore=left_out)
    run('git', 'init', '-q', cwd=folder/'repo')
    run('git', 'add', '-A', cwd=folder/'repo')
    words = 'terraform', 'init', '-input=false', '-no-color', '-lockfile=readonly'
    try: result = run(*words, expect=None, cwd=folder/'repo'/'terraform', env=environment)
    except subprocess.TimeoutExpired: pytest.skip('terraform init: no provider within 15 minutes')
    assert 'checksums' not in result.stderr, f'.terraform.lock.hcl names another provider: {result.stderr}'
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
    "ML servers wait for prep, prep for the jump host, and the picture in the README shows it"
    folder, environment = configuration
    sys.path.insert(0, str(TERRAFORM))
    from diagram import LABELS, contract, edges, svg
    dot = run('terraform', 'graph', cwd=folder, env=environment).stdout
    pairs = contract(edges(dot), set(LABELS))
    assert {('aws_instance.jump', 'terraform_data.prep'), ('terraform_data.results', 'aws_instance.mlserver')} <= pairs
    assert svg(dot) == (TERRAFORM/'terraform-diagram.svg').read_text(), 'the picture is out of step: python terraform/diagram.py'
    assert '](terraform-diagram.svg)' in (TERRAFORM/'README.md').read_text()


def test_contract_joins_and_prunes():
    sys.path.insert(0, str(TERRAFORM))
    from diagram import contract
    assert contract({('a', 'x'), ('x', 'b'), ('b', 'c'), ('a', 'c')}, {'a', 'b', 'c'}) == {('a', 'b'), ('b', 'c')}


def test_checkov():
    options = '--framework terraform --skip-download --output json --skip-path .venv --skip-path .terraform'
    result = run(tool('checkov'), *options.split(), '-d', TERRAFORM, expect=None)
    report = json.loads(result.stdout)['results']
    assert not [(check['check_id'], check['resource']) for check in report['failed_checks']]
    assert len(report['passed_checks']) > 50 and all(check['check_result'].get('suppress_comment') for check in report['skipped_checks'])


@pytest.fixture(scope='module')
def fake_aws(tmp_path_factory):
    "Environment that leads the AWS provider and boto3 to a fake on loopback, and the folder that tells it what it has no capacity for"
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp('fake')
    words = [tool('python'), TERRAFORM/'tests'/'fake_aws.py', str(port), folder]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout.readline().strip() == 'ready'
    yield dict(AWS_ENDPOINT_URL=f'http://127.0.0.1:{port}', AWS_ACCESS_KEY_ID='test', AWS_SECRET_ACCESS_KEY=SECRETS['credentials'],
               AWS_EC2_METADATA_DISABLED='true', AWS_MAX_ATTEMPTS='2', NO_PROXY='127.0.0.1'), folder
    server.kill()
    server.wait()


FAKE_SSH = '''#!/bin/sh
[ -t 0 ] || cat >/dev/null
echo "$@" >>"$SSH_LOG"
case "$*" in
  *prep.sh*) exit "$PREP_EXIT" ;;
  *find*) printf 'train/last.pt\\t1\\n' ;;
esac
'''


USER_DATA = """
import base64, boto3, json
ec2 = boto3.client('ec2', region_name='us-east-1')
texts = {}
for machine in [machine for reservation in ec2.describe_instances()['Reservations'] for machine in reservation['Instances']]:
    text = ec2.describe_instance_attribute(InstanceId=machine['InstanceId'], Attribute='userData')['UserData']['Value']
    tags = {tag['Key']: tag['Value'] for tag in machine['Tags']}
    texts[tags['Name']] = base64.b64decode(text).decode()
print(json.dumps(texts))
"""


@pytest.fixture(scope='module')
def person(configuration, fake_aws):
    "Somebody who applies: the environment, in which ssh is a stub and AWS the fake, and the folder of the key and of what ssh was asked"
    environment, aws, home = configuration[1], fake_aws[0], configuration[0].parents[1]
    (home/'bin').mkdir()
    for name, text in (('ssh', FAKE_SSH), ('curl', '#!/bin/sh\necho 198.51.100.7\n')):
        (home/'bin'/name).write_text(text)
        (home/'bin'/name).chmod(0o755)
    (home/'user key').write_text(SECRETS['key'])
    keys = dict(TF_VAR_ssh_public_key='tests/user_key.pub', TF_VAR_ssh_private_key=str(home/'user key'))
    stubs = dict(PATH=f"{home}/bin:{environment['PATH']}", SSH_LOG=str(home/'ssh.log'), GRACE='0', PREP_EXIT='0')
    return environment | aws | stubs | keys, home


@pytest.fixture(scope='module')
def applied(configuration, fake_aws, person):
    "Apply with a prep that fails, with AWS out of capacity for one server, then with success; afterwards destroy"
    folder, fake, (environment, home) = configuration[0], fake_aws[1], person
    environment = environment | dict(TF_VAR_ml_count='2', TF_VAR_parameters='{"epochs": "2"}')
    steps = {}

    def terraform(step, *words, prep=0, expect=0):
        started = time.monotonic()
        result = run('terraform', *words, expect=expect, cwd=folder, env=environment | dict(PREP_EXIT=str(prep)))
        steps[step], steps[f'{step}, errors'], steps[f'{step}, seconds'] = result.stdout, result.stderr, time.monotonic() - started
    terraform('plan', 'plan', '-input=false', '-no-color', '-out=plan')
    terraform('failed', 'apply', '-input=false', '-no-color', 'plan', prep=3, expect=1)
    terraform('after failure', 'state', 'list')
    # the fake reads some attributes back differently from what was set, so it is not asked again
    apply = 'apply', '-refresh=false', '-auto-approve', '-input=false', '-no-color'
    (fake/'no_capacity').write_text('10.90.0.12')
    terraform('no capacity', *apply, expect=1)
    steps['asked'] = (fake/'asked').read_text().split()
    terraform('after no capacity', 'state', 'list')
    (fake/'no_capacity').unlink()
    terraform('applied', *apply)
    terraform('outputs', 'output', '-json')
    terraform('state', 'show', '-json')
    steps['user data'] = run(tool('python'), '-c', USER_DATA, env=environment).stdout
    steps['terminated'] = run(tool('python'), TERRAFORM/'scripts'/'terminate.py', 'yolov9001', 'us-east-1', env=environment).stdout
    terraform('destroyed', 'destroy', '-refresh=false', '-auto-approve', '-input=false', '-no-color')
    terraform('after destroy', 'state', 'list')
    steps['ssh'] = (home/'ssh.log').read_text()
    return steps


def outputs(applied): return {name: entry['value'] for name, entry in json.loads(applied['outputs']).items()}


def test_a_failed_prep_creates_no_ml_server(applied):
    assert 'aws_instance.jump' in applied['after failure'].split()
    assert 'aws_instance.mlserver' not in applied['after failure'] + applied['failed']


def test_no_capacity_is_told_at_once(applied):
    "Not after 50 minutes of silent retries; what exists stays, and the next apply adds what was missing"
    assert 'InsufficientInstanceCapacity' in applied['no capacity, errors'] and 'aws_instance.mlserver[1]' in applied['no capacity, errors']
    assert len(applied['asked']) == 3 and applied['no capacity, seconds'] < 240
    assert 'aws_instance.mlserver[0]' in applied['after no capacity'] and 'aws_instance.mlserver[1]' not in applied['after no capacity']
    assert 'aws_instance.mlserver[1]: Creation complete' in applied['applied']
    assert 'aws_instance.mlserver[0]: Creat' not in applied['applied']


def test_the_cost_is_shown_before_anything_is_created(applied):
    cost = re.search(r'about .* USD an hour: .*\)', applied['plan'])[0]
    assert cost in (TERRAFORM/'COSTS.md').read_text(), f'the page on costs shows another sum than terraform plan: {cost}'


def test_ssh_is_allowed_from_the_address_of_the_caller(applied):
    rules = [resource['values'] for resource in resources(applied) if resource['type'] == 'aws_vpc_security_group_ingress_rule']
    assert {rule['cidr_ipv4'] for rule in rules} == {'198.51.100.7/32', None}


def test_outputs(applied):
    found = outputs(applied)
    assert len(set(found['mlserver_public_ips'])) == 2 and found['ssh'] == found['attach'][0]
    for command, ip in zip(found['attach'], found['mlserver_public_ips']):
        words = shlex.split(command)
        assert Path(words[words.index('-i') + 1]).read_text() == SECRETS['key']
        assert words[-2] == f'ubuntu@{ip}' and 'screen -x ddptrain' in words[-1]
    prep = 'sudo flock --close --wait 3600 /srv/yolov9001/prep.lock bash /srv/yolov9001/scripts/prep.sh /etc/yolov9001.env'
    assert f"ubuntu@{found['jump_public_ip']} {prep}" in applied['ssh']


def test_host_keys_are_kept_by_instance(applied):
    ids = [re.search(r'HostKeyAlias=(i-\w+) ', command)[1] for command in outputs(applied)['attach']]
    machines = {resource['values']['id']: resource['values'] for resource in resources(applied) if resource['type'] == 'aws_instance'}
    assert [machines[name]['tags']['Name'] for name in ids] == ['yolov9001-ml0', 'yolov9001-ml1']
    jump, = set(re.findall(r'HostKeyAlias=(i-\w+) ', applied['ssh']))
    assert machines[jump]['tags']['Role'] == 'jump'


def test_results_are_fetched_into_a_folder_that_need_not_exist(applied, tmp_path):
    (tmp_path/'rsync').write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\n')
    (tmp_path/'rsync').chmod(0o755)
    run('bash', '-c', outputs(applied)['fetch_results'], cwd=tmp_path, env=os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}"))
    *_, identity, source, target = (tmp_path/'words').read_text().splitlines()
    assert identity.startswith("ssh -i '") and source == f"ubuntu@{outputs(applied)['jump_public_ip']}:/srv/yolov9001/results/"
    assert (tmp_path/target).parent.is_dir()


def resources(applied): return json.loads(applied['state'])['values']['root_module']['resources']


def test_tags_and_no_secret_in_the_state(applied):
    servers = [resource['values'] for resource in resources(applied) if resource['address'].startswith('aws_instance.mlserver')]
    assert len(servers) == 2 and all(server['iam_instance_profile'] == '' for server in servers)
    assert all((server['tags_all']['Cluster'], server['tags_all']['Role']) == ('yolov9001', 'mlserver') for server in servers)
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


def test_destroy_warns_of_results_that_were_not_fetched(applied):
    "After the ML servers have ended, before the jump host does"
    lines = applied['destroyed'].splitlines()
    at = lambda text: next(i for i, line in enumerate(lines) if text in line)
    assert 'such as train/last.pt' in lines[at('WARNING: 1 results on the jump host were not fetched')]
    assert at('aws_instance.mlserver[0]: Destruction complete') < at('WARNING') < at('aws_instance.jump: Destroying')


def test_destroy_leaves_nothing(applied):
    assert 'Destroy complete!' in applied['destroyed'] and not applied['after destroy'].strip()


STUB = """#!/bin/sh
echo "$(basename "$0")" "$@" >>{}/called
"""


@pytest.fixture(scope='module')
def example(configuration, person):
    "The README's cluster by its own lines: what they print, what ssh was asked, and what each machine was told"
    folder, (environment, home) = configuration[0], person
    readme = (TERRAFORM/'README.md').read_text()
    settings = re.search(r'^cat >terraform.tfvars <<END\n.*?^END$', readme, re.S | re.M)[0]
    create = re.search(r'^terraform destroy.*?(?=^```)', readme, re.S | re.M)[0]
    (home/'ssh.log').unlink(missing_ok=True)
    environment = environment | dict(TF_CLI_ARGS_apply='-refresh=false -no-color', TF_CLI_ARGS_destroy='-refresh=false -no-color')
    shown = run('bash', '-c', f'{settings}\n{create}', cwd=folder, env=environment).stdout
    told = json.loads(run(tool('python'), '-c', USER_DATA, env=environment).stdout)
    asked = (home/'ssh.log').read_text().splitlines()
    run('terraform', 'destroy', '-auto-approve', '-input=false', cwd=folder, env=environment)
    (folder/'terraform.tfvars').unlink()
    return shown, asked, told


def test_three_lines_of_the_readme_lead_into_the_training(example):
    shown, asked, told = example
    assert 'Apply complete!' in shown and told.keys() == {'yolov9001-jump', 'yolov9001-ml0', 'yolov9001-ml1'}
    assert any('prep.sh' in line for line in asked) and 'screen -x ddptrain' in asked[-1]


@pytest.mark.parametrize('server', [0, 1])
def test_the_servers_of_the_readme_train_together(example, tmp_path, server):
    "From what cloud-init writes on a server to the command of the training, whose words are then read"
    from yolov9001.training.config import check_values, run_config
    content = re.search(r"content: \|\n((?: {6}.*\n)+)", example[2][f'yolov9001-ml{server}'])[1]
    told = dict(line.strip().split('=', 1) for line in content.splitlines())
    told = {name: value.strip("'") for name, value in told.items()} | dict(ROOT=str(tmp_path), END='true', VENV=str(tmp_path/'venv'))
    (tmp_path/'venv'/'bin').mkdir(parents=True)
    for name in ('yolov9001', 'python', 'nvidia-smi'):
        text = "#!/bin/sh\necho GPU 0\n" if name == 'nvidia-smi' else STUB.format(tmp_path)
        (tmp_path/'venv'/'bin'/name).write_text(text)
        (tmp_path/'venv'/'bin'/name).chmod(0o755)
    images = tmp_path/'store'/'data'/'coco'/'images'
    images.mkdir(parents=True)
    for i in range(4000): (images/f'{i}.jpg').touch()
    (tmp_path/'env').write_text('\n'.join(f"{name}='{value}'" for name, value in told.items()))
    path = f"{tmp_path}/venv/bin:{os.environ['PATH']}"
    run('bash', TERRAFORM/'scripts'/'train.sh', tmp_path/'env', env=os.environ | dict(PATH=path, GRACE='0'))
    meeting, training = [shlex.split(line) for line in (tmp_path/'called').read_text().splitlines()]
    assert meeting[:3] == ['python', str(TERRAFORM/'scripts'/'rendezvous.py'), 'wait'] and told['HOSTS'] in meeting
    words = dict(zip(training[2::2], training[3::2]))
    assert training[:2] == ['yolov9001', 'train'] and words['--address'] == told['HOSTS'].split(',')[server]
    assert words['--hosts'] == f"{told['JUMP']},{told['HOSTS']}" and '--resume' in training
    parameters = [word for before, word in zip(training, training[1:]) if before == '-p']
    config = run_config(words['--data'], words['--out'], p=parameters)
    check_values(config)
    assert (config.epochs, config.batch_size, config.lr) == (300, 128, .008)        # two GPUs of 64 images


def find(environment, *words, expect=0):
    own = {name: value for name, value in os.environ.items() if not name.startswith('AWS_')}
    return run(tool('python'), TERRAFORM/'find_instance.py', *words, expect=expect, env=own | environment)


@pytest.fixture(scope='module')
def aws(fake_aws): return fake_aws[0]


def test_zones_that_offer_both_types(aws):
    result = json.loads(find(aws, *TYPES, '--json', '--regions', 'us-east-1', 'eu-west-3', 'eu-central-2').stdout)
    zones = 'us-east-1a us-east-1b us-east-1c us-east-1d us-east-1f eu-west-3a eu-west-3b'
    assert [row['zone'] for row in result['zones']] == zones.split()
    assert result['zones'][0]['vcpus'] == dict(zip(TYPES, (32, 4))) and result['failed'] == {}
    assert set(result['zones'][0]['spot_usd_per_hour']) == set(result['zones'][0]['vcpu_quota']) == set(TYPES)


def test_table_of_all_regions(aws):
    lines = find(aws, *TYPES).stdout.splitlines()
    zones = [line.split()[0] for line in lines]
    assert zones[0] == 'zone' and 'eu-west-3a' in zones and 'eu-west-3c' not in zones


def test_no_zone_is_told_apart_from_an_unknown_type(aws):
    assert 'no zone offers all of' in find(aws, *TYPES, '--regions', 'us-west-1', expect=1).stderr
    assert 'g5.xlarg: no such instance type' in find(aws, 'g5.xlarg', '--regions', 'us-west-1', expect=2).stderr
    assert 'did you mean us-east-2, us-east-1' in find(aws, 'g5.xlarge', '--regions', 'us-east-9', expect=2).stderr


def test_errors_without_access(aws, tmp_path):
    nothing = dict(HOME=str(tmp_path), AWS_EC2_METADATA_DISABLED='true')
    assert 'no AWS credentials; run `aws configure`' in find(nothing, 'g5.xlarge', expect=2).stderr
    assert 'could not be found' in find(nothing | {'AWS_PROFILE': 'none'}, 'g5.xlarge', expect=2).stderr
    unreachable = aws | nothing | dict(AWS_ENDPOINT_URL='http://127.0.0.1:9')
    error = find(unreachable, 'g5.xlarge', expect=2).stderr
    assert 'AWS does not answer' in error and 'Traceback' not in error


@pytest.mark.parametrize('instance_type, code', [
    ('g5.xlarge', 'L-DB2E81BA'),
    ('gr6.4xlarge', 'L-DB2E81BA'),
    ('p4d.24xlarge', 'L-417A185B'),
    ('c8gn.8xlarge', 'L-1216C47A'),
    ('trn1.2xlarge', 'L-2C3B7624'),
    ('i4i.large', 'L-1216C47A'),
    ('inf2.xlarge', 'L-1945791B'),
])
def test_quota_code(instance_type, code):
    code_of = f'from find_instance import quota_code; print(quota_code({instance_type!r}))'
    assert run(tool('python'), '-c', code_of, cwd=TERRAFORM).stdout.strip() == code


def test_skypilot_calls_the_launch_script(tmp_path):
    "Its `run` on the second of two nodes, with a stub in the place of the installed command"
    yaml = pytest.importorskip('yaml')
    task = yaml.safe_load((TERRAFORM/'skypilot.yaml').read_text())
    stub = tmp_path/'yolov9001'/'venv'/'bin'/'yolov9001'
    stub.parent.mkdir(parents=True)
    stub.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\n')
    stub.chmod(0o755)
    run('bash', '-n', '-c', task['setup'])
    own = dict(HOME=str(tmp_path), SKYPILOT_NODE_IPS='10.0.0.1\n10.0.0.2', SKYPILOT_NODE_RANK='1')
    run('bash', '-c', task['run'], cwd=REPO, env=os.environ | task['envs'] | own)
    root = tmp_path/'yolov9001'
    assert (tmp_path/'words').read_text().split() == ['train', '--data', f'{root}/store/data/coco', '--out', f'{root}/results/train',
        '--hosts', '10.0.0.1,10.0.0.2', '--address', '10.0.0.2', '--devices', 'auto', '--resume',
        '-p', 'batch_size=16', '-p', 'lr=0.004', '-p', 'epochs=300', '--config', 'coco']
