"The comparison as a user starts it: on a tiny set, one epoch, resumed, with a peer where ultralytics is installed"
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from yolov9001.core import InputError, project_folder
from yolov9001.data.dataset import make_digits
from yolov9001.npu.latency import PUBLISHED, fit_prices, leave_family_out, model_ms
from yolov9001.research.compare import Budget, compare, read_rows
from yolov9001.research.peers import ultralytics_version
from yolov9001.rk3588_bench import toolkit_version
from yolov9001.workbook import run_notebook

needs_toolkit = pytest.mark.skipif(toolkit_version() is None, reason='rknn-toolkit2 is not installed')
needs_ultralytics = pytest.mark.skipif(ultralytics_version() is None, reason="ultralytics is not installed: pip install -e '.[compare]'")


def command(*words): return subprocess.run([Path(sys.executable).parent/'yolov9001', *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A data set of digits, and the words of a comparison on it"
    folder = tmp_path_factory.mktemp('compare')
    data = make_digits(folder/'digits', train=16, val=4)
    budget = ['--epochs', 1, '--input-size', 96, '--batch-size', 8, '--calibration', 4]
    return folder, ['compare', '--data', data, '--out', folder/'out', *budget]


@needs_toolkit
@needs_ultralytics
def test_one_epoch_of_ours_and_a_peer_in_one_table(tiny):
    folder, words = tiny
    result = command(*words, '--models', 'ours,yolov8n', '--json', folder/'rows.json')
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((folder/'rows.json').read_text())
    assert [(row['model'], row['ours'], row['seed'], row['epochs']) for row in rows] == [('np', True, 0, 1), ('yolov8n', False, 0, 1)]
    for row in rows: assert row['images_val'] == 4 and row['cpu_layers'] == 0 and row['float_layers'] == 0 and row['estimated_ms'] > 0
    assert (folder/'out'/'compare.png').stat().st_size > 5000 and (folder/'out'/'compare.json').exists()


@needs_toolkit
@needs_ultralytics
def test_finished_rows_are_kept_and_other_budgets_refused(tiny):
    folder, words = tiny
    before = {file: file.stat().st_mtime_ns for file in (folder/'out').glob('*/val.json')}
    given = folder/'out'/'yolov8n-0'/'model.onnx'
    result = command(*words, '--models', f'ours,yolov8n,{given}=yolov9001.research.peers:decode_peer')
    assert result.returncode == 0, result.stderr
    assert before == {file: file.stat().st_mtime_ns for file in before}
    rows = read_rows(folder/'out').set_index('model')
    assert set(rows.index) == {'np', 'yolov8n', 'yolov8n-0'}
    same = ['map_fp32', 'map_int8', 'params', 'npu_cycles', 'rknn_bytes']       # after one epoch AP is 0: what the file is tells more
    assert rows.loc['yolov8n-0', same].tolist() == rows.loc['yolov8n', same].tolist() != rows.loc['np', same].tolist()
    other = command(*words[:-1], 5, '--models', 'ours')
    assert other.returncode == 2 and 'calibration=4' in other.stderr and len(other.stderr.strip().splitlines()) == 1


@needs_toolkit
def test_the_notebook_shows_the_same_table(tiny):
    "papermill runs it with parameters; what the command has finished is kept"
    folder, words = tiny
    knobs = dict(data=str(folder/'digits'), models='ours', out=str(folder/'out'), epochs=1, input_size=96, batch_size=8, calibration=4)
    run_notebook('compare', folder/'notebook', knobs)
    cells = json.loads((folder/'notebook'/'compare.ipynb').read_text())['cells']
    shown = [output['data'] for cell in cells for output in cell.get('outputs', []) if 'data' in output]
    assert any('np' in ''.join(data.get('text/html', '')) for data in shown) and any('image/png' in data for data in shown)


@needs_toolkit
@needs_ultralytics
def test_a_failing_peer_is_one_line(tiny):
    result = command(*tiny[1], '--models', 'yolov99n')
    assert result.returncode == 2 and 'yolov99n' in result.stderr.strip().splitlines()[-1] and 'Traceback' not in result.stderr


@needs_toolkit
def test_without_ultralytics_the_remedy_is_told_at_once(tiny, monkeypatch):
    monkeypatch.setattr('yolov9001.research.compare.ultralytics_version', lambda: None)
    with pytest.raises(InputError, match=r"pip install -e '.\[compare\]'"): compare(['yolov8n'], [0], Budget(str(tiny[0]/'digits')), tiny[0]/'none')
    assert not (tiny[0]/'none').exists()


def test_the_package_never_imports_ultralytics():
    code = 'import sys, yolov9001.workbook, yolov9001.research.compare, yolov9001.research.design; assert not any(m.startswith("ultralytics") for m in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_the_estimate_tells_activations_apart_and_fits_families_it_has_not_seen():
    table = pd.read_csv(project_folder()/'nbs'/'npu'/'published_layers.csv')
    ms, published = model_ms(table), pd.Series({name: 1000/fps for name, fps in PUBLISHED.items()})
    assert (abs(ms/published - 1) < .18).all()
    assert ms['yolov5s_relu'] < .8*ms['yolov5s']
    errors = leave_family_out(table)
    assert errors.error.abs().mean() < .09 and errors.error.abs().max() < .18
    assert model_ms(table, fit_prices(table)).corr(published) > .98
