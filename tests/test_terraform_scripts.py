"The scripts of terraform/scripts as they are shipped: functions alone, then a jump host and two ML servers as network namespaces with real ssh and nginx."
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import psutil
import pytest
from namespaces import open_hosts

REPO = Path(__file__).parents[1]
SCRIPTS = REPO/'terraform'/'scripts'
JUMP, SERVERS, NETWORK = '10.99.7.2', ('10.99.7.11', '10.99.7.12'), '10.99.7.0/24'


def require(*commands):
    missing = [name for name in commands if not shutil.which(name, path=os.environ['PATH'] + ':/usr/sbin')]
    if missing: pytest.skip(f"not installed: {', '.join(missing)}")


def bash(code, **environment):
    return subprocess.run(['bash', '-euo', 'pipefail', '-c', f'. {SCRIPTS}/lib.sh; {code}'], capture_output=True, text=True, env=os.environ | environment, timeout=120)


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


def test_watchdog_waits_while_files_change(tmp_path):
    watched = tmp_path/'watched'
    watched.mkdir()
    dog = subprocess.Popen(['bash', SCRIPTS/'watchdog.sh', watched, '2 seconds', f'touch {tmp_path}/ended'], env=os.environ | {'PERIOD': '.2'}, stdout=subprocess.DEVNULL)
    for _ in range(15):
        (watched/'log').write_text('busy')
        time.sleep(.2)
    assert dog.poll() is None and not (tmp_path/'ended').exists()
    assert dog.wait(20) == 0 and (tmp_path/'ended').exists()


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
        with zipfile.ZipFile(served/'zips'/f'{split}2017.zip', 'w') as file: file.writestr(f'{split}2017/000000000001.jpg', f'{split} image' * 100)
    (served/'annotations').mkdir()
    with zipfile.ZipFile(served/'annotations'/'annotations_trainval2017.zip', 'w') as file:
        for split in ('train', 'val'): file.writestr(f'annotations/instances_{split}2017.json', json.dumps({'images': [split]}))
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


def test_guard_replaces_the_watchdog_and_ends_it(tmp_path):
    "A second prep may have another limit, or none"
    def guard(minutes):
        subprocess.run(['bash', SCRIPTS/'guard.sh', environment(tmp_path/'env', ROOT=tmp_path, STALL_MINUTES=minutes, END='true')], check=True, timeout=60)
        return psutil.Process(int((tmp_path/'watchdog.pid').read_text())) if minutes else None
    first = guard(60)
    second = guard(30)
    assert not first.is_running() or first.wait(10) is None
    assert second.cmdline()[-2] == '30 minutes'
    guard(0)
    assert not second.is_running() or second.wait(10) is None


def test_push_names_a_missing_folder():
    result = subprocess.run(['bash', SCRIPTS/'push.sh', 'nobody@192.0.2.1', 'runs/none'], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and 'runs/none: no such folder' in result.stderr


def test_push_follows_links(tmp_path):
    "A data set is often a link to a larger disk"
    repo, disk = tmp_path/'repo', tmp_path/'disk'
    shutil.copytree(SCRIPTS, repo/'terraform'/'scripts')
    (disk/'images').mkdir(parents=True)
    (disk/'images'/'1.jpg').write_text('pixels')
    (repo/'sets').mkdir()
    (repo/'sets'/'whole').symlink_to(disk)
    (repo/'sets'/'parts').mkdir()
    (repo/'sets'/'parts'/'1.jpg').symlink_to(disk/'images'/'1.jpg')
    (repo/'sets'/'empty').mkdir()
    ssh = tmp_path/'bin'/'ssh'
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/bash\ncase "$*" in *"tar -xmzf"*) cat >"$SENT" ;; *tee* | *"tar -xmf"*) cat >/dev/null ;; esac\n')
    ssh.chmod(0o755)
    subprocess.run(['git', 'init', '-q', repo], check=True)
    environment = os.environ | dict(PATH=f"{ssh.parent}:{os.environ['PATH']}", SENT=str(tmp_path/'sent.tgz'), NAMES='')
    push = lambda *folders: subprocess.run(['bash', repo/'terraform/scripts/push.sh', 'u@h', *folders], capture_output=True, text=True, env=environment, timeout=60)
    result = push('sets/whole', 'sets/parts')
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path/'sent.tgz') as sent: members = {member.name: member.isreg() for member in sent}
    assert members['sets/whole/images/1.jpg'] and members['sets/parts/1.jpg']
    assert 'sets/empty: holds no file' in push('sets/empty').stderr


def test_dependencies_resolve():
    "uv finds a set of packages for what setup.py asks for"
    uv = REPO/'terraform'/'.venv'/'bin'/'uv'
    if not uv.exists(): pytest.skip('no terraform/.venv with uv: see terraform/requirements.txt')
    result = subprocess.run([uv, 'pip', 'install', '--dry-run', '--python', sys.executable, '-e', f'{REPO}[dev,compare]'], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


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
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=REPO, capture_output=True, text=True, check=True).stdout.split('\n')
    for name in filter(None, files):
        if not (REPO/name).is_file(): continue
        (repo/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO/name, repo/name)
    for words in (['init', '-q'], ['add', '-A']): subprocess.run(['git', *words], cwd=repo, check=True)
    from yolov9001.data import make_digits
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
    "What cloud-init does on an ML server"
    root, screens = folder/f'ml{i}', folder/f'screen{i}'
    root.mkdir()
    screens.mkdir(mode=0o700)
    env_file = environment(folder/f'ml{i}.env', ROOT=root, ADDRESS=SERVERS[i], JUMP=JUMP, HOSTS=','.join(SERVERS), DATA='runs/tiny', OWNER='root', SPOT='false', STALL_MINUTES=60, VENV=venv,
                           PARAMETERS='input_size=64x96 epochs=2 batch_size=8 device=cpu', END=f'touch {folder}/ml{i}_ended')
    hosts.inside(f'ml{i}', 'bash', '-c', f'cd {root} && curl -fsSO http://{JUMP}/blob/scripts.tar && tar xf scripts.tar')
    hosts.start(f'ml{i}', 'bash', root/'scripts'/'mlserver.sh', env_file, env=os.environ | dict(SCREENDIR=str(screens), OMP_NUM_THREADS='1', PERIOD='1'),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope='module')
def cluster(hosts, folder):
    "Prep over ssh, then both ML servers; the blob is corrupt until the first of them has noticed"
    repo, jump, venv = make_repository(folder), folder/'jump', Path(sys.executable).parents[1]
    start_sshd(hosts, folder)
    names = dict(NAME='test', REGION='us-east-1', ROOT=jump, ADDRESS=JUMP, NETWORK=NETWORK, DATA='runs/tiny', STALL_MINUTES=60, END=f'touch {folder}/jump_ended')
    pushed = subprocess.run(hosts.words('user', ['bash', repo/'terraform/scripts/push.sh', f'root@{JUMP}', 'runs/tiny']), capture_output=True, text=True, timeout=300,
                            env=os.environ | dict(NAMES=as_text(names), SSH_KEY=str(folder/'user_key'), ROOT=str(jump), ENV_FILE=str(folder/'jump.env')))
    assert pushed.returncode == 0, pushed.stderr
    blob, whole = jump/'blob'/'blob.tar', folder/'whole.tar'
    blob.rename(whole)
    blob.write_bytes(bytes(whole.stat().st_size))
    start_server(hosts, folder, 0, venv)
    log = folder/'ml0'/'results'/'setup.log'
    wait_for(lambda: log.exists() and 'refused' in log.read_text(), 600, lambda: log.read_text())
    whole.rename(blob)
    start_server(hosts, folder, 1, venv)
    return folder, hosts


def test_blob_was_packed_with_its_manifest(cluster):
    folder, _ = cluster
    manifest = dict(reversed(line.split()) for line in (folder/'jump/blob/manifest.sha256').read_text().splitlines())
    assert manifest['blob.tar'] == sha256(folder/'jump/blob/blob.tar')
    names = subprocess.run(['tar', 'tf', folder/'jump/blob/blob.tar'], capture_output=True, text=True).stdout.split('\n')
    assert {'repo/settings.ini', 'repo/runs/tiny/annotations/instances_train.json'} <= set(names)
    assert not [name for name in names if '/.venv/' in name or '/.git/' in name]


def test_only_the_network_is_served(cluster):
    _, hosts = cluster
    hosts.inside('user', 'ip', 'addr', 'add', '10.98.7.3/32', 'dev', 'lo')
    hosts.inside('jump', 'ip', 'route', 'add', '10.98.7.3/32', 'via', '10.99.7.3')
    status = lambda *words: hosts.inside('user', 'curl', '-s', '-o', '/dev/null', '-w', '%{http_code}', *words).stdout
    url = f'http://{JUMP}/blob/manifest.sha256'
    assert (status(url), status('--interface', '10.98.7.3', url), status('-r', '0-9', url), status('-X', 'DELETE', url)) == ('200', '403', '206', '405')


def test_training_ran_in_screen_and_came_back(cluster):
    folder, hosts = cluster
    sessions = lambda: subprocess.run(['screen', '-ls'], capture_output=True, text=True, env=os.environ | dict(SCREENDIR=str(folder/'screen0'))).stdout
    wait_for(lambda: 'ddptrain' in sessions(), 600, lambda: (folder/'ml0/results/setup.log').read_text())
    codes = [folder/'jump'/'results'/address/'exit_code' for address in SERVERS]
    log = lambda i: (folder/f'ml{i}'/'results'/'train.log').read_text()[-3000:]
    wait_for(lambda: all(code.exists() for code in codes), 3600, lambda: log(0) + log(1))
    assert [code.read_text() for code in codes] == ['0\n', '0\n'], log(0) + log(1)
    from yolov9001.checkpoint import load_model
    _, checkpoint = load_model(folder/'jump'/'results'/SERVERS[0]/'train'/'last.pt')
    assert checkpoint['epoch'] == 2
    assert (folder/'jump'/'results'/SERVERS[1]/'train.log').stat().st_size > 0


def test_storage_was_chosen_and_the_corrupt_blob_fetched_again(cluster):
    folder, _ = cluster
    for i, refused in ((0, True), (1, False)):
        log = (folder/f'ml{i}'/'results'/'setup.log').read_text()
        assert ('blob.tar: refused' in log) == refused and 'blob.tar: SHA-256 is right' in log
        assert (folder/f'ml{i}'/'results'/'storage.txt').read_text().strip() in ('ram', 'root')


def test_servers_end_themselves_and_the_jump_host_stays(cluster):
    folder, _ = cluster
    wait_for(lambda: all((folder/f'ml{i}_ended').exists() for i in (0, 1)), 600, 'not ended')
    assert not (folder/'jump_ended').exists()


def launch(folder, code):
    "train.sh by itself, with a stub that exits with `code` in the place of the installed command"
    stub = folder/'venv'/'bin'/'yolov9001'
    stub.parent.mkdir(parents=True)
    stub.write_text(f'#!/bin/sh\necho trained "$@"\nexit {code}\n')
    stub.chmod(0o755)
    (folder/'repo'/'runs'/'old').mkdir(parents=True)
    (folder/'repo'/'runs'/'old'/'last.pt').write_text('state')
    env_file = environment(folder/'env', ROOT=folder, REPO=folder/'repo', HOSTS='10.0.0.1', ADDRESS='10.0.0.1', DATA='mine', RUN='old', STALL_MINUTES=60, END=f'touch {folder}/ended')
    return subprocess.run(['bash', SCRIPTS/'train.sh', env_file], capture_output=True, text=True)


def test_a_run_that_came_with_the_blob_goes_on(tmp_path):
    assert launch(tmp_path, 0).returncode == 0
    assert (tmp_path/'results'/'old'/'last.pt').read_text() == 'state'
    told = next(line for line in (tmp_path/'results'/'train.log').read_text().splitlines() if line.startswith('trained'))
    assert told.startswith(f'trained train --data {tmp_path}/repo/mine --out {tmp_path}/results/old') and '--resume' in told.split()     # else it would refuse the folder
    assert (tmp_path/'ended').exists()


def test_a_training_that_failed_leaves_the_machine_to_be_looked_at(tmp_path):
    assert launch(tmp_path, 3).returncode == 3
    assert (tmp_path/'results'/'exit_code').read_text() == '3\n' and not (tmp_path/'ended').exists()


def test_an_installation_that_fails_trains_nothing(tmp_path):
    (tmp_path/'repo').mkdir()
    env_file = environment(tmp_path/'env', ROOT=tmp_path, REPO=tmp_path/'repo', HOSTS='10.0.0.1', ADDRESS='10.0.0.1', DATA='digits', STALL_MINUTES=60, END=f'touch {tmp_path}/ended')
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'python3').write_text('#!/bin/sh\nexit 4\n')
    (tmp_path/'bin'/'python3').chmod(0o755)
    result = subprocess.run(['bash', SCRIPTS/'train.sh', env_file], capture_output=True, text=True, env=os.environ | dict(PATH=f"{tmp_path}/bin:{os.environ['PATH']}"))
    assert result.returncode == 4 and 'No such file' not in result.stdout
    assert not (tmp_path/'ended').exists()


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
    watch = subprocess.run(['bash', SCRIPTS/'spot.sh', tmp_path/'train.pid'], env=os.environ | {'IMDS': f'http://127.0.0.1:{server.server_port}', 'PERIOD': '.1'}, timeout=60)
    server.shutdown()
    assert (watch.returncode, Imds.questions, training.wait(10)) == (0, 3, -signal.SIGTERM)
