"What may happen to a run from outside: signals, a second process, a full disk, damaged files, a folder that goes away"
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from yolov9001.core import InputError, ScratchFolder, lock_run
from yolov9001.data.dataset import make_digits
from yolov9001.data.formats import load_split
from yolov9001.report import write_report
from yolov9001.research.compare import Budget, check_model, compare
from yolov9001.rk3588_bench import toolkit_version
from yolov9001.train import train
from yolov9001.training.checkpoint import progress
from yolov9001.training.config import TrainConfig
from yolov9001.workbook import RunConfig, quantize_stage, run_notebook, train_stage

from kill_loop import kill_family, kill_loop
from test_cluster import wait_for
from test_data_runs import command, refused

PROGRAM = Path(sys.executable).with_name('yolov9001')
TINY = dict(input_size='64', batch_size=4, device='cpu', weights='none', qat_epochs=0, calibration_images=4)
needs_toolkit = pytest.mark.skipif(toolkit_version() is None, reason='rknn-toolkit2 is not installed')
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason='only root can mount a small disk')


@pytest.fixture(scope='module')
def digits(tmp_path_factory): return make_digits(tmp_path_factory.mktemp('digits')/'digits', train=8, val=4)


@pytest.fixture(scope='module')
def finished(digits, tmp_path_factory):
    "A run of one epoch, quantized where the toolkit is installed"
    config = RunConfig(data=str(digits), out=str(tmp_path_factory.mktemp('finished')/'run'), epochs=1, **TINY)
    train_stage(config)
    if toolkit_version(): quantize_stage(config)
    return config


@pytest.fixture
def run(finished, tmp_path):
    "A copy of the finished run, to damage"
    return Path(shutil.copytree(finished.out, tmp_path/'run'))


@pytest.fixture
def start(tmp_path):
    "Starts commands, whose stderr is kept; what still runs at the end is killed"
    started = []
    def begin(*words):
        log = tmp_path/f'log{len(started)}'
        words = ['env', '--default-signal=INT,HUP', *map(str, words)]       # a test in the background ignores Ctrl-C
        with open(log, 'w') as file: started.append(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=file))
        return started[-1], log
    yield begin
    for process in started:
        if process.poll() is None: kill_family(process)


def knobs(**settings): return [word for name, value in (TINY | settings).items() for word in ('-p', f'{name}={value}')]


def contents(folder): return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob('*') if path.is_file()}


def kernel_of(process):
    "The kernel that a command runs its notebook in"
    return next((child for child in psutil.Process(process.pid).children() if 'ipykernel_launcher' in child.cmdline()), None)


# ---- signals and deaths

@needs_toolkit
def test_a_run_is_killed_terminated_and_interrupted(digits, tmp_path, start):
    "Each time it says why in one line, exits with the shell's code, and goes on from its checkpoint"
    words = [PROGRAM, 'run', '--data', digits, '--out', tmp_path/'run', *knobs(epochs=2000, save_every=1, evaluate_every=2000)]
    def kill(process): kernel_of(process).kill()
    def terminate(process): process.send_signal(signal.SIGTERM)
    def interrupt(process): process.send_signal(signal.SIGINT)
    ways = [(kill, 2, f'{tmp_path}/run: the process of train was killed, most likely for want of memory'),
            (terminate, 143, 'yolov9001: stopped; go on with --resume'), (interrupt, 130, 'yolov9001: stopped; go on with --resume')]
    for way, code, line in ways:
        before = progress(tmp_path/'run'/'last.pt')
        process, log = start(*words, '--resume')
        wait_for(lambda: progress(tmp_path/'run'/'last.pt') > before, 100)
        way(process)
        assert process.wait(60) == code, log.read_text()
        text = log.read_text()
        assert line in text.strip().splitlines()[-1]
        for word in ('Traceback', 'zmq', 'ZMQ', 'WARNING'): assert word not in text, text
        assert progress(tmp_path/'run'/'last.pt') > before
        json.loads((tmp_path/'run'/'train.ipynb').read_text())


def test_a_folder_takes_one_training_and_sigterm_ends_the_chain(digits, tmp_path, start):
    "The second hears who is there and loses nothing; after SIGTERM `train && quantize` does not quantize"
    out = tmp_path/'run'
    words = ['train', '--data', digits, '--out', out, *knobs(epochs=2000, save_every=1, evaluate_every=2000)]
    chain = ' '.join(map(str, [PROGRAM, *words])) + f' && touch {tmp_path}/went_on'
    process, log = start('sh', '-c', chain)
    wait_for(lambda: progress(out/'last.pt') >= (0, 1), 100)
    trainer = psutil.Process(process.pid).children()[0]
    for more in ('--resume', '--overwrite'): refused(command(*words, more), f'process {trainer.pid} on', 'choose another --out')
    trainer.terminate()
    assert process.wait(60) == 143 and not (tmp_path/'went_on').exists(), log.read_text()
    assert progress(out/'last.pt') >= (0, 1) and not (out/'.lock').exists()


@pytest.mark.parametrize('number', (signal.SIGTERM, signal.SIGHUP), ids=('SIGTERM', 'SIGHUP'))
def test_a_signal_ends_with_a_line_and_a_checkpoint(digits, tmp_path, start, number):
    process, log = start(PROGRAM, 'train', '--data', digits, '--out', tmp_path/'run', *knobs(epochs=2000, save_every=1))
    wait_for(lambda: progress(tmp_path/'run'/'last.pt') >= (0, 1), 100)
    process.send_signal(number)
    assert process.wait(60) == 128 + number and 'yolov9001: stopped; go on with --resume' in log.read_text().splitlines()[-1]
    assert progress(tmp_path/'run'/'last.pt') >= (0, 1) and not (tmp_path/'run'/'.lock').exists()


SLOW = '''
import sys, time
import yolov9001.training.launch as launch
from yolov9001.cli import main
import yolov9001.workbook as workbook
def load_split(*_):
    print('reads', file=sys.stderr, flush=True)
    time.sleep(100)
launch.load_split = load_split
sys.exit(main())
'''


@pytest.mark.parametrize('number', (signal.SIGTERM, signal.SIGHUP), ids=('SIGTERM', 'SIGHUP'))
def test_a_signal_before_the_training_ends_with_a_line(digits, tmp_path, start, number):
    "While it reads the data, which takes minutes for a large set"
    process, log = start(sys.executable, '-c', SLOW, 'train', '--data', digits, '--out', tmp_path/'run', *knobs(epochs=2))
    wait_for(lambda: 'reads' in log.read_text(), 60)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert log.read_text().splitlines()[-1] == 'yolov9001: stopped; go on with --resume'
    assert not (tmp_path/'run').exists()


def test_a_terminal_that_is_closed_ends_with_a_checkpoint(digits, tmp_path):
    "Nobody can write to it any more, and nothing may fail because of that"
    words = [PROGRAM, 'train', '--data', digits, '--out', tmp_path/'run', *knobs(epochs=2000, save_every=1)]
    ours, its = os.openpty()
    def claim(): fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    words = ['env', '--default-signal=HUP', *map(str, words)]
    process = subprocess.Popen(words, stdin=its, stdout=its, stderr=its, start_new_session=True, preexec_fn=claim)
    os.close(its)
    os.set_blocking(ours, False)
    def has_begun():
        with suppress(BlockingIOError): os.read(ours, 10**6)        # else the terminal is full
        return progress(tmp_path/'run'/'last.pt') >= (1, 0)
    try:
        wait_for(has_begun, 100)
        before = progress(tmp_path/'run'/'last.pt')
        os.close(ours)                                              # the system sends SIGHUP
        assert process.wait(60) == 128 + signal.SIGHUP and progress(tmp_path/'run'/'last.pt') >= before
    finally:
        if process.poll() is None: kill_family(process)


@needs_toolkit
def test_a_killed_quantization_loses_nothing(finished, run, digits, start):
    "The files of the quantization before are all there, and the next one removes what the killed one left"
    before = contents(run)
    process, log = start(PROGRAM, 'quantize', run, '-p', 'calibration=minmax')
    wait_for(lambda: any(run.glob('.int8_*/model_int8.onnx')), 100)
    kill_family(process)
    assert {name: before[name] for name in before} == {name: time for name, time in contents(run).items() if not name.startswith('.')}, log.read_text()
    with ScratchFolder('.int8_', run) as ours: assert [path.name for path in run.glob('.int8_*')] == [Path(ours).name]


@needs_toolkit
def test_a_refused_quantization_loses_nothing(run):
    before = contents(run)
    refused(command('quantize', run, '-p', 'target=rk1'), 'rk1')
    refused(command('quantize', run, '--data', '/nowhere'), '/nowhere')
    assert contents(run) == before


@needs_toolkit
def test_the_compilers_files_are_removed_after_a_kill(tmp_path):
    script = "import os; from yolov9001.rk3588_bench import Npu; npu = Npu(); os.kill(os.getpid(), 9)"
    environment = os.environ | dict(TMPDIR=str(tmp_path))
    subprocess.run([sys.executable, '-c', script], env=environment)
    assert len([*tmp_path.glob('npu_*')]) == 1
    subprocess.run([sys.executable, '-c', 'from yolov9001.rk3588_bench import Npu; Npu().close()'], env=environment, check=True)
    assert [*tmp_path.glob('npu_*')] == []


@needs_toolkit
@pytest.mark.slow
def test_killed_runs_end_as_an_undisturbed_one(tmp_path):
    "A few kills at random moments; many of them: python tests/kill_loop.py --kills 50"
    kill_loop(3, tmp_path)


# ---- the folder and its files

def test_a_folder_that_is_deleted_while_it_trains_fails(digits, tmp_path):
    config = TrainConfig(data=str(digits), out=str(tmp_path/'run'), input_size='64', batch_size=4, device='cpu', weights='none', epochs=3)
    with pytest.raises(InputError, match='was deleted while we worked in it'): train(config, on_epoch=lambda trainer: shutil.rmtree(trainer.out))


WRITTEN_BY_TRAINING = 'metrics.json', 'history.csv', 'evaluation_fp32.json'
WRITTEN_BY_QUANTIZING = 'evaluation_int8_ptq.json', 'layers.csv', 'fidelity.csv', 'code_differences.csv'


@needs_toolkit
@pytest.mark.parametrize('content', [b'', b'\0\0\0', b'{"images_v', b'[]'], ids=('empty', 'zeros', 'torn', 'other'))
@pytest.mark.parametrize('name', WRITTEN_BY_TRAINING + WRITTEN_BY_QUANTIZING)
def test_a_damaged_file_is_named(run, digits, name, content):
    "By the report, which reads them all"
    (run/name).write_bytes(content)
    with pytest.raises(InputError, match=name): write_report(run, load_split(digits, 'val'))


def test_a_damaged_file_does_not_stop_the_run_for_good(run):
    "Every command that adds numbers names the file, and when it is deleted, --resume makes it again"
    for name in WRITTEN_BY_TRAINING: (run/name).write_bytes(b'')
    refused(command('train', '--out', run, '--resume'), f'{run}/metrics.json: empty or damaged', 'delete it', '--resume')
    for name in WRITTEN_BY_TRAINING: (run/name).unlink()
    assert command('train', '--out', run, '--resume').returncode == 0
    assert all((run/name).stat().st_size for name in WRITTEN_BY_TRAINING)


def test_a_best_that_is_gone_is_made_again(run, digits):
    "From the last one, with a warning; until then every command names that way"
    before = json.loads((run/'metrics.json').read_text())['map_fp32']
    (run/'best.pt').unlink()
    remedy = f'{run}/best.pt: missing; yolov9001 train --out {run} --resume makes it again'
    refused(command('val', run, '--data', digits), remedy)
    done = command('train', '--out', run, '--resume')
    assert done.returncode == 0 and f'{run}/best.pt: missing; written again from last.pt' in done.stderr, done.stderr
    assert json.loads((run/'metrics.json').read_text())['map_fp32'] == before      # of one epoch, which is the best
    assert command('val', run, '--data', digits).returncode == 0


def test_a_remedy_names_no_file_that_is_gone(run):
    for name in ('best.pt', 'last.pt'): (run/name).write_bytes(b'')
    (run/'best.pt').unlink()
    done = command('train', '--out', run, '--resume')
    refused(done, f'{run}/last.pt', 'train again with --overwrite')
    assert 'best.pt' not in done.stderr.replace('give the best.pt', ''), done.stderr


def test_a_damaged_checkpoint_names_the_way_on(run):
    whole = (run/'last.pt').read_bytes()
    for content in (b'', whole[:len(whole)//2]):
        (run/'last.pt').write_bytes(content)
        refused(command('train', '--out', run, '--resume'), f'{run}/last.pt', f'-p weights={run}/best.pt')


# ---- full disks

@contextmanager
def small_disk(folder, size, free=None):
    "A disk of some bytes, filled but for `free` of them"
    folder.mkdir(exist_ok=True)
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True).returncode:
        pytest.skip('no small disk can be mounted here')
    try:
        if free is not None: (folder/'filler').write_bytes(bytes(shutil.disk_usage(folder).free - free))
        yield folder
    finally: subprocess.run(['umount', '-l', folder], check=True)


@needs_root
def test_training_on_a_full_disk_is_one_line(digits, tmp_path):
    with small_disk(tmp_path/'disk', '8m') as disk:
        refused(command('train', '--data', digits, '--out', disk/'run', *knobs(epochs=1)), f'{disk}/run/', 'make room')
        assert not (disk/'run'/'last.pt').exists()


@needs_root
def test_a_notebook_on_a_full_disk_stays_whole(run, tmp_path):
    with small_disk(tmp_path/'disk', '1m') as disk:
        (disk/'bench.ipynb').write_text('{"cells": "of before"}')
        (disk/'filler').write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(InputError, match='make room'): run_notebook('bench', disk, dict(out=str(run)))
        assert (disk/'bench.ipynb').read_text() == '{"cells": "of before"}'


@needs_root
@needs_toolkit
def test_a_full_disk_of_temporary_files_is_not_the_models_fault(run, tmp_path):
    with small_disk(tmp_path/'disk', '2m', free=200_000) as disk:
        done = subprocess.run([PROGRAM, 'bench', run/'model.onnx'], env=os.environ | dict(TMPDIR=str(disk)), capture_output=True, text=True)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and 'the disk is full' in line and str(disk) in line and 'change the model' not in line, done.stderr


# ---- comparisons

@needs_toolkit
@pytest.mark.parametrize('function', ['../x:f', 'os:getcwd', 'os:environ', 'builtins:len', 'nothing'])
def test_a_wrong_decode_function_is_one_line_and_binds_nothing(run, digits, tmp_path, function):
    "What is no function of the outputs is found before anything is written"
    done = command('compare', '--data', digits, '--models', f'{run}/model.onnx={function}', '--input-size', 64, '--out', tmp_path/'out')
    refused(done, 'decode function')
    assert not (tmp_path/'out').exists()


@needs_toolkit
def test_a_failed_comparison_does_not_bind_the_folder(digits, tmp_path):
    "Nothing was trained, so another budget may follow"
    bad = 'np+lr=1e30'
    with pytest.raises(InputError): compare([bad], [0], Budget(str(digits), 64, 1, 4, 'val', 4), tmp_path/'out')
    assert not (tmp_path/'out'/'budget.json').exists()


@needs_toolkit
def test_a_damaged_row_names_the_way_on(digits, tmp_path):
    for name in ('np-0/val.json', 'budget.json'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text('{"model": ')
        done = command('compare', '--data', digits, '--models', 'ours', '--input-size', 64, '--out', tmp_path)
        refused(done, f'{tmp_path}/{name}: empty or damaged', 'delete it')
        (tmp_path/name).unlink()
