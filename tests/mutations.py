"""Do the tests notice when the product is wrong? We break one line at a time and run only the notebook or test that ought to notice.

python tests/mutations.py [NAME ...] [--list]

Works on a copy of the repository; yours stays as it is. Each test first has to pass on the unbroken copy. Prints a line for each
mutation and exits with the number of those that nobody noticed."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@dataclass
class Mutation:
    "One line of the product made wrong"
    name:str        # what is broken
    notebook:str    # under nbs/, that holds the line
    module:str      # under yolov9001/, generated from it
    right:str       # a part of the line
    wrong:str       # what takes its place
    test:str=''     # under tests/, that ought to notice; the notebook itself if empty


RESUMED = 'test_cluster.py -k signal_writes'

MUTATIONS = [
    Mutation('assigner: IoU with the exponent of the score', 'detection/loss', 'detection/loss', 'overlap ** self.beta', 'overlap ** self.alpha'),
    Mutation('assigner: a cell goes to several of equal objects', 'detection/loss', 'detection/loss', 'kept & (objects == first[cells])', 'kept'),
    Mutation('decode: centres of cells at their corner', 'detection/loss', 'detection/loss', '.reshape(-1, 2) + .5) * stride', '.reshape(-1, 2)) * stride'),
    Mutation('NMS: boxes of different classes compete', 'detection/decode', 'detection/decode', 'scores.double(), classes, iou)', 'scores.double(), 0 * classes, iou)'),
    Mutation('folding: no epsilon', '00_blocks', 'blocks', '(bn.running_var.double() + bn.eps).sqrt()', 'bn.running_var.double().sqrt()'),
    Mutation('folding: the bias is not scaled', '00_blocks', 'blocks', 'bn.bias + (bias - bn.running_mean) * scale', 'bn.bias + bias - bn.running_mean * scale'),
    Mutation('codes: zero point cut off, not rounded', 'int8/twin', 'int8/twin', 'round(-128 - low / self.scale.item())', 'int(-128 - low / self.scale.item())'),
    Mutation('codes: biases rounded down', 'int8/twin', 'int8/twin', '(bias / step).round().detach()', '(bias / step).floor().detach()'),
    Mutation('ONNX: zero point of uint8 off by one', 'int8/onnx', 'int8/onnx', '(128 if self.runtime.codes is np.uint8 else 0)', '(127 if self.runtime.codes is np.uint8 else 0)'),
    Mutation('resume: the average begins again', '02_train', 'train', "self.ema.updates = state['updates']", 'self.ema.updates = 0', RESUMED),
    Mutation('resume: the optimizer begins again', '02_train', 'train', "load_weights(self.optimizer, state['optimizer'], path)", "state['optimizer']", RESUMED),
    Mutation('schedule: the last step is not the lowest', 'training/optimize', 'training/optimize', 'max(1, steps - 1 - warmup)', 'max(1, steps - warmup)'),
    Mutation('letterbox: one pixel off where it does not divide', 'data/dataset', 'data/dataset', 'top = (size[0] - new_height)//2', 'top = (size[0] - new_height + 1)//2'),
    Mutation('augmentation: boxes flipped along the other axis', 'data/augment', 'data/augment', 'first = 1 + (axis == 0)', 'first = 1 + (axis == 1)'),
    Mutation('lock: two strangers share a folder', 'plumbing/core', 'core', 'fcntl.LOCK_SH if shared else fcntl.LOCK_EX', 'fcntl.LOCK_SH'),
]


def copy_repository(folder):
    "The files that git knows, and ../shared beside them"
    names = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split('\0')):
        if not (ROOT/name).is_file(): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, folder/name)
    shared = ROOT.parent/'shared'
    if shared.exists() and not (folder.parent/'shared').exists(): (folder.parent/'shared').symlink_to(shared.resolve())


def break_line(mutation, folder):
    "Make the line wrong in the notebook and in its module"
    file = folder/'nbs'/f'{mutation.notebook}.ipynb'
    book = json.loads(file.read_text())
    changed = 0
    for cell in book['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or '| export' not in source.partition('\n')[0] or mutation.right not in source: continue
        cell['source'] = source.replace(mutation.right, mutation.wrong).splitlines(keepends=True)
        changed += 1
    module = folder/'yolov9001'/f'{mutation.module}.py'
    text = module.read_text()
    assert changed == text.count(mutation.right) == 1, f'{mutation.name}: the line has changed; write the mutation again'
    file.write_text(json.dumps(book))
    module.write_text(text.replace(mutation.right, mutation.wrong))


def words(mutation, folder):
    "The command of the one notebook or test that ought to notice"
    if mutation.test: return [sys.executable, '-m', 'pytest', '-q', '-x', *mutation.test.split(maxsplit=2)], folder/'tests'
    notebook = folder/'nbs'/f'{mutation.notebook}.ipynb'
    return [str(BIN/'nbdev_test'), '--path', notebook.name, '--n_workers', '0'], notebook.parent


def fails(mutation, broken=True):
    "Whether the test fails on a copy, with the line broken or as it is"
    with TemporaryDirectory(prefix='mutation_') as scratch:
        folder = Path(scratch)/'repository'
        folder.mkdir()
        copy_repository(folder)
        if broken: break_line(mutation, folder)
        command, place = words(mutation, folder)
        environment = os.environ | dict(PYTHONPATH=str(folder), PATH=f"{BIN}:{os.environ['PATH']}", OMP_NUM_THREADS='1')
        return subprocess.run(command, cwd=place, env=environment, capture_output=True).returncode != 0


def main():
    "Try all mutations, or those whose names begin with the words given"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='beginnings of names; all if none is given')
    parser.add_argument('--list', action='store_true', help='only print the names')
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.names or m.name.startswith(tuple(options.names))]
    missed = 0
    whole = {}      # test -> whether it passes on the unbroken product: a test that fails anyway notices nothing
    for mutation in chosen:
        if options.list:
            print(mutation.name)
            continue
        began = time.monotonic()
        who = mutation.test or f'nbs/{mutation.notebook}.ipynb'
        if who not in whole: whole[who] = not fails(mutation, broken=False)
        if not whole[who]: print(f'{who} fails on the unbroken product', flush=True)
        noticed = whole[who] and fails(mutation)
        missed += not noticed
        print(f"{'noticed' if noticed else 'MISSED ':7}  {mutation.name}  ({who}, {time.monotonic() - began:.0f} s)", flush=True)
    return missed


if __name__ == '__main__': sys.exit(main())
