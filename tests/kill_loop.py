"""Kill a run at random moments until it is done, again and again: its results must equal those of an undisturbed one, bit for bit.

python tests/kill_loop.py --kills 50 [--seed 0] [--folder FOLDER]

Each time `yolov9001 run` and all processes that it started get SIGKILL, as if the machine lost power, and then it goes on with
--resume. A run is killed a few times before it is let through; its weights, INT8 model, metrics and tables are compared with the
first run's, which nobody killed. Exits 0 if all are equal."""
import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from yolov9001.data.dataset import make_digits
from yolov9001.weights import read_checkpoint

PROGRAM = Path(sys.executable).with_name('yolov9001')
KNOBS = dict(input_size='64', epochs=2, batch_size=4, device='cpu', weights='none', save_every=1, evaluate_every=1, calibration_images=4, qat_epochs=1)
KILLS_A_RUN = 10
FILES = 'layers.csv', 'fidelity.csv', 'weight_ranges.csv', 'code_differences.csv', 'model.onnx', 'model_int8.onnx'
MEASURED = 'train_seconds', 'train_images_per_s'        # by the clock, which no resume repeats


def start(data, out):
    "Begin a run, or go on with it"
    words = [PROGRAM, 'run', '--data', data, '--out', out, '--resume']
    words += [word for name, value in KNOBS.items() for word in ('-p', f'{name}={value}')]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_family(process):
    "SIGKILL a process and all that it started, at once"
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family: member.suspend()
    for member in family: member.kill()
    process.wait()
    psutil.wait_procs(family, 20)


def finish(data, out):
    "Let a run come to its end; the seconds that it took"
    began = time.monotonic()
    process = start(data, out)
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    return time.monotonic() - began


def weights(path, format='yolov9001'): return read_checkpoint(path, format)['weights']


def differences(out, whole):
    "What of a run differs from another"
    found = [name for name in FILES if (out/name).read_bytes() != (whole/name).read_bytes()]
    for name, format in (('best.pt', 'yolov9001'), ('last.pt', 'yolov9001'), ('int8.pt', 'yolov9001-int8')):
        ours, theirs = weights(out/name, format), weights(whole/name, format)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours): found.append(name)
    ours, theirs = (json.loads((folder/'metrics.json').read_text()) for folder in (out, whole))
    found += [f'metrics.json: {key}' for key in ours.keys() | theirs.keys() if key not in MEASURED and ours.get(key) != theirs.get(key)]
    for file in (*(f'evaluation_{name}.json' for name in ('fp32', 'int8_ptq', 'int8_qat')), 'model.rknn.json'):
        ours, theirs = (json.loads((folder/file).read_text()) for folder in (out, whole))
        for card in (ours, theirs): card.pop('rknn_sha256', None)      # the compiler's file differs from one compilation to the next
        if ours != theirs: found.append(file)
    return found


def debris(out):
    "What a killed process left and the next should have removed"
    return [path.name for path in out.iterdir() if path.name.startswith(('.writing-', '.int8_'))]


def say(text): print(text, flush=True)


def kill_loop(kills, folder, seed=0):
    "Kill runs so many times; raises `AssertionError` where one of them ends otherwise than the undisturbed one"
    chance = random.Random(seed)
    data = make_digits(folder/'digits', train=8, val=4)
    if not (folder/'seconds').exists(): (folder/'seconds').write_text(str(finish(data, folder/'whole')))
    seconds = float((folder/'seconds').read_text())
    say(f'undisturbed: {seconds:.0f} s')
    done = number = 0
    while done < kills:
        number += 1
        out = folder/f'run{number}'
        shutil.rmtree(out, ignore_errors=True)      # of an earlier call
        for _ in range(min(KILLS_A_RUN, kills - done)):
            process = start(data, out)
            try: process.wait(chance.uniform(0, seconds))
            except subprocess.TimeoutExpired: kill_family(process)
            done += 1
        say(f'{done} kills; run {number} goes on to its end')
        finish(data, out)
        assert not differences(out, folder/'whole'), f'run {number}: {differences(out, folder/"whole")} differ'
        assert not debris(out), f'run {number}: {debris(out)} left behind'
        shutil.rmtree(out)
    say(f'{done} kills in {number} runs: all results equal, bit for bit')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50, help='how often a run is killed')
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument('--folder', help='for the runs; kept, and the undisturbed run in it is taken the next time')
    words = parser.parse_args()
    with TemporaryDirectory(prefix='kill_loop_') as scratch:
        kill_loop(words.kills, Path(words.folder or scratch), words.seed)
