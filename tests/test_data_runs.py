"What a user's data do to a run: from end to end in five layouts, resumed, looked at, detected"
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO

from yolov9001.cli import main

from test_layouts import write, write_images, write_layout

KNOBS = [word for value in ('weights=none', 'input_size=64', 'epochs=2', 'batch_size=4', 'device=cpu', 'evaluate_every=1') for word in ('-p', value)]


def command(*words, **environment):
    "A command within this process, so that PyTorch is imported once"
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ, environment): code = main([*map(str, words)])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def refused(result, *texts):
    "Exit code 2, and the last line says why; warnings of the data may stand above it"
    assert result.returncode == 2, result.stderr
    for text in texts: assert text in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize('name', ('COCO', 'YOLO without YAML', 'VOC XML', 'LabelMe', 'CSV'))
def test_two_epochs_from_end_to_end(tmp_path, name):
    write_layout(name, tmp_path/'pets')
    done = command('train', '--data', tmp_path/'pets', '--out', tmp_path/'run', *KNOBS)
    assert done.returncode == 0, done.stderr
    assert 'no val split: about 15 % of the images' in done.stderr
    recorded = json.loads((tmp_path/'run'/'data.json').read_text())
    assert (recorded['val']['layout'], len(recorded['train']['files']) + len(recorded['val']['files'])) == (name, 10)
    assert 'by a hash of their file names' in recorded['val']['rule']
    assert command('val', tmp_path/'run', '--data', tmp_path/'pets').returncode == 0


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run of two epochs on a folder of LabelImg"
    folder = tmp_path_factory.mktemp('trained')
    write_layout('VOC XML', folder/'pets')
    done = command('train', '--data', folder/'pets', '--out', folder/'run', *KNOBS)
    assert done.returncode == 0, done.stderr
    return folder


def test_finished_run_names_the_way_on(trained):
    refused(command('train', '--out', trained/'run', '--resume', '-p', 'epochs=4'), 'epochs=2, now 4', f"-p weights={trained}/run/best.pt")


def test_data_that_changed_are_refused(trained, tmp_path):
    for part in ('pets', 'run'): shutil.copytree(trained/part, tmp_path/part)
    config = yaml.safe_load((tmp_path/'run'/'config.yaml').read_text()) | dict(data=str(tmp_path/'pets'))
    (tmp_path/'run'/'config.yaml').write_text(yaml.safe_dump(config))
    last = torch.load(tmp_path/'run'/'last.pt')
    last['state']['config']['data'] = str(tmp_path/'pets')
    torch.save(last, tmp_path/'run'/'last.pt')
    assert command('train', '--out', tmp_path/'run', '--resume').returncode == 0
    (tmp_path/'pets'/'images'/'p1.png').unlink()
    gone = command('train', '--out', tmp_path/'run', '--resume')
    assert gone.returncode == 2
    line = gone.stderr.strip().splitlines()[-1]
    assert 'images with' in line and ' now ' in line and f"-p weights={tmp_path}/run/best.pt" in line


def test_rank_left_over_from_a_shell(trained, tmp_path):
    result = command('train', '--data', trained/'pets', '--out', tmp_path/'run', *KNOBS, RANK='1')
    assert result.returncode == 2 and 'RANK=1: set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT; unset RANK' in result.stderr
    assert not (tmp_path/'run'/'config.yaml').exists()


@pytest.mark.parametrize('name, text', (('out', '2024_11'), ('data', '007')))
def test_number_that_papermill_made(tmp_path, name, text):
    notebook = Path(__file__).resolve().parents[1]/'nbs'/'pipelines'/'train.ipynb'
    words = [Path(sys.executable).parent/'papermill', notebook, tmp_path/'out.ipynb', '-p', name, text, '--cwd', tmp_path, '-k', 'python3']
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode and f'papermill -r {name} keeps the text' in result.stderr + result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ['out.ipynb']


def test_kernel_of_another_python(tmp_path):
    write(tmp_path/'kernels'/'python3'/'kernel.json', dict(argv=['/nowhere/python', '-f', '{connection_file}'], display_name='other', language='python'))
    script = ("from yolov9001.workbook import run_notebook\nfrom yolov9001.core import InputError\n"
        f"try: run_notebook('train', {str(tmp_path/'run')!r}, dict(data='/nowhere'))\nexcept InputError as error: print('refused', error)")
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=os.environ | dict(JUPYTER_PATH=str(tmp_path)))
    assert 'refused /nowhere' in done.stdout, done.stderr[-2000:]


# ---- detect

def odd_files(folder):
    "Files that break readers"
    names = write_images(folder, 3)
    (folder/'empty.jpg').touch()
    (folder/'text.png').write_text('a web page')
    whole = cv2.imencode('.jpg', np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))[1].tobytes()
    (folder/'half.jpg').write_bytes(whole[:len(whole)//2])
    cv2.imwrite(str(folder/'deep.png'), np.full((48, 64), 4000, np.uint16))
    (folder/'folder.jpg').mkdir()
    cv2.imwrite(str(folder/'dot.png'), np.zeros((1, 1, 3), np.uint8))
    cv2.imwrite(str(folder/'strip.png'), np.zeros((2, 3000, 3), np.uint8))
    Image.new('P', (64, 48), 3).save(folder/'moving.gif', save_all=True, append_images=[Image.new('P', (64, 48), 5)])
    return names


def test_detect_never_dies_of_one_bad_file(trained, tmp_path):
    odd_files(tmp_path/'images')
    done = command('detect', trained/'run'/'best.pt', tmp_path/'images', '--out', tmp_path/'out', '--confidence', 0)
    assert done.returncode == 0 and 'drew 6 images' in done.stdout, done.stderr
    for name in ('empty.jpg', 'text.png', 'half.jpg', 'deep.png'): assert f'{name}: ' in done.stderr
    assert {'p0.png', 'dot.png', 'strip.png', 'moving.gif.jpg'} <= {path.name for path in (tmp_path/'out').iterdir()}


def test_detect_on_several_sources(trained, tmp_path):
    for folder in ('one', 'two'): write_images(tmp_path/folder, 2)
    sources = [*sorted((tmp_path/'one').glob('*.png')), tmp_path/'two', tmp_path/'nowhere.jpg']        # as the shell writes *.png
    done = command('detect', trained/'run'/'best.pt', *sources, '--out', tmp_path/'out', '--confidence', 0, '--save-crops')
    assert done.returncode == 0 and 'drew 4 images' in done.stdout and 'nowhere.jpg: no such file' in done.stderr, done.stderr
    assert {'p0.png', 'p1.png', 'two_p0.png', 'two_p1.png'} <= {path.name for path in (tmp_path/'out').iterdir()}
    assert (tmp_path/'out'/'labels'/'two_p0.txt').exists() and any((tmp_path/'out'/'crops'/'cat').iterdir())


def test_results_that_other_tools_read(trained, tmp_path):
    write_images(tmp_path/'images', 3)
    assert command('detect', trained/'run'/'best.pt', tmp_path/'images', '--out', tmp_path/'out', '--confidence', 0).returncode == 0
    truth = COCO()
    truth.dataset = dict(images=[dict(id=i) for i in (1, 2, 3)], annotations=[], categories=[dict(id=1, name='cat')])
    truth.createIndex()
    results = truth.loadRes(str(tmp_path/'out'/'detections.json'))
    lines = (tmp_path/'out'/'labels'/'p0.txt').read_text().splitlines()
    assert len(results.getAnnIds(imgIds=[1])) == len(lines) and {len(line.split()) for line in lines} == {6}


# ---- data

def test_data_command(tmp_path):
    write_layout('VOC XML', tmp_path/'pets')
    done = command('data', tmp_path/'pets', '--out', tmp_path/'look', '--convert', tmp_path/'coco')
    assert done.returncode == 0 and 'data.html' in done.stdout, done.stderr
    page = (tmp_path/'look'/'data.html').read_text()
    assert 'http' not in page and page.count('<figure>') == 8 and 'VOC XML' in page and 'Training takes about' in page
    again = command('data', tmp_path/'coco', '--out', tmp_path/'again')
    assert again.returncode == 0 and 'no val split' not in again.stderr
    refused(command('data', tmp_path/'pets', '--convert', tmp_path/'coco', '--out', tmp_path/'x'), 'is not empty')


def test_data_command_refuses_in_a_line(tmp_path):
    write_images(tmp_path/'pets', 2)
    refused(command('data', tmp_path/'pets'), 'found no labels beside 2 images', 'label the images')


# ---- a job of the size of COCO

def test_a_large_job_in_one_word(tmp_path):
    photographs = Path(__file__).resolve().parents[2]/'shared'/'data'/'coco_open'
    if not photographs.exists(): pytest.skip(f'{photographs}: not there')
    quick = [word for value in ('input_size=64', 'epochs=1', 'device=cpu') for word in ('-p', value)]
    done = command('train', '--data', photographs, '--out', tmp_path/'run', '--config', 'coco', *quick)
    assert done.returncode == 0, done.stderr
    said = yaml.safe_load((tmp_path/'run'/'config.yaml').read_text())
    assert (said['batch_size'], said['weights'], said['input_size']) == (256, 'none', '64')
    assert 0 <= json.loads((tmp_path/'run'/'metrics.json').read_text())['map_fp32'] <= 100
