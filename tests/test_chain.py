"The whole chain as a user starts it: commands, papermill notebooks, files, report."
import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import torch

from yolov9001.cli import COMMANDS, describe_knobs
from yolov9001.core import project_folder
from yolov9001.data.dataset import make_digits, parse_size, sample_images
from yolov9001.data.formats import load_split
from yolov9001.rk3588_bench import toolkit_version
from yolov9001.training.config import RunConfig, read_config
from yolov9001.workbook import load_predictor

METRICS = {'map_fp32', 'map50_fp32', 'map_int8_ptq', 'map_int8_qat', 'images_val', 'params_deploy', 'gmacs_deploy', 'input_size', 'npu_layers',
           'cpu_layers', 'float_layers', 'npu_cycles', 'traffic_bytes', 'estimated_ms', 'rknn_bytes', 'train_images_per_s', 'train_seconds', 'seed'}
FILES = {'config.yaml', 'metrics.json', 'last.pt', 'best.pt', 'history.csv', 'model.onnx', 'model_int8.onnx', 'model.rknn', 'model.rknn.json', 'layers.csv',
         'train.ipynb', 'quantize.ipynb', 'bench.ipynb', 'report.html'}


def command(*words): return subprocess.run([Path(sys.executable).parent/'yolov9001', *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope='module')
def chain(tmp_path_factory):
    "A tiny run on digits, trained on two processes: a map that is not square, one epoch."
    if toolkit_version() is None: pytest.skip('rknn-toolkit2 is not installed')
    folder = tmp_path_factory.mktemp('chain')
    data = make_digits(folder/'digits', train=16, val=4)
    knobs = dict(input_size='96x128', epochs=1, batch_size=8, device='cpu', qat_epochs=1)
    result = command('run', '--data', data, '--out', folder/'run', '--devices', '2', *[word for name, value in knobs.items() for word in ('-p', f'{name}={value}')])
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result


def test_files_and_numbers(chain):
    folder, result = chain
    assert FILES <= {path.name for path in (folder/'run').iterdir()}
    metrics = json.loads((folder/'run'/'metrics.json').read_text())
    assert METRICS <= metrics.keys()
    assert (metrics['cpu_layers'], metrics['float_layers'], metrics['images_val'], metrics['seed']) == (0, 0, 4, 0)
    assert 'report.html' in result.stdout
    assert 'WARNING' not in result.stderr and 'Traceback' not in result.stderr


def test_report_is_one_offline_file(chain):
    page = (chain[0]/'run'/'report.html').read_text()
    assert page.count('data:image/') >= 6
    assert 'src="http' not in page and 'href=' not in page


def test_full_folder_is_refused(chain):
    folder, _ = chain
    before = (folder/'run'/'last.pt').read_bytes()
    result = command('run', '--data', folder/'digits', '--out', folder/'run')
    assert result.returncode == 2 and 'already holds a run' in result.stderr and len(result.stderr.splitlines()) == 1
    assert (folder/'run'/'last.pt').read_bytes() == before


def test_another_process_takes_quantization_up_where_it_was(chain):
    run = chain[0]/'run'
    before = (run/'qat'/'last.pt').read_bytes()
    again = command('quantize', run, '--resume')
    assert again.returncode == 0 and 'begins anew' not in again.stderr, again.stderr
    assert (run/'qat'/'last.pt').read_bytes() == before         # nothing was left to train


def test_stages_alone(chain):
    folder, _ = chain
    run = folder/'run'
    again = command('quantize', run, '-p', 'qat_epochs=0', '-p', 'calibration=kl')
    assert again.returncode == 0, again.stderr
    layers = command('quantize', run, '--sensitivity')
    assert layers.returncode == 0 and 'activations' in layers.stdout and 'head' in (run/'sensitivity.csv').read_text()
    for model in ('best.pt', 'model.onnx', 'model_int8.onnx'): assert command('val', run/model, '--data', folder/'digits').returncode == 0
    images = sample_images(load_split(folder/'digits', 'val'), parse_size(read_config(run).input_size))
    checkpoint, exported = (torch.cat([torch.as_tensor(level).ravel() for level in load_predictor(run/name)[0](images)]) for name in ('best.pt', 'model.onnx'))
    assert (checkpoint - exported).abs().max() < 1e-4 < checkpoint.std()
    assert command('export', run/'best.pt', '--out', folder/'wide.onnx', '--input-size', '32x128').returncode == 0
    drawn = command('detect', run/'best.pt', folder/'digits'/'images', '--out', folder/'drawn')
    assert drawn.returncode == 0 and len(list((folder/'drawn').glob('*.jpg'))) == 20
    numbers = command('bench', folder/'wide.onnx', '--target', 'rk3576', '--json', folder/'bench.json')
    assert numbers.returncode == 0 and json.loads((folder/'bench.json').read_text())['cpu_layers'] == 0


@pytest.mark.parametrize('words, says', [
    (['train', '--data', 'nowhere', '--out', 'x'], 'nowhere'),
    (['train', '--data', 'digits', '--out', 'x', '-p', 'epoch=3'], 'did you mean epochs'),
    (['run', '--data', 'digits', '--out', 'x', '-p', 'input_size=300'], 'multiple'),
    (['bench', 'nowhere.onnx'], 'nowhere.onnx'),
    (['dance'], 'invalid choice'),
])
def test_bad_input_exits_2(words, says, tmp_path):
    result = subprocess.run([Path(sys.executable).parent/'yolov9001', *words], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and says in result.stderr and 'Traceback' not in result.stderr


def test_help_teaches():
    assert 'quantize' in command('--help').stdout and 'epochs=60' in command('run', '--help').stdout


def test_pipeline_parameters_are_those_of_a_run():
    "Name, default and meaning stand in the dataclass and, for papermill, in the notebook: they must agree."
    cell = papermill.inspect_notebook(str(project_folder()/'nbs'/'pipelines'/'train.ipynb'))
    told = {f"{name}={ast.literal_eval(p['default'])}": p['help'] for name, p in cell.items() if name not in ('resume', 'overwrite', 'devices')}
    assert told == dict(line.split(maxsplit=1) for line in describe_knobs(RunConfig).splitlines())


def test_parameters_of_the_compare_notebook_are_those_of_the_command():
    cell = papermill.inspect_notebook(str(project_folder()/'nbs'/'pipelines'/'compare.ipynb'))
    wanted = inspect.signature(COMMANDS['compare']).parameters
    assert cell.keys() == wanted.keys() - {'json'}
    for name in cell.keys() - {'data'}: assert ast.literal_eval(cell[name]['default']) == wanted[name].default


def test_np_compiles_to_int8_only_and_is_faster_than_yolov6n(tmp_path):
    if toolkit_version() is None: pytest.skip('rknn-toolkit2 is not installed')
    from yolov9001.int8.onnx import export_onnx
    from yolov9001.model import YOLOv9001
    from yolov9001.research.published import export_published
    path = export_onnx(YOLOv9001(80), tmp_path/'np.onnx', [str(i) for i in range(80)], (640, 640))
    result = command('bench', path, '--json', tmp_path/'np.json')
    numbers = json.loads((tmp_path/'np.json').read_text())
    assert result.returncode == 0 and (numbers['cpu_layers'], numbers['float_layers']) == (0, 0)
    peer = command('bench', export_published('yolov6n', tmp_path/'yolov6n.onnx'), '--json', tmp_path/'peer.json')
    assert peer.returncode == 0
    assert numbers['estimated_ms'] < .85*json.loads((tmp_path/'peer.json').read_text())['estimated_ms']
