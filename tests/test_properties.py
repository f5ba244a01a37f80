"What holds for every input: it is read, or refused in one line that names it; what is read is sound"
import json
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from yolov9001.core import one_line, quote
from yolov9001.data.dataset import parse_size
from yolov9001.data.formats import load_split
from yolov9001.int8.onnx import OUTPUT_NAMES, read_metadata
from yolov9001.training.config import RunConfig, make_config, read_config
from yolov9001.weights import read_checkpoint, write_checkpoint
from yolov9001.workbook import check_config

from test_bad_inputs import GOOD, HEAD, LINE, TEXT, YAML, coco, labelme, said, shape, write, write_images

steady = settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])

NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -2**63, 2**53 + 1])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
def nested(keys): return lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4)


VALUES = st.recursive(SCALARS, nested(st.text(max_size=8)), max_leaves=8)


def damaged(content):
    "A text or bytes of which a part is replaced by anything"
    anything = st.binary(max_size=12) if isinstance(content, bytes) else st.text(max_size=12)
    ends = st.tuples(st.integers(0, len(content)), st.integers(0, 20))
    return st.builds(lambda end, part: content[:end[0]] + part + content[end[0] + end[1]:], ends, anything)


def text_bytes(text): return text.encode('utf-8', 'surrogatepass')


def any_file(good, length=200):
    "Bytes, a text, or a good file of which a part is replaced"
    return st.binary(max_size=length) | (st.text(max_size=length) | damaged(good)).map(text_bytes)


def sound(path, *names):
    "Reads a split; all that was said is in lines, and all that was read fits its images"
    found = []
    lines = said(lambda: found.append(load_split(path, 'train')))
    assert all('\n' not in line or line.isprintable() for line in lines)
    assert found or len(lines) == 1 and any(name in lines[0] for name in names), lines
    for record in found[0].records if found else []:
        corners = record.boxes.reshape(-1, 2, 2)
        assert np.isfinite(record.boxes).all() and (corners[:, 1] > corners[:, 0]).all()
        assert (corners >= 0).all() and (corners <= (record.width, record.height)).all()
        assert np.isfinite(record.areas).all() and {*record.classes.tolist()} <= {*range(len(found[0].class_names))}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('any')
    write_images(root/'coco'/'images')
    write(root/'coco'/'annotations'/'instances_val.json', coco())
    for name in write_images(root/'yolo'/'images'): write(root/'yolo'/'labels'/f'{name}.txt', LINE)
    write(root/'yolo'/'data.yaml', 'train: images\nval: images\nnames: [cat]')
    for name in write_images(root/'named'/'images'/'train'): write(root/'named'/'labels'/'train'/f'{name}.txt', LINE)
    for name in write_images(root/'voc'/'JPEGImages'): write(root/'voc'/'Annotations'/f'{name}.xml', GOOD)
    for split in ('train', 'val'): write(root/'voc'/'ImageSets'/'Main'/f'{split}.txt', 'p0\np1\np2\np3')
    for name in write_images(root/'labelme'): write(root/'labelme'/f'{name}.json', json.dumps(labelme(shape())))
    for name in write_images(root/'labelme'/'val', 1): write(root/'labelme'/'val'/f'{name}.json', json.dumps(labelme(shape())))
    write_images(root/'csv')
    return root


def sound_coco(folder, content):
    sound(write(folder/'coco'/'annotations'/'instances_train.json', content).parents[1], 'instances_train.json', 'coco')


@steady
@given(content=VALUES)
def test_any_json_as_coco(folder, content): sound_coco(folder, json.dumps(content))


KEYS = ('id', 'file_name', 'height', 'width', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'ignore', 'name',
        'supercategory')
ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, VALUES))


@steady
@given(part=st.sampled_from(['images', 'annotations', 'categories']), rows=st.lists(ROWS, max_size=3))
def test_any_rows_of_coco(folder, part, rows):
    content = coco()
    content[part] = [good | row for good, row in zip(content[part], rows)] + content[part][len(rows):]
    sound_coco(folder, json.dumps(content))


@steady
@given(bbox=st.lists(NUMBERS, max_size=6), area=NUMBERS)
def test_any_box_of_coco(folder, bbox, area):
    content = coco()
    content['annotations'][0] |= dict(bbox=bbox, area=area)
    sound_coco(folder, json.dumps(content))


@steady
@given(content=damaged(TEXT))
def test_damaged_coco(folder, content):
    sound_coco(folder, text_bytes(content))


@steady
@given(content=any_file(f'{LINE}\n{LINE}'))
def test_any_labels_of_yolo(folder, content):
    write(folder/'yolo'/'labels'/'p0.txt', content)
    sound(folder/'yolo', 'data.yaml')


@steady
@given(numbers=st.lists(st.lists(NUMBERS, min_size=4, max_size=9), max_size=4))
def test_any_numbers_of_yolo(folder, numbers):
    write(folder/'yolo'/'labels'/'p0.txt', '\n'.join(' '.join(['0', *map(str, row)]) for row in numbers))
    sound(folder/'yolo', 'data.yaml')


@steady
@given(content=any_file(YAML + 'names: [cat, dog]\nnc: 2\npath: .'))
def test_any_data_yaml(folder, content):
    sound(write(folder/'named'/'data.yaml', content).parent, 'data.yaml', 'named')


@steady
@given(content=any_file(GOOD))
def test_any_xml(folder, content):
    write(folder/'voc'/'Annotations'/'p0.xml', content)
    sound(folder/'voc', 'train.txt')


@steady
@given(sides=st.lists(NUMBERS, min_size=6, max_size=6))
def test_any_numbers_in_xml(folder, sides):
    names = 'width', 'height', 'xmin', 'ymin', 'xmax', 'ymax'
    tags = [f'<{name}>{value}</{name}>' for name, value in zip(names, sides)]
    box = f'<object><name>cat</name><bndbox>{"".join(tags[2:])}</bndbox></object>'
    write(folder/'voc'/'Annotations'/'p0.xml', f'<a><size>{"".join(tags[:2])}</size>{box}</a>')
    sound(folder/'voc', 'train.txt')


SHAPES = VALUES | st.fixed_dictionaries(dict(label=SCALARS, points=VALUES))


@steady
@given(content=VALUES | st.fixed_dictionaries(dict(shapes=st.lists(SHAPES, max_size=3), imageHeight=VALUES, imageWidth=VALUES)))
def test_any_labelme(folder, content):
    write(folder/'labelme'/'p0.json', json.dumps(content))
    sound(folder/'labelme', 'labelme')


TABLE = HEAD + ''.join(f'p{n}.png,64,48,cat,10,10,30,30\n' for n in range(4))


@steady
@given(content=any_file(TABLE))
def test_any_csv(folder, content):
    for split in ('train', 'val'): write(folder/'csv'/f'{split}.csv', content)
    sound(folder/'csv', 'csv')


@steady
@given(values=st.dictionaries(st.sampled_from([*asdict(RunConfig())]) | st.text(max_size=10), VALUES, max_size=4))
def test_any_configuration(values):
    lines = said(lambda: check_config(make_config(RunConfig, values)))
    assert len(lines) <= 1 and all(line.isprintable() for line in lines)


@steady
@given(content=any_file("data: pets\nepochs: 3\nlr: 0.1\nout: 'runs/a'\n"))
def test_any_config_yaml(folder, content):
    lines = said(read_config, write(folder/'config.yaml', content))
    assert not lines or len(lines) == 1 and 'config.yaml: ' in lines[0] and lines[0].isprintable()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint')/'best.pt'
    known = dict(format='yolov9001', model='np', class_names=['cat', 'dog'], input_size='96x96', epoch=3,
        weights=torch.nn.Linear(3, 2).state_dict())
    write_checkpoint(path, known)
    return path, known


@steady
@given(data=st.data())
def test_damaged_checkpoint(checkpoint, data):
    path, known = checkpoint
    content = data.draw(damaged(path.read_bytes()))
    found = []
    lines = said(lambda: found.append(read_checkpoint(write(path.with_name('damaged.pt'), content))))
    if not found: assert len(lines) == 1 and 'damaged.pt: ' in lines[0] and lines[0].isprintable()
    else:
        assert found[0]['class_names'] == known['class_names']
        assert all(known['weights'][name].equal(w) for name, w in found[0]['weights'].items())


WORD = st.text(max_size=20).filter(str.isprintable)
STORED = st.recursive(st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.floats() | WORD, nested(st.integers(0, 9)))


@steady
@given(name=st.sampled_from(['format', 'model', 'class_names', 'input_size', 'weights']), value=STORED)
def test_checkpoint_with_any_entry(checkpoint, name, value):
    path, known = checkpoint
    write_checkpoint(path.with_name('other.pt'), known | {name: value})
    found = []
    lines = said(lambda: found.append(read_checkpoint(path.with_name('other.pt'))))
    if not found: assert len(lines) == 1 and 'other.pt: ' in lines[0] and lines[0].isprintable()
    else: assert parse_size(found[0]['input_size']) and all(isinstance(each, str) for each in found[0]['class_names'])


def detector(path, metadata):
    "A detector of nothing, for 64x64 pixels and two classes"
    sides = {name: (4 if name.startswith('box') else 2, 64//int(name.split('_')[1])) for name in OUTPUT_NAMES}
    outputs = ', '.join(f'float[1,{c},{n},{n}] {name}' for name, (c, n) in sides.items())
    nodes = ' '.join(f's_{name} = Constant<value = int64[4] {{1, {c}, {n}, {n}}}>() {name} = ConstantOfShape(s_{name})'
        for name, (c, n) in sides.items())
    head = '<ir_version: 8, opset_import: ["": 13]> one (float[1,3,64,64] images)'
    model = onnx.parser.parse_model(f'{head} => ({outputs}) {{ {nodes} }}')
    helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())
    return path


WORDS = dict(box_code='rational', strides='8,16,32', input_size='64x64', class_names='["cat", "dog"]')
UTF8 = st.characters(codec='utf-8')


def test_sound_metadata(tmp_path):
    assert read_metadata(detector(tmp_path/'a.onnx', WORDS)).class_names == ['cat', 'dog']


@steady
@given(name=st.sampled_from([*WORDS]), value=st.text(UTF8, max_size=30) | VALUES.map(json.dumps))
def test_any_metadata(folder, name, value):
    found = []
    lines = said(lambda: found.append(read_metadata(detector(folder/'a.onnx', WORDS | {name: value}))))
    if not found: assert len(lines) == 1 and 'a.onnx: ' in lines[0] and lines[0].isprintable()
    else: assert found[0].input_size == (64, 64) and len(found[0].class_names) == 2


@steady
@given(data=st.data())
def test_damaged_onnx(folder, data):
    content = data.draw(damaged(detector(folder/'a.onnx', WORDS).read_bytes()))
    found = []
    lines = said(lambda: found.append(read_metadata(write(folder/'damaged.onnx', content))))
    assert found or len(lines) == 1 and 'damaged.onnx: ' in lines[0] and lines[0].isprintable()


@steady
@given(value=VALUES | st.text())
def test_any_value_in_a_message(value):
    assert quote(value).isprintable() and one_line(value).isprintable() and len(one_line(value)) < 6100


@steady
@given(size=VALUES)
def test_any_size(size):
    lines = said(parse_size, size)
    assert len(lines) <= 1 and all('input size' in line for line in lines)
