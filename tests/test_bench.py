"The bench on whole files: a six-output detector, a QDQ file whose scales count, and what bad input gets"
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from yolov9001.npu import compiler
from yolov9001.core import InputError
from yolov9001.data.dataset import make_digits
from yolov9001.data.formats import load_split
from yolov9001.detection.evaluate import detect_all
from yolov9001.int8.onnx import runtime_predictor
from yolov9001.npu import board
from yolov9001.npu.latency import estimate_ms, parse_layer_table
from yolov9001.rk3588_bench import Npu, bench, bench_board, read_onnx, toolkit_version

needs_toolkit = pytest.mark.skipif(toolkit_version() is None, reason='rknn-toolkit2 is not installed')
HEIGHT, WIDTH = 64, 96


def convolution(name, source, inputs, outputs, kernel, rng):
    "A convolution node (stride 2 if 3x3) and its weight"
    weight = rng.normal(size=(outputs, inputs, kernel, kernel), scale=(2/(inputs*kernel**2))**.5).astype(np.float32)
    if source == 'images': weight /= 128
    node = helper.make_node('Conv', [source, f'{name}_w'], [name], name, kernel_shape=[kernel]*2,
                            strides=[2 if kernel == 3 else 1]*2, pads=[kernel//2]*4)
    return node, numpy_helper.from_array(weight, f'{name}_w')


def save(nodes, weights, outputs, path):
    "Write a model of one input `images` 1x3xHxW"
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, 'toy', [value('images', [1, 3, HEIGHT, WIDTH])],
                              [value(o, [1, None, None, None]) for o in outputs], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    "Three levels with a box and a class head each, without DFL: the project's ONNX contract in small"
    rng, nodes, weights, outputs, source, channels = np.random.default_rng(0), [], [], [], 'images', 3
    def add(name, source, inputs, width, kernel, act, result):
        node, weight = convolution(name, source, inputs, width, kernel, rng)
        nodes.extend([node, helper.make_node(act, [name], [result], result)])
        weights.append(weight)
    for i, width in enumerate((16, 24, 32, 32, 48)):
        add(f'conv{i}', source, channels, width, 3, 'Relu', f'level{i}')
        source, channels = f'level{i}', width
        if i < 2: continue
        for head, size in (('box', 4), ('cls', 7)):
            outputs.append(f'{head}_{2**(i + 1)}')
            add(f'{outputs[-1]}_conv', source, width, size, 1, 'Sigmoid', outputs[-1])
    return save(nodes, weights, outputs, tmp_path_factory.mktemp('onnx')/'detector.onnx')


@pytest.fixture(scope='module')
def images():
    "Smooth patches of colour with some noise"
    rng = np.random.default_rng(1)
    return np.clip(rng.integers(0, 256, (4, 1, 1, 3)) + rng.integers(-40, 40, (4, HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)


def quantized_file(path, step, act='Sigmoid'):
    "One convolution with an activation as QDQ: the output is stored with the given step"
    rng = np.random.default_rng(0)
    weight = rng.integers(-126, 127, (8, 3, 3, 3)).astype(np.int8)
    constants = dict(in_s=np.float32(1), in_z=np.int8(-128), w=weight, w_s=np.full(8, .0005, np.float32), w_z=np.zeros(8, np.int8),
                     mid_s=np.float32(.05), mid_z=np.int8(0), out_s=np.float32(step), out_z=np.int8(-128))
    def pair(source, scale, zero, result):
        return [helper.make_node('QuantizeLinear', [source, scale, zero], [f'{result}_q']),
                helper.make_node('DequantizeLinear', [f'{result}_q', scale, zero], [result])]
    nodes = [*pair('images', 'in_s', 'in_z', 'x'),
             helper.make_node('DequantizeLinear', ['w', 'w_s', 'w_z'], ['w_f'], axis=0),
             helper.make_node('Conv', ['x', 'w_f'], ['conv'], kernel_shape=[3, 3], strides=[2, 2], pads=[1]*4),
             *(pair('conv', 'mid_s', 'mid_z', 'mid') if act == 'Sigmoid' else [helper.make_node('Identity', ['conv'], ['mid'])]),
             helper.make_node(act, ['mid'], ['score']), *pair('score', 'out_s', 'out_z', 'box_2')]
    return save(nodes, [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()], ['box_2'], path)


@needs_toolkit
def test_detector_is_all_int8_on_the_npu_and_the_simulator_repeats_itself(detector, images, tmp_path):
    import onnxruntime
    with Npu() as npu:
        compiled = npu.compile_onnx(detector, tmp_path/'detector.rknn', calibration=images)
        first, again = npu(images), npu(images)
        npu.compile_onnx(detector, tmp_path/'again.rknn', calibration=images)
        rebuilt = npu(images)
    metrics = compiled.metrics()
    assert (metrics['cpu_layers'], metrics['float_layers'], metrics['npu_layers']) == (0, 0, 11)
    assert metrics['calibration'] == 4 and metrics['rknn_bytes'] == (tmp_path/'detector.rknn').stat().st_size
    assert metrics['estimated_ms_low'] < metrics['estimated_ms'] < metrics['estimated_ms_high']
    for a, b, c in zip(first, again, rebuilt):
        assert np.array_equal(a, b) and np.array_equal(a, c)
    session = onnxruntime.InferenceSession(detector)
    expected = session.run(None, {'images': images[:1].transpose(0, 3, 1, 2).astype(np.float32)})
    for got, want in zip(first, expected):
        assert got[:1].shape == want.shape and np.abs(got[:1] - want).max() < 12/256


@needs_toolkit
def test_int8_weights_of_a_qdq_file_are_the_ones_that_run(images, tmp_path, monkeypatch):
    "Left to itself, the toolkit quantizes them a second time: then many codes of the output move"
    step = .0973                                            # sums never fall on one half, where runtimes round differently
    path = quantized_file(tmp_path/'weights.onnx', step, 'Relu')
    wanted = runtime_predictor(path)(images.transpose(0, 3, 1, 2))[0]
    def equal():
        with Npu() as npu:
            npu.compile_onnx(path, tmp_path/'weights.rknn')
            return (np.round(npu(images)[0]/step) == np.round(wanted/step))[wanted > 0].mean()
    assert equal() > .999
    monkeypatch.setattr(compiler, 'weights_for_toolkit', lambda path, folder: path)
    assert equal() < .9


@needs_toolkit
def test_scales_of_a_qdq_file_are_honoured(images, tmp_path):
    for step in (1/256, 1/64):
        path = quantized_file(tmp_path/'qdq.onnx', step)
        assert read_onnx(path).quantized
        with Npu() as npu:
            compiled = npu.compile_onnx(path, tmp_path/'qdq.rknn')
            scores, = npu(images)
        levels = scores/step
        assert np.abs(levels - levels.round()).max() < .01 and len(np.unique(levels.round())) > 20
        assert compiled.calibration == 'QDQ' and set(compiled.layers.dtype) == {'INT8'}


@needs_toolkit
def test_calibration_must_fit_the_file(detector, images, tmp_path):
    qdq = quantized_file(tmp_path/'qdq.onnx', 1/256)
    with Npu() as npu:
        with pytest.raises(InputError, match='leave out'): npu.compile_onnx(qdq, tmp_path/'x.rknn', calibration=images)
        with pytest.raises(InputError, match='without calibration'): npu.compile_onnx(detector, tmp_path/'x.rknn')
        with pytest.raises(InputError, match='give uint8'): npu.compile_onnx(detector, tmp_path/'x.rknn', calibration=images[:, 1:])
        with pytest.raises(InputError, match='at least one'): npu.compile_onnx(detector, tmp_path/'x.rknn', calibration=[])
    assert not (tmp_path/'x.rknn').exists()


@needs_toolkit
def test_what_the_toolkit_refuses_is_one_line_and_leaves_nothing(tmp_path):
    node = helper.make_node('NoSuchOperator', ['images'], ['out'], domain='com.microsoft')      # which we leave to the toolkit
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, HEIGHT, WIDTH])
    path = tmp_path/'strange.onnx'
    onnx.save(helper.make_model(helper.make_graph([node], 'strange', [value('images')], [value('out')]), ir_version=8,
                                opset_imports=[helper.make_opsetid('', 13), helper.make_opsetid('com.microsoft', 1)]), path)
    with pytest.raises(InputError, match='strange.onnx: rknn-toolkit2') as caught: bench(path, rknn_path=tmp_path/'strange.rknn')
    assert '\n' not in str(caught.value) and 'log' in str(caught.value.__cause__)
    assert [p.name for p in tmp_path.iterdir()] == ['strange.onnx']


@needs_toolkit
def test_a_file_for_the_board_tells_its_names_and_its_origin(images, tmp_path):
    path = quantized_file(tmp_path/'named.onnx', 1/256)
    named = onnx.load(path)
    helper.set_model_props(named, dict(class_names=json.dumps(['Straße', '犬']), box_code='rational'))
    onnx.save(named, path)
    with Npu() as npu: npu.compile_onnx(path, tmp_path/'named.rknn')
    card = board.read_card(str(tmp_path/'named.rknn'))
    assert card['class_names'] == ['Straße', '犬'] and card['input_size'] == [HEIGHT, WIDTH] and card['targets'] == ['rk3588']
    assert card['toolkit_version'] == toolkit_version() and (card['confidence'], card['iou']) == (.3, .65)
    assert compiler.source_of(tmp_path/'named.rknn') == path
    again = compiler.simulate_rknn(tmp_path/'named.rknn')
    assert again(images)[0].shape == (4, 8, HEIGHT//2, WIDTH//2)
    again.close()


def test_files_quantized_for_other_runtimes_are_refused(tmp_path):
    weights = ', '.join('1' for _ in range(8*3*3*3))
    text = ('<ir_version: 8, opset_import: ["": 13]> one (float[1,3,8,8] images) => (float y) '
            f'<float s = {{1}}, int8 z = {{0}}, int8[8,3,3,3] w = {{{weights}}}> ')
    forms = dict(QOperator='{ q = QuantizeLinear(images, s, z) c = QLinearConv(q, s, z, w, s, z, s, z) y = DequantizeLinear(c, s, z) }',
                 dynamic='{ q, t, u = DynamicQuantizeLinear(images) c = ConvInteger(q, w) y = Cast<to = 1>(c) }')
    for name, nodes in forms.items():
        file = onnx.parser.parse_model(text + nodes)
        onnx.save(file, tmp_path/f'{name}.onnx')
        with pytest.raises(InputError, match=f'{name}.onnx: quantized already, in {name}.*export the float model, or QDQ'): bench(tmp_path/f'{name}.onnx')


@needs_toolkit
def test_a_compilation_that_takes_too_long_is_ended(detector, images, tmp_path):
    with Npu(timeout=.01) as npu:
        with pytest.raises(InputError, match='no answer in 0.01 s'): npu.compile_onnx(detector, tmp_path/'x.rknn', calibration=images)
        assert npu.worker.returncode is not None


def test_bad_files(tmp_path, detector):
    (tmp_path/'text.onnx').write_text('no protobuf here')
    (tmp_path/'short.onnx').write_bytes(Path(detector).read_bytes()[:1000])
    for name, what in dict(none='no such file', text='not an ONNX file', short='not an ONNX file').items():
        with pytest.raises(InputError, match=f'{name}.onnx: {what}'): bench(tmp_path/f'{name}.onnx')
    with pytest.raises(InputError, match='no such file'): bench(tmp_path)


@needs_toolkit
def test_unknown_target(detector):
    with pytest.raises(InputError, match='rk9999: unknown; use one of rk3588, rk3576'): bench(detector, 'rk9999')


def test_without_the_toolkit(detector, monkeypatch):
    monkeypatch.setattr(compiler, 'toolkit_version', lambda: None)
    with pytest.raises(InputError, match='pip install --no-deps rknn-toolkit2'): bench(detector)


def test_no_milliseconds_for_chips_that_nothing_was_fitted_on():
    assert set(estimate_ms(parse_layer_table(''), 'rk3566').values()) == {None}
    assert estimate_ms(parse_layer_table(''))['estimated_ms'] == 0


class Simulated:
    "The simulator in the place of a core of the board: one call at a time"
    name, lock = 'simulated core', threading.Lock()

    def __init__(self, npu): self.npu = npu
    def run(self, image):
        with self.lock: return self.npu(image)
    def close(self): pass


@needs_toolkit
def test_the_pipeline_of_the_board_finds_what_evaluate_finds(detector, images, tmp_path):
    data = make_digits(tmp_path/'digits', train=2, val=3)
    val = load_split(data, 'val')
    with Npu() as npu:
        npu.compile_onnx(detector, tmp_path/'detector.rknn', calibration=images)
        expected = detect_all(lambda batch: npu(batch.numpy()), val, (HEIGHT, WIDTH), progress=False)
        pipeline = board.Pipeline([Simulated(npu) for _ in range(3)], (HEIGHT, WIDTH), confidence=.001)
        frames = {Path(frame.name).name: frame for frame in pipeline.run(board.open_source(str(data/'images')))}
    numbers = board.latency(pipeline)
    assert numbers['frames'] == 5 and numbers['requests'] == 3 and numbers['run_ms'] > 0
    for record in val.records:
        (boxes, scores, classes), want = frames[record.path.name].found, expected[record.image_id]
        ours, theirs = (sorted(map(tuple, np.column_stack([np.round(s, 4), c, np.round(b, 1)]).tolist())) for b, s, c in
                        ((boxes, scores, classes), (want.boxes.numpy(), want.scores.numpy(), want.classes.numpy())))
        assert len(ours) == len(theirs) > 0
        assert np.abs(np.array([row[0] for row in ours]) - [row[0] for row in theirs]).max() < 1e-3


@needs_toolkit
def test_the_script_of_the_board_stands_alone(detector, images, tmp_path):
    with Npu() as npu: npu.compile_onnx(detector, tmp_path/'model.rknn', calibration=images)
    script = shutil.copy(board.__file__, tmp_path/'board.py')
    words = [sys.executable, '-I', script, 'model.rknn', '--source', tmp_path]
    refused = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and 'no image there' in refused.stderr and 'Traceback' not in refused.stderr
    make_digits(tmp_path/'digits', train=1, val=1)
    result = subprocess.run([*words[:-1], tmp_path/'digits'/'images'], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and 'pip install rknn-toolkit-lite2' in result.stderr and 'Traceback' not in result.stderr


@needs_toolkit
def test_a_board_needs_adb(detector, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(InputError, match='apt install adb'): bench_board(detector, 'board.local')
