"The scripts of terraform/scripts as shipped: functions alone, then a jump host and two ML servers in network namespaces, with real ssh and nginx."
import configparser
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from datetime import timedelta
from functools import partial
from pathlib import Path

import psutil
import pytest
from namespaces import open_hosts

REPO = Path(__file__).parents[1]
SCRIPTS = REPO/'terraform'/'scripts'
JUMP, SERVERS, NETWORK = '10.99.7.2', ('10.99.7.11', '10.99.7.12'), '10.99.7.0/24'
EPOCHS = 30  # of the training that loses a host
PATIENCE = 1800 # seconds, for a busy machine


def require(*commands):
    missing = [name for name in commands if not shutil.which(name, path=os.environ['PATH'] + ':/usr/sbin')]
    if missing: pytest.skip(f"not installed: {', '.join(missing)}")


def bash(code, **environment):
    "What a piece of shell does that can use the functions of lib.sh"
    words = ['bash', '-euo', 'pipefail', '-c', f'. {SCRIPTS}/lib.sh; {code}']
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def script(path, *words, **environment):
    "What one of the scripts does"
    words = ['bash', SCRIPTS/path, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(.1)


def sha256(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_shellcheck():
    require('shellcheck')
    result = subprocess.run(['shellcheck', '-x', *sorted(SCRIPTS.glob('*.sh'))], cwd=SCRIPTS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


GIB = 1024
@pytest.mark.parametrize('need, memory, nvme, root, chosen', [
    (40*GIB, 192*GIB, 3500*GIB, 80*GIB, 'ram'),   # g5.12xlarge: memory is faster than its NVMe
    (40*GIB, 32*GIB, 600*GIB, 80*GIB, 'nvme'),    # g5.2xlarge
    (48*GIB, 64*GIB, 600*GIB, 80*GIB, 'ram'),     # exactly three quarters
    (48*GIB + 1, 64*GIB, 600*GIB, 80*GIB, 'nvme'),
    (40*GIB, 16*GIB, 230*GIB, 80*GIB, 'nvme'),    # g5.xlarge
    (40*GIB, 16*GIB, 0, 80*GIB, 'root'),          # no instance store
    (40*GIB, 16*GIB, 39*GIB, 80*GIB, 'root'),     # instance store too small
    (40*GIB, 16*GIB, 0, 44*GIB, 'root'),          # 4 GiB stay free
    (40*GIB, 16*GIB, 0, 44*GIB - 1, None),
    (1*GIB, 9*GIB, 0, 80*GIB, 'ram'),             # at least 8 GiB are kept
    (1*GIB, 9*GIB - 1, 0, 80*GIB, 'root'),
])
def test_choose_storage(need, memory, nvme, root, chosen):
    result = bash(f'choose_storage {need} {memory} {nvme} {root}')
    if chosen: assert (result.returncode, result.stdout.strip()) == (0, chosen)
    else: assert result.returncode == 1 and 'raise root_gib' in result.stderr


def test_retry():
    assert bash('sleep() { echo "wait $1"; }; retry 3 false').stdout.split() == 'wait 1 wait 2'.split()
    assert bash('sleep() { :; }; retry 3 false').returncode == 1
    assert bash('sleep() { :; }; n=0; works() { n=$((n + 1)); ((n == 3)); }; retry 5 works; echo $n').stdout.strip() == '3'


def test_nginx_conf(tmp_path):
    require('nginx')
    tmp_path.chmod(0o755)
    (tmp_path/'nginx.conf').write_text(bash(f'nginx_conf {tmp_path} 127.0.0.1:8088 10.0.0.0/24 {tmp_path}/pid').stdout)
    result = subprocess.run(['/usr/sbin/nginx', '-t', '-q', '-c', tmp_path/'nginx.conf'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def watchdog(folder, pattern, quiet, limit):
    "A watchdog over `folder`/watched, which must exist, that touches `folder`/ended"
    return subprocess.Popen(['bash', SCRIPTS/'watchdog.sh', folder/'watched', pattern, str(quiet), str(limit), f'touch {folder}/ended'],
                            env=os.environ | {'PERIOD': '.2'}, stdout=subprocess.DEVNULL)


def write_for(seconds, path):
    for _ in range(int(seconds * 5)):
        path.write_text('busy')
        time.sleep(.2)


def test_watchdog_waits_while_checkpoints_come(tmp_path):
    (tmp_path/'watched').mkdir()
    dog = watchdog(tmp_path, '*.pt', 2, 1000)
    write_for(5, tmp_path/'watched'/'last.pt')
    assert dog.poll() is None and not (tmp_path/'ended').exists()
    assert dog.wait(20) == 0 and (tmp_path/'ended').exists()


def test_a_log_that_grows_is_no_life(tmp_path):
    "What never gets to a checkpoint is hopelessly slow, whatever it prints"
    (tmp_path/'watched').mkdir()
    dog = watchdog(tmp_path, '*.pt', 2, 1000)
    write_for(5, tmp_path/'watched'/'train.log')
    assert dog.poll() == 0 and (tmp_path/'ended').exists()


@pytest.mark.parametrize('quiet', [0, 1000])
def test_max_hours_end_what_is_alive(tmp_path, quiet):
    (tmp_path/'watched').mkdir()
    dog = watchdog(tmp_path, '*', quiet, 3)
    time.sleep(1)
    assert dog.poll() is None
    assert dog.wait(20) == 0 and (tmp_path/'ended').exists()


def test_what_the_watchdogs_themselves_print_is_no_life(tmp_path):
    (tmp_path/'watched'/'daemons').mkdir(parents=True)
    dog = watchdog(tmp_path, '*', 2, 1000)
    time.sleep(1)
    write_for(4, tmp_path/'watched'/'daemons'/'rendezvous.log')
    assert dog.poll() == 0


def test_a_server_that_must_end_saves_first(tmp_path):
    (tmp_path/'results').mkdir()
    training = subprocess.Popen(['bash', '-c', f'trap "touch {tmp_path}/saved; exit" TERM; while true; do sleep .1; done'])
    (tmp_path/'train.pid').write_text(str(training.pid))
    env_file = environment(tmp_path/'env', ROOT=tmp_path, END=f'cp {tmp_path}/saved {tmp_path}/ended')
    subprocess.run(['bash', SCRIPTS/'end_server.sh', env_file], check=True, env=os.environ | {'PATIENCE': '2'}, timeout=60)
    assert training.wait(10) == 0 and (tmp_path/'ended').exists()


@pytest.mark.parametrize('code, stall, keep, ended', [
    (0, 60, False, True),
    (1, 60, False, True),
    (1, 60, True, False),
    (0, 0, False, False),
    (1, 0, False, False),
])
def test_a_machine_ends_after_success_and_after_failure(tmp_path, code, stall, keep, ended):
    (tmp_path/'results').mkdir()
    if keep: (tmp_path/'keep').touch()
    settings = dict(ROOT=str(tmp_path), STALL_MINUTES=str(stall), END=f'touch {tmp_path}/ended')
    result = bash(f'sleep() {{ echo "waits $1"; }}; finish {code}', **settings)
    assert result.returncode == 0 and (tmp_path/'ended').exists() == ended
    assert ('waits 600' in result.stdout) == (code > 0 and stall > 0)


@pytest.mark.parametrize('gpus, images, batch, rate', [
    (1, 118287, 64, .008),      # COCO on one GPU
    (2, 118287, 128, .008),
    (4, 118287, 256, .008),
    (64, 118287, 256, .008),    # no more, whatever there is
    (1, 600, 32, .005657),      # at least 16 steps an epoch
    (64, 205, 16, .004),        # what the recipe was tuned with
    (1, 0, 16, .004),
])
def test_global_batch(gpus, images, batch, rate):
    assert bash(f'global_batch {gpus} {images}').stdout.strip() == f'batch_size={batch} lr={rate:.4g}'


def test_images_are_counted(tmp_path):
    (tmp_path/'disk').mkdir()
    for name in ('1.jpg', '2.PNG', '3.txt', 'data.yaml'): (tmp_path/'disk'/name).touch()
    (tmp_path/'set').symlink_to(tmp_path/'disk')
    assert bash(f'images {tmp_path}/set; images {tmp_path}/set/data.yaml').stdout.split() == ['2', '2']


class Mirror(http.server.SimpleHTTPRequestHandler):
    "Files of `directory`; the first answers for a path in `broken` carry a wrong byte"
    broken = {}
    def log_message(self, *_): pass
    def do_GET(self):
        left = self.broken.get(self.path, 0)
        if not left: return super().do_GET()
        self.broken[self.path] = left - 1
        content = bytearray(Path(self.translate_path(self.path)).read_bytes())
        content[len(content) // 2] ^= 1
        self.send_response(200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def mirror(tmp_path):
    "A COCO of two images on a web server, and its checksums"
    require('aria2c', 'unzip')
    served = tmp_path/'served'
    for split in ('train', 'val'):
        (served/'zips').mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(served/'zips'/f'{split}2017.zip', 'w') as file:
            file.writestr(f'{split}2017/000000000001.jpg', f'{split} image' * 100)
    (served/'annotations').mkdir()
    with zipfile.ZipFile(served/'annotations'/'annotations_trainval2017.zip', 'w') as file:
        for split in ('train', 'val'):
            file.writestr(f'annotations/instances_{split}2017.json', json.dumps({'images': [split]}))
    (tmp_path/'sums').write_text(''.join(f'{sha256(path)}  {path.relative_to(served)}\n' for path in sorted(served.rglob('*.zip'))))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Mirror, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    Mirror.broken.clear()


def test_coco_is_laid_out_and_corruption_fetched_again(mirror):
    folder, url = mirror
    Mirror.broken['/zips/val2017.zip'] = 1
    result = bash(f'sleep() {{ :; }}; coco {folder}/coco', COCO_URL=url, COCO_SUMS=str(folder/'sums'))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count('refused') == 1
    assert (folder/'coco/images/val/000000000001.jpg').read_text().startswith('val image')
    assert json.loads((folder/'coco/annotations/instances_train.json').read_text()) == {'images': ['train']}
    assert not (folder/'coco/zips').exists()


def test_coco_that_stays_corrupt_fails(mirror):
    folder, url = mirror
    Mirror.broken['/zips/val2017.zip'] = 99
    result = bash(f'sleep() {{ :; }}; coco {folder}/coco', COCO_URL=url, COCO_SUMS=str(folder/'sums'))
    assert result.returncode != 0 and 'no copy with SHA-256' in result.stderr
    assert not (folder/'coco/complete').exists()


def guard(folder, minutes, *after_failure):
    "Start the jump host's watchdog, as `push.sh` does"
    env_file = environment(folder/'env', ROOT=folder, STALL_MINUTES=minutes, MAX_HOURS=2, END='true')
    subprocess.run(['bash', SCRIPTS/'guard.sh', env_file, *map(str, after_failure)], check=True, timeout=60)
    return psutil.Process(int((folder/'daemons'/'watchdog.pid').read_text()))


def test_guard_replaces_the_watchdog(tmp_path):
    "A second prep may have another limit, or none; after a failure it is ten minutes"
    before = guard(tmp_path, 60)
    for words, seconds in (((30,), '1800'), ((30, 10), '600'), ((0,), '0'), ((0, 10), '0')):
        now = guard(tmp_path, *words)
        assert not before.is_running() or before.wait(10) is None
        assert now.cmdline()[-3:-1] == [seconds, '10800']
        before = now
    before.kill()


def fake_tool(folder, name, text):
    "A command in `folder`/bin, which goes first in the PATH that is returned"
    (folder/'bin').mkdir(exist_ok=True)
    (folder/'bin'/name).write_text(text)
    (folder/'bin'/name).chmod(0o755)
    return dict(PATH=f"{folder}/bin:{os.environ['PATH']}")


def copy_scripts(folder):
    "A repository that holds nothing but the scripts"
    for name in ('scripts', 'locks'): shutil.copytree(REPO/'terraform'/name, folder/'terraform'/name)
    subprocess.run(['git', 'init', '-q', folder], check=True)
    subprocess.run(['git', 'add', '-A'], cwd=folder, check=True)
    return folder


def test_two_preps_take_turns(tmp_path):
    "The second push, of an apply whose first connection broke, waits for the prep of the first"
    repo, root = copy_scripts(tmp_path/'repo'), tmp_path/'jump'
    log = tmp_path/'log'
    (repo/'terraform'/'scripts'/'prep.sh').write_text(f'cat >/dev/null; echo begins >>{log}; sleep 2; echo ends >>{log}\n')
    fake_tool(tmp_path, 'sudo', '#!/bin/sh\nexec "$@"\n')
    path = fake_tool(tmp_path, 'ssh', '#!/bin/bash\nexec bash -c "${*: -1}"\n')
    names = as_text(dict(ROOT=root, STALL_MINUTES=0, MAX_HOURS=1, END='true'))
    settings = os.environ | path | dict(SSH='ssh', NAMES=names, ROOT=str(root), ENV_FILE=str(tmp_path/'env'))
    words = ['bash', repo/'terraform/scripts/push.sh', 'u@h']
    pushes = [subprocess.Popen(words, env=settings, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [push.wait(60) for push in pushes] == [0, 0]
    assert log.read_text().split() == ['begins', 'ends'] * 2
    psutil.Process(int((root/'daemons'/'watchdog.pid').read_text())).kill()


def test_a_failed_prep_ends_the_jump_host_in_ten_minutes(tmp_path):
    require('nginx', 'aria2c', 'curl')
    env_file = environment(tmp_path/'env', ROOT=tmp_path/'jump', DATA='sets/none', FOLDERS='', STALL_MINUTES=60, MAX_HOURS=2,
                           END='true', VENV=Path(sys.executable).parents[1])
    (tmp_path/'jump').mkdir()
    (tmp_path/'empty').mkdir()
    tree = subprocess.run(['tar', '-czf', '-', '-C', tmp_path/'empty', '.'], capture_output=True, check=True).stdout
    result = subprocess.run(['bash', SCRIPTS/'prep.sh', env_file], input=tree, capture_output=True, timeout=60)
    assert result.returncode == 1 and b'sets/none: not sent' in result.stderr
    dog = psutil.Process(int((tmp_path/'jump'/'daemons'/'watchdog.pid').read_text()))
    assert dog.cmdline()[-3] == '600'
    dog.kill()


def unfetched(folder, listing, **settings):
    "What is said before the jump host is destroyed, where its results are `listing`"
    answer = 'exit 255' if listing is None else f'printf "{listing}"'
    path = fake_tool(folder, 'ssh', f'#!/bin/sh\n{answer}\n')
    return script('unfetched.sh', **path | dict(SSH='ssh', HOST='u@h', FOLDER=str(folder/'runs'), GRACE='0') | settings)


def test_destroy_warns_of_what_was_not_fetched(tmp_path):
    (tmp_path/'runs'/'10.90.0.11').mkdir(parents=True)
    log = tmp_path/'runs'/'10.90.0.11'/'train.log'
    log.touch()
    os.utime(log, (7, 7))
    same, newer = r'10.90.0.11/train.log\t7\n', r'10.90.0.11/last.pt\t7\n10.90.0.11/train.log\t8\n'
    assert unfetched(tmp_path, same).stdout == ''
    assert '2 results on the jump host were not fetched, such as 10.90.0.11/last.pt' in unfetched(tmp_path, newer).stdout
    assert '1 results' in unfetched(tmp_path, same, FOLDER=str(tmp_path/'none')).stdout
    silent = unfetched(tmp_path, None)
    assert silent.returncode == 0 and 'does not answer' in silent.stdout


def test_a_recycled_address_passes_the_host_key_check(tmp_path):
    "With the options that Terraform gives: another instance at the same address is met as a stranger, the same one must have its key"
    require('sshd', 'ssh', 'ssh-keygen')
    options = re.search(r'"ssh \$\{local.identity\}(.*?)"', (REPO/'terraform'/'outputs.tf').read_text())[1]
    port = free_port()
    Path('/run/sshd').mkdir(exist_ok=True)
    def meets(instance, key):
        if not (tmp_path/key).exists(): subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', tmp_path/key], check=True)
        daemon = ['/usr/sbin/sshd', '-D', '-e', '-f', '/dev/null', '-o', 'ListenAddress=127.0.0.1', '-p', str(port), '-h', tmp_path/key]
        server = subprocess.Popen(daemon, stderr=subprocess.DEVNULL)
        own = f'-o UserKnownHostsFile={tmp_path}/known -o BatchMode=yes -o ConnectionAttempts=20 -p {port}'
        words = ['ssh', *(options % instance).split(), *own.split(), 'nobody@127.0.0.1', 'true']
        try: error = subprocess.run(words, capture_output=True, text=True, timeout=60).stderr
        finally:
            server.kill()
            server.wait()
        assert 'Permission denied' in error or 'verification failed' in error, error
        return 'Permission denied' in error         # past the key of the host
    assert meets('i-1', 'first') and meets('i-1', 'first')
    assert meets('i-2', 'second') and not meets('i-1', 'second')


def test_push_names_a_missing_folder():
    result = script('push.sh', 'nobody@192.0.2.1', 'runs/none', SSH='ssh')
    assert result.returncode == 1 and 'runs/none: no such folder' in result.stderr


def test_push_follows_links(tmp_path):
    "A data set is often a link to a larger disk"
    repo, disk = tmp_path/'repo', tmp_path/'disk'
    copy_scripts(repo)
    (disk/'images').mkdir(parents=True)
    (disk/'images'/'1.jpg').write_text('pixels')
    (repo/'sets').mkdir()
    (repo/'sets'/'whole').symlink_to(disk)
    (repo/'sets'/'parts').mkdir()
    (repo/'sets'/'parts'/'1.jpg').symlink_to(disk/'images'/'1.jpg')
    (repo/'sets'/'empty').mkdir()
    ssh = tmp_path/'bin'/'ssh'
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/bash\ncase "$*" in *prep.sh*) cat >"$SENT" ;; *tee* | *"tar -xmf"*) cat >/dev/null ;; esac\n')
    ssh.chmod(0o755)
    settings = dict(PATH=f"{ssh.parent}:{os.environ['PATH']}", SENT=str(tmp_path/'sent.tgz'), NAMES='', SSH='ssh')
    push = lambda *folders: script(repo/'terraform/scripts/push.sh', 'u@h', *folders, **settings)
    result = push('sets/whole', 'sets/parts')
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path/'sent.tgz') as sent: members = {member.name: member.isreg() for member in sent}
    assert members['sets/whole/images/1.jpg'] and members['sets/parts/1.jpg']
    assert 'sets/empty: holds no file' in push('sets/empty').stderr


LOCKS = REPO/'terraform'/'locks'


def locked(name): return dict(re.findall(r'^([\w.-]+)==(\S+)', (LOCKS/f'{name}.txt').read_text(), re.M))


@pytest.mark.parametrize('platform', ['x86_64-unknown-linux-gnu', 'aarch64-unknown-linux-gnu'])     # ML servers, jump host
def test_locked_versions_exist_for_the_python_of_the_image(platform):
    "Ubuntu 24.04 has Python 3.12; every package in the lock has a wheel for it, and all its hashes"
    uv = REPO/'terraform'/'.venv'/'bin'/'uv'
    if not uv.exists(): pytest.skip('no terraform/.venv with uv: see terraform/requirements.txt')
    for name in ('yolov9001', 'uv', 'boto3'):
        options = f'--dry-run --target /nonexistent --python-version 3.12 --python-platform {platform} --only-binary :all: --require-hashes'
        words = [uv, 'pip', 'install', *options.split(), '-r', LOCKS/f'{name}.txt']
        result = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr


def test_the_lock_holds_what_the_package_asks_for():
    "And nothing is taken without a hash"
    from packaging.requirements import Requirement
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(REPO/'settings.ini')
    versions = locked('yolov9001')
    for requirement in map(Requirement, settings['DEFAULT']['requirements'].split()):
        version = versions[requirement.name.replace('_', '-').replace('.', '-').lower()]
        assert requirement.specifier.contains(version), f'{requirement}, locked {version}: make the lock anew, see terraform/README.md'
    for name in ('yolov9001', 'uv', 'boto3'):
        assert all('--hash=sha256:' in entry for entry in re.split(r'^(?=\w)', (LOCKS/f'{name}.txt').read_text(), flags=re.M)[1:])


def serve(port, idle=60, closed=10):
    "The rendezvous of the jump host, less patient than there"
    code = f'import rendezvous; rendezvous.IDLE = {idle}; rendezvous.CLOSED = {closed}; rendezvous.serve({port})'
    return subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL, cwd=SCRIPTS)


@pytest.fixture
def meeting():
    "Port of a rendezvous, and `come(own, all, minutes)`, a host that waits for the others"
    port = free_port()
    server, hosts = serve(port, 3, 2), []

    def come(own, all_hosts, minutes):
        words = [sys.executable, SCRIPTS/'rendezvous.py', 'wait', '127.0.0.1', str(port), own, all_hosts, str(minutes)]
        hosts.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
        return hosts[-1]
    yield port, come
    for process in (server, *hosts):
        process.kill()
        process.wait()


def told(host): return host.communicate(timeout=200)[1].strip().splitlines()[-1]


def test_the_first_rendezvous_waits_for_all_hosts(meeting):
    _, come = meeting
    first = come('a', 'a,b', 3)
    time.sleep(15)
    assert first.poll() is None
    second = come('b', 'a,b', 3)
    assert {told(first), told(second)} in ({'all hosts are there'}, {'all hosts are there', 'training has begun'})


def test_a_host_that_never_comes_is_not_waited_for_for_ever(meeting):
    "Nor by those that come once the training has begun"
    port, come = meeting
    from torch.distributed import TCPStore
    training = TCPStore('127.0.0.1', port, is_master=False, timeout=timedelta(minutes=2))     # as a torchrun that stays connected
    assert told(come('a', 'a,b,c', .1)) == 'training begins without b, c'
    begun = time.monotonic()
    assert told(come('b', 'a,b,c', 3)) == 'training has begun' and time.monotonic() - begun < 100
    del training


def test_hosts_may_try_again_after_a_torchrun_gave_up(meeting):
    "It closes the rendezvous for good, which then outlives it: the jump host opens another"
    from yolov9001.training.cluster import Plan, torchrun_environment, torchrun_command
    port, come = meeting
    assert told(come('a', 'a', 1)) == 'all hosts are there'
    plan = Plan(hosts=('jump', '127.0.0.1'), address='127.0.0.1', interface='lo', port=port)
    def run(command):
        words = [word.replace('endpoint=jump', 'endpoint=127.0.0.1') for word in torchrun_command(plan, [command], '/tmp')]
        words.remove('--max-restarts=3')
        return subprocess.run(words, env=torchrun_environment(plan), capture_output=True, timeout=100).returncode
    assert run('false') == 1
    assert any(run('true') == 0 for _ in range(10))     # as the launcher, which tries ten times
    time.sleep(25)                                  # all have left, and the next training begins anew
    assert told(come('a', 'a,b', .01)) == 'training begins without b'


@pytest.fixture(scope='module')
def folder():
    "Not pytest's own temporary folder: nginx runs as www-data and must reach it"
    path = Path('/tmp')/f'yolov9001-cluster-{os.getpid()}'
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope='module')
def hosts(folder): # which outlives them
    require('nginx', 'screen', 'aria2c', 'ssh', 'sshd', 'curl', 'runuser')
    with open_hosts(jump=JUMP, user='10.99.7.3', ml0=SERVERS[0], ml1=SERVERS[1]) as hosts: yield hosts


def make_repository(folder):
    "A clone with what is in the working tree, a small data set beside it, and a `sudo` for hosts where we are root anyway"
    repo = folder/'clone'
    words = ['git', 'ls-files', '-co', '--exclude-standard']
    files = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if not (REPO/name).is_file(): continue
        (repo/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO/name, repo/name)
    for words in (['init', '-q'], ['add', '-A']): subprocess.run(['git', *words], cwd=repo, check=True)
    from yolov9001.data.dataset import make_digits
    make_digits(repo/'runs'/'tiny', train=16, val=4)
    (folder/'bin').mkdir()
    (folder/'bin'/'sudo').write_text('#!/bin/sh\nexec "$@"\n')
    (folder/'bin'/'sudo').chmod(0o755)
    return repo


def start_sshd(hosts, folder):
    for name in ('host_key', 'user_key'): subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', folder/name], check=True)
    shutil.copy(folder/'user_key.pub', folder/'authorized')
    (folder/'sshd_config').write_text(f'''Port 22
ListenAddress {JUMP}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized
PidFile none
StrictModes no
PermitRootLogin yes
SetEnv PATH={folder}/bin:/usr/sbin:/usr/bin:/sbin:/bin
''')
    Path('/run/sshd').mkdir(exist_ok=True)
    hosts.start('jump', '/usr/sbin/sshd', '-D', '-f', folder/'sshd_config')


def as_text(names): return '\n'.join(f"{name}='{value}'" for name, value in names.items())


def environment(path, **names):
    path.write_text(as_text(names))
    return path


def start_server(hosts, folder, i, venv):
    "What cloud-init does on an ML server; its folder lies at the same place on all, or a run of another would miss its data"
    own, root, screens = folder/f'ml{i}', folder/'root', folder/f'screen{i}'
    for path in (own, root, screens): path.mkdir(mode=0o755, exist_ok=path == root)
    screens.chmod(0o700)
    env_file = environment(folder/f'ml{i}.env', ROOT=root, ADDRESS=SERVERS[i], JUMP=JUMP, HOSTS=','.join(SERVERS), DATA='runs/tiny',
                           OWNER='root', SPOT='false', STALL_MINUTES=60, MAX_HOURS=2, VENV=venv, END=f'touch {folder}/ml{i}_ended',
                           PARAMETERS=f'input_size=64x96 epochs={EPOCHS} batch_size=8 evaluate_every={EPOCHS} save_every=1 device=cpu')
    hosts.inside(f'ml{i}', 'bash', '-c', f'cd {own} && curl -fsSO http://{JUMP}/blob/code.tar && tar xf code.tar')
    # ip netns exec has mounts of its own
    begin = f'mount --bind {own} {root} && exec bash {root}/repo/terraform/scripts/mlserver.sh {env_file}'
    settings = os.environ | dict(SCREENDIR=str(screens), OMP_NUM_THREADS='1', PERIOD='1')
    hosts.start(f'ml{i}', 'bash', '-c', begin, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope='module')
def cluster(hosts, folder):
    "Prep over ssh, then the first ML server; the blob is corrupt until it has noticed; then the second"
    repo, jump, venv = make_repository(folder), folder/'jump', Path(sys.executable).parents[1]
    start_sshd(hosts, folder)
    names = dict(NAME='test', REGION='us-east-1', ROOT=jump, ADDRESS=JUMP, NETWORK=NETWORK, DATA='runs/tiny', FOLDERS='runs/tiny',
                 STALL_MINUTES=60, MAX_HOURS=2, VENV=venv, END=f'touch {folder}/jump_ended')
    ssh = f"ssh -i '{folder}/user_key' -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile={folder}/known -o HostKeyAlias=i-1"
    settings = os.environ | dict(NAMES=as_text(names), SSH=ssh, ROOT=str(jump), ENV_FILE=str(folder/'jump.env'))
    words = hosts.words('user', ['bash', repo/'terraform/scripts/push.sh', f'root@{JUMP}', 'runs/tiny'])
    pushed = subprocess.run(words, capture_output=True, text=True, timeout=300, env=settings)
    assert pushed.returncode == 0, pushed.stderr
    blob, whole = jump/'blob'/'blob.tar', folder/'whole.tar'
    blob.rename(whole)
    blob.write_bytes(bytes(whole.stat().st_size))
    start_server(hosts, folder, 0, venv)
    log = folder/'ml0'/'results'/'setup.log'
    wait_for(lambda: log.exists() and 'refused' in log.read_text(), PATIENCE, lambda: log.read_text())
    whole.rename(blob)
    wait_for(lambda: 'training on' in train_log(folder, 0), PATIENCE, lambda: log.read_text())
    time.sleep(10)
    start_server(hosts, folder, 1, venv)
    return folder, hosts, venv


def train_log(folder, i):
    path = folder/f'ml{i}'/'results'/'train.log'
    return path.read_text() if path.exists() else ''


def steps(folder, i):
    "How far a server is, in epochs"
    from yolov9001.training.checkpoint import progress
    return progress(folder/f'ml{i}'/'results'/'train'/'last.pt')[0]


def both_logs(folder): return train_log(folder, 0)[-3000:] + train_log(folder, 1)[-3000:]


def test_code_and_data_were_packed_apart_with_their_manifest(cluster):
    "A server installs from the small one while it downloads the large one"
    folder, *_ = cluster
    manifest = dict(reversed(line.split()) for line in (folder/'jump/blob/manifest.sha256').read_text().splitlines())
    def names(tar):
        assert manifest[tar] == sha256(folder/'jump'/'blob'/tar)
        return subprocess.run(['tar', 'tf', folder/'jump'/'blob'/tar], capture_output=True, text=True).stdout.split('\n')
    code, data = names('code.tar'), names('blob.tar')
    assert {'repo/settings.ini', 'repo/terraform/scripts/mlserver.sh'} <= set(code)
    assert 'repo/runs/tiny/annotations/instances_train.json' in data
    assert not [name for name in code if '/runs/tiny' in name or '/.venv/' in name or '/.git/' in name]
    assert not [name for name in data if name.startswith('repo/') and not name.startswith('repo/runs/tiny')]


def test_only_the_network_is_served(cluster):
    hosts = cluster[1]
    hosts.inside('user', 'ip', 'addr', 'add', '10.98.7.3/32', 'dev', 'lo')
    hosts.inside('jump', 'ip', 'route', 'add', '10.98.7.3/32', 'via', '10.99.7.3')
    status = lambda *words: hosts.inside('user', 'curl', '-s', '-o', '/dev/null', '-w', '%{http_code}', *words).stdout
    url = f'http://{JUMP}/blob/manifest.sha256'
    assert (status(url), status('--interface', '10.98.7.3', url)) == ('200', '403')
    assert (status('-r', '0-9', url), status('-X', 'DELETE', url)) == ('206', '405')


def test_a_late_host_restarts_nobody(cluster):
    "The first server has waited for the second: the first rendezvous has both, and nobody was started twice"
    folder, *_ = cluster
    wait_for(lambda: min(steps(folder, 0), steps(folder, 1)) >= 2, PATIENCE, lambda: both_logs(folder))
    told = train_log(folder, 0) + train_log(folder, 1)
    assert 'all hosts are there' in told and 'Restarting' not in told and 'Received Signals.SIGTERM' not in told


def trainers(hosts, name):
    "The processes that train on a host, without torchrun"
    pids = hosts.pids(name)
    commands = {process: process.info['cmdline'] or [] for process in psutil.process_iter(['cmdline']) if process.pid in pids}
    return [process for process, words in commands.items() if '--config' in words and '-m' not in words]


def test_the_first_server_may_be_taken(cluster):
    "The rendezvous is on the jump host: the second goes on alone, and a new first server takes part again without a wait"
    folder, hosts, venv = cluster
    hosts.kill('ml0')
    shutil.copy(folder/'ml0'/'results'/'setup.log', folder/'first_setup.log')
    reached = steps(folder, 1)
    wait_for(lambda: steps(folder, 1) >= reached + 2, PATIENCE, lambda: both_logs(folder))
    survivor, = trainers(hosts, 'ml1')
    survivor.suspend()                                  # or it may be done before the other has started
    for name in ('ml0', 'screen0'): shutil.rmtree(folder/name)
    start_server(hosts, folder, 0, venv)
    wait_for(lambda: 'training has begun' in train_log(folder, 0), PATIENCE, lambda: both_logs(folder))
    survivor.resume()
    wait_for(lambda: steps(folder, 0) > reached, PATIENCE, lambda: both_logs(folder))


def test_training_ran_in_screen_and_came_back(cluster):
    folder, *_ = cluster
    screens = os.environ | dict(SCREENDIR=str(folder/'screen1'))
    assert 'ddptrain' in subprocess.run(['screen', '-ls'], capture_output=True, text=True, env=screens).stdout
    codes = [folder/'jump'/'results'/address/'exit_code' for address in SERVERS]
    wait_for(lambda: all(code.exists() for code in codes), PATIENCE, lambda: both_logs(folder))
    assert [code.read_text() for code in codes] == ['0\n', '0\n'], both_logs(folder)
    from yolov9001.training.checkpoint import load_model
    _, checkpoint = load_model(folder/'jump'/'results'/SERVERS[0]/'train'/'last.pt')
    assert checkpoint['epoch'] == EPOCHS
    assert (folder/'jump'/'results'/SERVERS[1]/'train.log').stat().st_size > 0


def test_storage_was_chosen_and_the_corrupt_blob_fetched_again(cluster):
    folder, *_ = cluster
    first = (folder/'first_setup.log').read_text()
    assert 'blob.tar: refused' in first and 'blob.tar: SHA-256 is right' in first
    assert 'blob.tar: refused' not in (folder/'ml1'/'results'/'setup.log').read_text()
    assert (folder/'ml1'/'results'/'storage.txt').read_text().strip() in ('ram', 'root')


def test_servers_end_themselves_and_the_jump_host_stays(cluster):
    folder, *_ = cluster
    wait_for(lambda: all((folder/f'ml{i}_ended').exists() for i in (0, 1)), PATIENCE, 'not ended')
    assert not (folder/'jump_ended').exists()


def prepare_launch(folder, command, parameters=''):
    "Everything for train.sh by itself, with a stub that runs `command` in the place of the installed one; its ENV_FILE"
    stub = folder/'venv'/'bin'/'yolov9001'
    stub.parent.mkdir(parents=True)
    stub.write_text(f'#!/bin/sh\necho trained "$@"\n{command}\n')
    stub.chmod(0o755)
    sent = folder/'store'/'repo'
    (sent/'runs'/'old').mkdir(parents=True)
    (sent/'runs'/'old'/'last.pt').write_text('state')
    return environment(folder/'env', ROOT=folder, HOSTS='10.0.0.1', ADDRESS='10.0.0.1', DATA='mine', RUN='old',
                       PARAMETERS=parameters, STALL_MINUTES=60, END=f'touch {folder}/ended')


def launch(folder, code, parameters='', **settings):
    "What train.sh does where the training ends with `code`"
    return script('train.sh', prepare_launch(folder, f'exit {code}', parameters), **{'GRACE': '1'} | settings)


def test_a_run_that_came_with_the_blob_goes_on(tmp_path):
    assert launch(tmp_path, 0).returncode == 0
    assert (tmp_path/'results'/'old'/'last.pt').read_text() == 'state'
    words = trained(tmp_path)
    assert words[:5] == ['train', '--data', f'{tmp_path}/store/repo/mine', '--out', f'{tmp_path}/results/old']
    assert '--resume' in words          # else it would refuse the folder
    assert (tmp_path/'ended').exists()


def trained(folder):
    "The words that the command was called with"
    return next(line for line in (folder/'results'/'train.log').read_text().splitlines() if line.startswith('trained')).split()[1:]


@pytest.mark.parametrize('parameters, chosen', [
    ('epochs=2', 'batch_size=64 lr=0.008 epochs=2'),        # two GPUs, 1100 images
    ('lr=0.001', 'batch_size=64 lr=0.001'),
    ('optimizer=sgd', 'batch_size=64 optimizer=sgd'),       # its own rate
    ('batch_size=8', 'batch_size=8'),
])
def test_the_batch_is_chosen_unless_given(tmp_path, parameters, chosen):
    smi = fake_tool(tmp_path, 'nvidia-smi', '#!/bin/sh\necho GPU 0\necho GPU 1\n')
    (tmp_path/'store'/'repo'/'mine').mkdir(parents=True)
    for i in range(1100): (tmp_path/'store'/'repo'/'mine'/f'{i}.jpg').touch()
    assert launch(tmp_path, 0, parameters, **smi).returncode == 0
    words = trained(tmp_path)
    assert [word for before, word in zip(words, words[1:]) if before == '-p'] == chosen.split()


def test_a_run_that_goes_on_keeps_its_batch(tmp_path):
    (tmp_path/'store'/'repo'/'runs'/'old').mkdir(parents=True)
    (tmp_path/'store'/'repo'/'runs'/'old'/'config.yaml').write_text('batch_size: 24\n')
    (tmp_path/'results').mkdir()
    shutil.copytree(tmp_path/'store'/'repo'/'runs'/'old', tmp_path/'results'/'old')
    shutil.rmtree(tmp_path/'store')
    assert launch(tmp_path, 0).returncode == 0
    assert '-p' not in trained(tmp_path)


@pytest.mark.parametrize('kind, cache', [('nvme', '{}/store/cache'), ('ram', ''), ('root', '')])
def test_the_pack_lies_on_nvme_where_there_is_one(tmp_path, kind, cache):
    (tmp_path/'results').mkdir()
    (tmp_path/'results'/'storage.txt').write_text(f'{kind}\n')
    env_file = prepare_launch(tmp_path, 'echo "cache [$XDG_CACHE_HOME]"')
    assert script('train.sh', env_file, GRACE='1', XDG_CACHE_HOME='').returncode == 0
    assert f'cache [{cache.format(tmp_path)}]' in (tmp_path/'results'/'train.log').read_text()


def test_a_training_that_failed_can_be_looked_at_for_ten_minutes(tmp_path):
    result = launch(tmp_path, 3)
    assert result.returncode == 3 and 'failed with exit code 3: this machine ends in ten minutes' in result.stderr
    assert (tmp_path/'results'/'exit_code').read_text() == '3\n' and (tmp_path/'ended').exists()


def test_ctrl_c_in_the_session_ends_the_machine_too(tmp_path):
    words = ['env', '--default-signal=INT', 'bash', SCRIPTS/'train.sh', prepare_launch(tmp_path, 'sleep 100')]
    session = subprocess.Popen(words, start_new_session=True, env=os.environ | {'GRACE': '1'}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path/'results'/'train.log'
    wait_for(lambda: log.exists() and 'trained' in log.read_text(), 60, 'no training')
    time.sleep(1)
    os.killpg(session.pid, signal.SIGINT)
    assert session.wait(60) == 130 and (tmp_path/'ended').exists()


def test_a_setup_that_fails_trains_nothing_and_ends_the_server(tmp_path):
    "No jump host answers, nothing can be installed"
    require('curl', 'screen', 'aria2c')
    root = tmp_path/'ml'
    path = fake_tool(tmp_path, 'curl', '#!/bin/sh\nexit 7\n') | fake_tool(tmp_path, 'sleep', '#!/bin/sh\nexit 0\n')
    env_file = environment(tmp_path/'env', ROOT=root, JUMP='192.0.2.1', HOSTS='10.0.0.1', ADDRESS='10.0.0.1', DATA='digits', OWNER='root',
                           SPOT='false', STALL_MINUTES=60, MAX_HOURS=1, END=f'touch {tmp_path}/ended', VENV=Path(sys.executable).parents[1])
    result = script('mlserver.sh', env_file, **path)
    for name in ('watchdog', 'sync'): os.killpg(int((root/'daemons'/f'{name}.pid').read_text()), signal.SIGKILL)
    assert result.returncode == 1 and (root/'results'/'exit_code').read_text() == '1\n'
    assert 'this machine ends in ten minutes' in result.stdout and (tmp_path/'ended').exists()
    assert not (root/'results'/'train.log').exists()


def test_sync_sends_what_changed(tmp_path):
    "Again only what is new, nothing that is being written, and a failure is told"
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'curl').write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >>{tmp_path}/sent\n')
    (tmp_path/'bin'/'curl').chmod(0o755)
    path = dict(PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    folder = tmp_path/'results'
    (folder/'train').mkdir(parents=True)
    for name in ('log', 'train/last.pt', 'train/.last.7.pt'): (folder/name).write_text('one')
    sent = lambda: sorted((tmp_path/'sent').read_text().split()) if (tmp_path/'sent').exists() else []
    loop = subprocess.Popen(['bash', SCRIPTS/'sync.sh', folder, 'http://jump'], env=os.environ | path | {'PERIOD': '.2'})
    wait_for(lambda: sent() == ['http://jump/log', 'http://jump/train/last.pt'], 300, sent)
    (folder/'log').write_text('one and two')
    wait_for(lambda: sent() == ['http://jump/log'] * 2 + ['http://jump/train/last.pt'], 300, sent)
    loop.kill()
    loop.wait()
    (tmp_path/'bin'/'curl').write_text('#!/bin/sh\nexit 22\n')
    assert subprocess.run(['bash', SCRIPTS/'sync.sh', folder, 'http://jump'], env=os.environ | path | {'ONCE': '1'}).returncode == 1


class Imds(http.server.BaseHTTPRequestHandler):
    "The instance metadata of a spot instance that is taken back at the third question"
    questions = 0
    def log_message(self, *_): pass
    def answer(self, status, text=b''):
        self.send_response(status)
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_PUT(self): self.answer(200, b'secret')
    def do_GET(self):
        assert self.path == '/latest/meta-data/spot/instance-action'
        if self.headers['X-aws-ec2-metadata-token'] != 'secret': return self.answer(401)
        Imds.questions += 1
        self.answer(200 if Imds.questions >= 3 else 404)


def test_spot_notice_ends_the_training(tmp_path):
    require('curl')
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Imds)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    training = subprocess.Popen(['sleep', '100'])
    (tmp_path/'train.pid').write_text(f'{training.pid}\n')
    watch = script('spot.sh', tmp_path/'train.pid', IMDS=f'http://127.0.0.1:{server.server_port}', PERIOD='.1')
    server.shutdown()
    assert (watch.returncode, Imds.questions, training.wait(10)) == (0, 3, -signal.SIGTERM)
