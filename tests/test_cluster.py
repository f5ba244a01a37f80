"Training on several processes and hosts, through what may happen to them: real processes, hosts are network namespaces."
import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import torch
from kill_loop import kill_family
from namespaces import open_hosts

from yolov9001.data.dataset import make_digits
from yolov9001.train import Trainer
from yolov9001.training.checkpoint import load_model, progress
from yolov9001.training.cluster import Plan
from yolov9001.training.config import RunConfig, TrainConfig, make_config
from yolov9001.workbook import _finetune_on, calibrated_twin, load_data, train_stage

PROGRAM = Path(sys.executable).with_name('yolov9001')
TINY = dict(input_size='64', batch_size=8, device='cpu', precision='float32', evaluate_every=100, sync_batchnorm='no', mosaic=0)

EPOCHS = 25  # of the training that loses a host
HOSTS = dict(one='10.99.0.11', two='10.99.0.12')


def words(data, out, *more, **settings):
    "The command line of a tiny training"
    settings = [word for name, value in (TINY | settings).items() for word in ('-p', f'{name}={value}')]
    return [str(word) for word in (PROGRAM, 'train', '--data', data, '--out', out, *settings, *more)]


def wait_for(condition, seconds=400):
    "Wait until something is so; fail if it never is"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.2)


@pytest.fixture(scope='module')
def digits(tmp_path_factory): return make_digits(tmp_path_factory.mktemp('digits')/'digits', train=20, val=4)


@pytest.fixture
def start():
    "Starts commands; what still runs at the end is killed"
    started = []
    def begin(command, log):
        with open(log, 'ab') as file: started.append(subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {'OMP_NUM_THREADS': '1'}))
        return started[-1]
    yield begin
    for process in started:
        if process.poll() is None: kill_family(process)


def trainers(process):
    "The processes that train under a launcher"
    found = [child for child in psutil.Process(process.pid).children(recursive=True) if '--resume' in child.cmdline() and '-m' not in child.cmdline()]
    return [child for child in found if child.ppid() not in {other.pid for other in found}]     # without the workers of their loaders


def asked_to_end(process):
    "Whether SIGTERM waits for a process that is suspended"
    return int(re.search(r'ShdPnd:\s*(\w+)', Path(f'/proc/{process.pid}/status').read_text())[1], 16) >> (signal.SIGTERM - 1) & 1


def test_two_devices_of_one_host(digits, tmp_path, start):
    "One command, two processes, one writer; a last small batch that not all have a part in"
    log = tmp_path/'log'
    assert start(words(digits, tmp_path/'run', '--devices', '2', epochs=2, batch_size=19), log).wait() == 0, log.read_text()
    output = log.read_text()
    assert len(pd.read_csv(tmp_path/'run'/'history.csv')) == 2
    assert output.count('wrote') == 1 and '[rank 0] epoch 2' in output and '[rank 1] epoch' not in output
    assert {'best.pt', 'last.pt', 'model.onnx', 'metrics.json', 'config.yaml'} <= {path.name for path in (tmp_path/'run').iterdir()}


def test_quantization_aware_training_on_two_devices(digits, tmp_path):
    "Two processes go through what one goes through: the same distance from the float model, and the twin that it ends with"
    config = make_config(RunConfig, TINY | dict(data=str(digits), out=str(tmp_path), weights='none', epochs=1, qat_epochs=2, qat_lr=1e-9))
    train_stage(config)
    model, twin = calibrated_twin(config, load_data(config)[0])
    ends, distances = [], []
    for devices in (1, 2):
        ends.append(_finetune_on(Plan(devices), config, model, copy.deepcopy(twin), False))
        distances.append(pd.read_csv(tmp_path/'qat'/'history.csv').distance)
    assert len(distances[1]) == 2 and distances[1].values == pytest.approx(distances[0].values, rel=1e-4)
    images = torch.randint(0, 256, (2, 3, 64, 64))
    with torch.no_grad(): outputs = [torch.cat([level.ravel() for level in end(images)]) for end in ends]
    assert (outputs[0] == outputs[1]).float().mean() > .99


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint(digits, tmp_path, start, number, code):
    "In the middle of an epoch; the resumed run ends with the weights of an undisturbed one"
    stopped, whole = tmp_path/'stopped', tmp_path/'whole'
    listens = ['env', '--default-signal=INT']           # a test in the background passes on that Ctrl-C is ignored
    process = start(listens + words(digits, stopped, epochs=2, save_every=1, batch_size=2), tmp_path/'log')
    wait_for(lambda: progress(stopped/'last.pt') >= (0, 1))
    process.send_signal(number)
    assert process.wait(400) == code and 'go on with --resume' in (tmp_path/'log').read_text()
    epoch, batch = progress(stopped/'last.pt')
    assert 0 < 10 * epoch + batch < 20
    for out, more in ((stopped, ['--resume']), (whole, [])):
        assert start(words(digits, out, *more, epochs=2, save_every=1, batch_size=2), tmp_path/'log').wait() == 0
    weights = [load_model(out/'last.pt')[0].state_dict() for out in (stopped, whole)]
    assert all(a.equal(b) for a, b in zip(*(w.values() for w in weights)))


def test_sigterm_to_several_processes(digits, tmp_path, start):
    "The launcher passes it on, to the loaders' workers too; all stop at the same step; resumed, a process that dies is replaced"
    out, log = tmp_path/'run', tmp_path/'log'
    begin = lambda *more: start(words(digits, out, '--devices', '2', *more, epochs=12, save_every=1, workers=1), log)
    process = begin()
    wait_for(lambda: progress(out/'last.pt') >= (0, 1))
    process.send_signal(signal.SIGTERM)
    assert process.wait(400) == 143, log.read_text()
    stopped = progress(out/'last.pt')
    assert 'last.pt is whole' in log.read_text() and stopped < (12, 0)
    process = begin('--resume')
    wait_for(lambda: progress(out/'last.pt') > stopped)
    trainers(process)[-1].kill()
    assert process.wait(400) == 0, log.read_text()
    assert pd.read_csv(out/'history.csv').epoch.tolist() == list(range(1, 13))


def test_a_refusal_ends_the_training(digits, tmp_path, start):
    "What the two processes find wrong is said once more by the launcher; nobody tries again"
    if torch.cuda.is_available(): pytest.skip('the two processes find nothing wrong: there are GPUs')
    out, log = tmp_path/'run', tmp_path/'log'
    assert start(words(digits, out, '--devices', '2', epochs=1, device='cuda'), log).wait(200) == 2
    output = log.read_text()
    assert "device 'cuda': not available" in output.splitlines()[-1] and output.count('not available') <= 3


def test_full_disk_keeps_the_checkpoint(digits, tmp_path):
    "A file that may not grow stands for a disk that is full"
    import resource
    config = TrainConfig(data=str(digits), out=str(tmp_path/'run'), epochs=1, **TINY)
    trainer = Trainer(config)
    trainer.save_state()
    before, limits = (tmp_path/'run'/'last.pt').read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Exception, match='make room'): trainer.save_state()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path/'run'/'last.pt').read_bytes() == before
    assert [path.name for path in (tmp_path/'run').iterdir() if path.name.startswith('.')] == []


@pytest.fixture
def hosts():
    with open_hosts(**HOSTS) as hosts: yield hosts


@pytest.fixture
def pair(digits, tmp_path, start, hosts):
    "A training of two hosts: `begin(i)` starts host i, `done(i)` tells its epochs, `finish` waits for both and compares what they have"
    outs, logs = [tmp_path/f'host{i}' for i in (1, 2)], [tmp_path/f'log{i}' for i in (1, 2)]
    def begin(i):
        name, address = list(HOSTS.items())[i]
        return start(hosts.words(name, words(digits, outs[i], '--hosts', ','.join(HOSTS.values()), '--address', address, '--devices', '1', epochs=EPOCHS)), logs[i])
    def finish(first, second):
        assert first.wait(400) == 0 and second.wait(400) == 0, logs[0].read_text() + logs[1].read_text()
        one, two = (load_model(out/'last.pt') for out in outs)
        assert one[1]['epoch'] == two[1]['epoch'] == EPOCHS
        assert all(a.equal(b) for a, b in zip(one[0].state_dict().values(), two[0].state_dict().values()))
        history = pd.read_csv(outs[0]/'history.csv')
        assert history.epoch.tolist() == list(range(1, EPOCHS + 1)) and history['class'].iloc[-1] < history['class'].iloc[0]
    return SimpleNamespace(begin=begin, done=lambda i: progress(outs[i]/'last.pt')[0], finish=finish)


def test_a_host_dies_and_returns(pair):
    "Two hosts train, one is killed, the other goes on, the killed one returns with its old checkpoint, both finish"
    first, second = pair.begin(0), pair.begin(1)
    wait_for(lambda: min(pair.done(0), pair.done(1)) >= 2)
    kill_family(second)
    killed = pair.done(1)
    wait_for(lambda: pair.done(0) >= killed + 3)
    assert pair.done(1) == killed
    survivor, = trainers(first)
    survivor.suspend()                                      # or it may be done before the other has started
    second = pair.begin(1)
    wait_for(lambda: asked_to_end(survivor))                # the launcher has seen the other
    survivor.resume()
    wait_for(lambda: pair.done(1) > killed)
    pair.finish(first, second)


def test_the_meeting_point_dies_and_returns(pair):
    "The first host holds the rendezvous: without it the other cannot go on, asks again, and is there when it comes back"
    first, second = pair.begin(0), pair.begin(1)
    wait_for(lambda: min(pair.done(0), pair.done(1)) >= 2)
    kill_family(first)
    time.sleep(3)
    assert second.poll() is None and pair.done(1) < EPOCHS
    pair.finish(pair.begin(0), second)
