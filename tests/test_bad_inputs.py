"Whatever a user hands in: one line that names the file, and no traceback, hang or crash. A case is a line of a table."
import contextlib
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import warnings
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from PIL import Image

from yolov9001.cli import main
from yolov9001.core import InputError
from yolov9001.data.augment import Augmentation, TrainSet
from yolov9001.data.dataset import letterbox
from yolov9001.data.formats import load_split
from yolov9001.data.images import MOST_PIXELS, read_image
from yolov9001.data.pack import read_labels, write_labels
from yolov9001.detection.detect import list_images
from yolov9001.int8.onnx import read_metadata
from yolov9001.model import load_model
from yolov9001.npu.compiler import source_of
from yolov9001.npu.graph import read_onnx, toy_detector
from yolov9001.training.checkpoint import read_state
from yolov9001.training.config import RunConfig, make_config, read_config
from yolov9001.weights import SHIPPED, read_checkpoint, write_checkpoint
from yolov9001.workbook import check_config

SECONDS = 20            # that a case may take, on a busy core
MEMORY = 4*2**30        # bytes that a case may take


@contextlib.contextmanager
def limits():
    "Stops what takes too long or too much memory"
    def stop(*_): raise TimeoutError(f'more than {SECONDS} s')
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def said(call, *arguments):
    "The lines of a refusal, or of the warnings; anything but an `InputError` fails the test"
    with warnings.catch_warnings(record=True) as caught, limits():
        warnings.simplefilter('always')
        try: call(*arguments)
        except InputError as error: return [str(error)]
    return [str(warning.message) for warning in caught]


def refused(name, told, call, *arguments):
    "Checks that a call is refused in one line that names a file and says what we expect"
    lines = said(call, *arguments)
    assert len(lines) == 1 and name in lines[0] and re.search(told, lines[0]), lines
    assert '\n' not in lines[0] and '\x1b' not in lines[0] and len(lines[0]) < 1000, lines


def command(*words):
    "Exit code of a command, and what it wrote on stderr"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(), limits():
        warnings.simplefilter('always')
        code = main([*map(str, words)])
    return code, err.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)): content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_images(folder, count=4, suffix='.png'):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder/f'p{number}{suffix}')
    return [f'p{number}' for number in range(count)]


# ---- COCO

def image(number=0, **changes): return dict(id=number, file_name=f'p{number}.png', height=48, width=64) | changes
def box(number=0, **changes): return dict(id=number, image_id=number, category_id=1, bbox=[10, 10, 20, 20]) | changes
def coco(**changes):
    rows = range(4)
    return dict(images=[*map(image, rows)], annotations=[*map(box, rows)], categories=[dict(id=1, name='cat')]) | changes
def without(row, key): return {name: value for name, value in row.items() if name != key}


TEXT = json.dumps(coco())
COCO = {
    'an empty file': ('', 'malformed JSON at line 1, column 1'),
    'a list': ('[]', "no list 'images'"),
    'null': ('null', "no list 'images'"),
    'a number': ('7', "no list 'images'"),
    'a word': ('"images"', "no list 'images'"),
    'cut in the middle': (TEXT[:200], 'malformed JSON at line 1'),
    'twice the same': (TEXT*2, 'Extra data'),
    'a comma too many': (TEXT[:-1] + ',}', 'malformed JSON'),
    'a comment': ('// mine\n' + TEXT, 'malformed JSON'),
    'quotes of Python': (TEXT.replace('"', "'"), 'malformed JSON'),
    'UTF-16': (TEXT.encode('utf-16'), 'not readable as text'),
    'Latin-1': (TEXT.encode().replace(b'cat', b'\xe9t\xe9'), 'not readable as text'),
    'bytes of zero': (bytes(1000), 'malformed JSON'),
    'a picture': (b'\x89PNG\r\n\x1a\n' + bytes(100), 'not readable as text'),
    '100 000 brackets': ('['*100_000, 'nested too deeply'),
    '100 000 braces': ('{"a":'*100_000, 'nested too deeply'),
    'closed brackets': ('['*100_000 + ']'*100_000, 'nested too deeply'),
    'a number of 5000 digits': (TEXT.replace('48', '9'*5000, 1), 'thousands of digits'),
    'a number of 400 digits': (TEXT.replace('48', '9'*400, 1), r"images\[0\] has no proper 'height'"),
    'Infinity as a size': (TEXT.replace('48', 'Infinity', 1), r"images\[0\] has no proper 'height'"),
    'NaN as a size': (TEXT.replace('64', 'NaN', 1), r"images\[0\] has no proper 'width'"),
    '-Infinity as a class': (coco(categories=[dict(id=-math.inf, name='cat')]), r"categories\[0\] has no proper 'id'"),
    'NaN as an id': (coco(annotations=[box(image_id=math.nan)]), r"annotations\[0\] has no proper 'image_id'"),
    'images in a dictionary': (coco(images={'0': image()}), "no list 'images'"),
    'an image that is null': (coco(images=[None]), r"images\[0\] has no proper 'id'"),
    'an image that is a list': (coco(images=[[1, 2]]), r"images\[0\] has no proper 'id'"),
    'a class that is a word': (coco(categories=['cat']), r"categories\[0\] has no proper 'id'"),
    'a class without a name': (coco(categories=[dict(id=1)]), r"categories\[0\] has no proper 'name'"),
    'an empty name': (coco(categories=[dict(id=1, name='')]), 'hold an empty name'),
    'the same name, 10 000 letters': (coco(categories=[dict(id=n, name='a'*10_000) for n in (1, 2)]), r"hold 'aaaa.*\.\.\..*more than once"),
    'the same name, obeyed by terminals': (coco(categories=[dict(id=n, name='\x1b[31m') for n in (1, 2)]), r'hold .*x1b\[31m. more than once'),
    'a supercategory that is a list': (coco(categories=[dict(id=1, name='cat', supercategory=[])]), ''),
    'no image there': (coco(images=[image(file_name='gone.png')]), 'none of its 1 images is there'),
    'a name of 100 000 letters': (coco(images=[image(file_name='a'*100_000)]), 'none of its 1 images is there'),
    'a name of 100 000 folders': (coco(images=[image(file_name='a/'*100_000 + 'p0.png')]), 'none of its 1 images is there'),
    'a name with a zero': (coco(images=[image(file_name='p0\0.png')]), 'none of its 1 images is there'),
    'a name that is no text': (coco(images=[image(file_name='\ud800.png')]), 'none of its 1 images is there'),
    'a name that is empty': (coco(images=[image(file_name='')]), 'none of its 1 images is there'),
    'a name that is a folder': (coco(images=[image(file_name='.')]), 'none of its 1 images is there'),
    'the password file': (coco(images=[image(file_name='/etc/passwd'), image(1)]), '1 x image that does not decode'),
    'iscrowd Infinity': (coco(annotations=[box(iscrowd=math.inf), box(1)]), '1 x box with a value that is no number'),
    'a box of 400 digits': (coco(annotations=[box(bbox=[10**400, 0, 5, 5]), box(1)]), '1 x box with a value that is no number'),
    'a box without end': (coco(annotations=[box(bbox=[1e308, 1e308, 1e308, 1e308]), box(1)]), '1 x box with a value that is no number'),
    'a box of words': (coco(annotations=[box(bbox=['a']*4), box(1)]), '1 x box with a value that is no number'),
    'a box of five': (coco(annotations=[box(bbox=[1]*5), box(1)]), '1 x box with a value that is no number'),
    'a box that is a number': (coco(annotations=[box(bbox=7), box(1)]), '1 x box with a value that is no number'),
    'only bad boxes': (coco(annotations=[box(bbox=None)]), 'no usable box in 4 images .left out: 1 x box with a value'),
    'a size that is another': (coco(images=[image(height=49), image(1)]), '1 x image of another size than annotated'),
}


@pytest.fixture(scope='module')
def coco_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('coco')
    write_images(folder/'images')
    write(folder/'annotations'/'instances_val.json', coco())
    return folder


@pytest.mark.parametrize('case', COCO)
def test_coco(coco_folder, case):
    content, told = COCO[case]
    path = write(coco_folder/'annotations'/'instances_train.json', content)
    if told: refused(path.name, told, load_split, coco_folder, 'train')
    else: assert not said(load_split, coco_folder, 'train')


ODD = [None, True, -1, 0, 1e308, 10**400, -math.inf, math.nan, '', 'x', '\x1b[31m', '\ud800\0', 'a'*10**5]
ODD += [[], [[]], {}, {'a': [1]}]
KEYS = dict(images=image(), annotations=box(area=4, iscrowd=0, ignore=0), categories=dict(id=1, name='', supercategory=''))
ROWS = [(part, key) for part, row in KEYS.items() for key in row]


@pytest.mark.parametrize('part, key', ROWS)
def test_coco_with_any_value_anywhere(coco_folder, part, key):
    for value in ODD:
        content = coco()
        content[part][0][key] = value
        path = write(coco_folder/'annotations'/'instances_train.json', content)
        for line in said(load_split, coco_folder, 'train'): assert path.name in line and '\n' not in line, (value, line)


# ---- YOLO

YAML = 'train: images/train\nval: images/train\n'
TENS = (f'a{n}: &a{n} [{", ".join([f"*a{n - 1}"]*10)}]\n' for n in range(1, 10))
BOMB = 'a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(TENS)
DATA_YAML = {
    'an empty file': ('', 'no class names'),
    'a word': ('cat', 'no class names'),
    'a list': ('- cat', 'no class names'),
    'no names': (YAML, 'no class names'),
    'names that are null': (YAML + 'names:', 'no class names'),
    'names that are empty': (YAML + 'names: []', 'no class names'),
    'names that are a word': (YAML + 'names: cat', 'no class names'),
    'names that are a number': (YAML + 'names: 3', 'no class names'),
    'a name that is null': (YAML + 'names: [cat, null]', 'YAML reads None in names'),
    'a name that is no': (YAML + 'names: [no, cat]', 'YAML reads False in names'),
    'a name that is a date': (YAML + 'names: [2020-01-01]', 'YAML reads datetime.date'),
    'a name that is a list': (YAML + 'names: [[cat]]', r"YAML reads \['cat'\]"),
    'a name that is empty': (YAML + "names: ['']", 'hold an empty name'),
    'a name twice': (YAML + 'names: [cat, cat]', "'cat' more than once"),
    'a name of 100 000 letters': (YAML + f'names: [{"a"*10**5}, {"a"*10**5}]', 'more than once'),
    'a key that is a word': (YAML + 'names: {cat: 0}', 'no class numbers'),
    'a key of 400 digits': (YAML + f'names: {{{"9"*400}: cat}}', 'no class numbers'),
    'a key that is a list': (YAML + 'names: {[0]: cat}', 'malformed YAML|no class numbers'),
    'a number of 5000 digits': (YAML + f'names: [{"9"*5000}]', 'malformed YAML'),
    'no images': ('names: [cat]', 'names no images; add a line'),
    'images that are null': ('names: [cat]\ntrain:', 'names no images; add a line'),
    'images that are a number': ('names: [cat]\ntrain: 7', '7: missing; name a folder'),
    'images in a dictionary': ('names: [cat]\ntrain: {a: b}', 'missing; name a folder'),
    'a folder that is missing': ('names: [cat]\ntrain: nowhere', 'nowhere: missing'),
    'a folder of 100 000 letters': (f'names: [cat]\ntrain: {"a"*100_000}', 'missing; name a folder'),
    'a folder with a zero': ('names: [cat]\ntrain: "a\\0b"', 'missing; name a folder'),
    'a folder that holds none': ('names: [cat]\ntrain: labels', 'no images for the split train'),
    'a picture as a list': ('names: [cat]\ntrain: images/train/p0.png', 'p0.png: not readable as text'),
    'a device': ('names: [cat]\ntrain: /dev/zero', 'no images for the split train'),
    'a bracket open': ('names: [cat\n', 'malformed YAML .*line 2, column 1'),
    'a tab': ('names:\n\t- cat', 'malformed YAML'),
    'two colons': ('names: cat: dog', 'malformed YAML'),
    'two documents': ('a: 1\n---\nb: 2', 'malformed YAML'),
    'a letter of control': ('names: [\x07]', 'malformed YAML'),
    'an unknown anchor': ('names: *cat', 'malformed YAML'),
    'a bomb': (BOMB + YAML + 'names: *a9', 'malformed YAML .*an alias of a list'),
    'a bomb of mappings': ('a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nnames: *b', 'an alias of a list'),
    'an alias of itself': ('names: &a [*a]', 'an alias of a list'),
    '100 000 brackets': ('['*100_000, 'nested too deeply'),
    '100 000 dashes': ('- '*100_000, 'nested too deeply'),
    '10 000 mappings': (''.join(f'{" "*n}a:\n' for n in range(300)), 'nested too deeply'),
    'an object of Python': ('names: !!python/object/apply:os.getcwd []', 'malformed YAML'),
    'an empty number': (YAML + 'names: [!!int ""]', 'malformed YAML'),
    'a bad yes': (YAML + 'names: [!!bool perhaps]', 'malformed YAML'),
    'a bad date': (YAML + 'names: [2020-99-99]', 'malformed YAML'),
    'bytes': (b'names: [caf\xe9]', 'not readable as text'),
    '2 MB': (YAML + '#' + 'a'*2_000_000, '2 MB of text, more than 1'),
}
LINE = '0 .5 .5 .4 .4'
LABEL_LINES = {
    'a zero': ('\0', 'label line that is not'),
    'a word': ('cat .5 .5 .4 .4', 'label line that is not'),
    'commas': ('0,.5,.5,.4,.4', 'label line that is not'),
    'too few': ('0 .5 .5 .4', 'label line that is not'),
    'no number': ('0 nan nan nan nan', 'value that is no number'),
    'without end': ('0 inf .5 .4 .4', 'value that is no number'),
    'an endless box': ('0 .5 .5 1e308 1e308', 'value that is no number|clipped'),
    'turned round': ('0 .5 .5 -.4 .4', 'box of zero size'),
    'outside': ('0 9 9 .1 .1', 'box outside its image'),
    'in pixels': ('0 32 24 10 10', 'box outside its image'),
    'an unknown class': ('7 .5 .5 .4 .4', 'box of an unknown category'),
    'a class of 5000 digits': ('9'*5000 + ' .5 .5 .4 .4', 'box of an unknown category'),
    'a class that is no number': ('nan .5 .5 .4 .4', 'box of an unknown category'),
    'half a class': ('.5 .5 .5 .4 .4', 'box of an unknown category'),
    'a class below zero': ('-1 .5 .5 .4 .4', 'box of an unknown category'),
    '100 000 numbers': ('0' + ' .5'*100_000, 'box of zero size'),
    '100 000 numbers of another kind': ('0' + ' 7'*100_000, 'label line that is not'),
    'the same 20 000 times': ('\n'.join([LINE]*20_000), 'label line that repeats another'),
    'Latin-1': (b'0 .5 .5 .4 .4 # \xe9', 'file of labels that cannot be read .p0.txt'),
    'UTF-16': (LINE.encode('utf-16'), 'file of labels that cannot be read .p0.txt'),
    'a picture': (b'\x89PNG\r\n\x1a\n', 'file of labels that cannot be read .p0.txt'),
}


@pytest.fixture(scope='module')
def yolo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('yolo')
    for name in write_images(folder/'images'/'train'): write(folder/'labels'/'train'/f'{name}.txt', LINE)
    return folder


@pytest.mark.parametrize('case', DATA_YAML)
def test_data_yaml(yolo_folder, case):
    content, told = DATA_YAML[case]
    path = write(yolo_folder/'data.yaml', content)
    refused(str(path.parent), told, load_split, yolo_folder, 'train')


@pytest.mark.parametrize('case', LABEL_LINES)
def test_line_of_yolo(yolo_folder, case):
    content, told = LABEL_LINES[case]
    write(yolo_folder/'data.yaml', YAML + 'names: [cat]')
    write(yolo_folder/'labels'/'train'/'p0.txt', content)
    refused('data.yaml', told, load_split, yolo_folder, 'train')
    assert len(load_split(yolo_folder, 'train')) == 3 + ('file of labels' not in told)


def test_one_bad_file_of_labels_among_thousands(tmp_path):
    image = write_images(tmp_path/'images', 1)[0]
    for number in range(2000):
        os.link(tmp_path/'images'/f'{image}.png', tmp_path/'images'/f'q{number:04}.png')
        write(tmp_path/'labels'/f'q{number:04}.txt', LINE)
    write(tmp_path/'labels'/f'{image}.txt', b'\xff\xfe')
    write(tmp_path/'classes.txt', 'cat')
    lines = said(load_split, tmp_path, 'train')
    assert any('1 x file of labels that cannot be read (p0.txt)' in line for line in lines), lines


@pytest.mark.parametrize('kind', ('folder', 'loop', 'nowhere', 'device', 'pipe'))
def test_labels_that_are_no_file(tmp_path, kind):
    "Something lies where the labels should: that is no image without objects"
    write_images(tmp_path/'images', 9)
    for number in range(1, 9): write(tmp_path/'labels'/f'p{number}.txt', LINE)
    write(tmp_path/'classes.txt', 'cat')
    odd = tmp_path/'labels'/'p0.txt'
    if kind == 'folder': odd.mkdir()
    elif kind == 'pipe': os.mkfifo(odd)
    else: odd.symlink_to(dict(loop=odd, nowhere=tmp_path/'nowhere', device='/dev/zero')[kind])
    lines = [*said(load_split, tmp_path, 'train'), *said(load_split, tmp_path, 'val')]
    assert any('1 x file of labels that cannot be read (p0.txt)' in line for line in lines), lines


# ---- VOC, LabelMe, CSV, darknet

def part(name='cat', inside='<xmin>11</xmin><ymin>11</ymin><xmax>30</xmax><ymax>30</ymax>'):
    return f'<object><name>{name}</name><bndbox>{inside}</bndbox></object>'


SIZE = '<size><width>64</width><height>48</height></size>'
XML = {
    'an empty file': ('', 'file of labels that cannot be read'),
    'cut in the middle': (f'<annotation>{SIZE}{part()}', 'file of labels that cannot be read'),
    'no XML': ('cat', 'file of labels that cannot be read'),
    'bytes': (b'<annotation>\xe9</annotation>', 'file of labels that cannot be read'),
    'an unknown entity': ('<annotation>&cat;</annotation>', 'file of labels that cannot be read'),
    'a bomb': ('<!DOCTYPE a [<!ENTITY a0 "aaaaaaaaaa">' + ''.join(f'<!ENTITY a{n} "{f"&a{n - 1};"*10}">' for n in range(1, 12)) + ']><annotation>&a11;</annotation>', 'file of labels that cannot be read'),
    'a file of somebody else': ('<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>', 'file of labels that cannot be read'),
    'an unknown encoding': ('<?xml version="1.0" encoding="none"?><annotation/>', ''),
    '100 000 deep': ('<a>'*100_000 + '</a>'*100_000, ''),
    'no object': (f'<annotation>{SIZE}</annotation>', ''),
    'an object without a name': (f'<annotation>{SIZE}<object><bndbox/></object></annotation>', '1 x object without a name'),
    'an empty name': (f'<annotation>{SIZE}{part("")}</annotation>', '1 x object without a name'),
    'a name of blanks': (f'<annotation>{SIZE}{part("  ")}</annotation>', '1 x object without a name'),
    'no box': (f'<annotation>{SIZE}<object><name>cat</name></object></annotation>', '1 x box with a value that is no number'),
    'a box of words': (f'<annotation>{SIZE}{part(inside="<xmin>a</xmin>")}</annotation>', '1 x box with a value that is no number'),
    'a box without end': (f'<annotation>{SIZE}{part(inside="<xmin>1</xmin><ymin>1</ymin><xmax>inf</xmax><ymax>9</ymax>")}</annotation>', '1 x box with a value that is no number'),
    'a size without end': (f'<annotation>{SIZE.replace("64", "inf")}{part()}</annotation>', '1 x image of another size'),
    'a size of 400 digits': (f'<annotation>{SIZE.replace("64", "9"*400)}{part()}</annotation>', '1 x image of another size'),
    'a size that is a word': (f'<annotation>{SIZE.replace("64", "wide")}{part()}</annotation>', ''),
    'a size below zero': (f'<annotation>{SIZE.replace("64", "-64")}{part()}</annotation>', '1 x image of another size'),
}
GOOD = f'<annotation>{SIZE}{part()}</annotation>'


def shape(**changes): return dict(label='cat', points=[[10, 10], [30, 30]], shape_type='rectangle') | changes
def labelme(*shapes, **changes): return dict(shapes=[*shapes], imageHeight=48, imageWidth=64) | changes


LABELME = {
    'an empty file': ('', 'file of labels that cannot be read'),
    'a list': ([], 'file of labels that cannot be read'),
    'null': (None, 'file of labels that cannot be read'),
    'shapes that are null': (dict(shapes=None), 'file of labels that cannot be read'),
    'a shape that is a word': (labelme('cat'), 'file of labels that cannot be read'),
    'no label': (labelme(without(shape(), 'label')), 'file of labels that cannot be read'),
    'an empty label': (labelme(shape(label='')), '1 x object without a name'),
    'no points': (labelme(without(shape(), 'points')), 'file of labels that cannot be read'),
    'points that are null': (labelme(shape(points=None)), 'file of labels|no number'),
    'points of words': (labelme(shape(points=[['a', 'b'], ['c', 'd']])), 'file of labels that cannot be read'),
    'points of 400 digits': (labelme(shape(points=[[10**400, 1], [2, 3]])), 'file of labels that cannot be read'),
    'an odd number': (labelme(shape(points=[1, 2, 3])), 'file of labels that cannot be read'),
    'ragged points': (labelme(shape(points=[[1, 2], [3]])), 'file of labels that cannot be read'),
    'a circle of one point': (labelme(shape(points=[[1, 2]], shape_type='circle')), '1 x box with a value that is no number'),
    'Infinity': (labelme(shape(points=[[1, 2], [math.inf, 4]])), '1 x box with a value that is no number'),
    'a height that is a list': (labelme(shape(), imageHeight=[48]), '1 x image of another size'),
    'a height without end': (labelme(shape(), imageHeight=math.inf), '1 x image of another size'),
    '100 000 brackets': ('{"shapes": ' + '['*100_000, 'file of labels that cannot be read'),
}
HEAD = 'filename,width,height,class,xmin,ymin,xmax,ymax\n'
ROW = 'p1.png,64,48,cat,10,10,30,30\n'
CSV = {
    'a short row': (HEAD + ROW + 'p0.png\n', '1 x object without a name'),
    'a row of commas': (HEAD + ROW + ',,,,,,,\n', '1 x image that is absent|1 x object without a name'),
    'no class': (HEAD + ROW + 'p0.png,64,48,,1,1,9,9\n', '1 x object without a name'),
    'words': (HEAD + ROW + 'p0.png,64,48,cat,a,b,c,d\n', '1 x box with a value that is no number'),
    'a size without end': (HEAD + ROW + 'p0.png,inf,48,cat,1,1,9,9\n', '1 x image of another size'),
    'a field of 200 000 letters': (HEAD + ROW + f'p0.png,64,48,{"a"*200_000},1,1,9,9\n', 'malformed CSV .field larger'),
    'no image there': (HEAD + 'gone.png,64,48,cat,1,1,9,9\n', 'none of its 1 images is there'),
    'no row': (HEAD, 'no layout that we know'),
    'bytes': (HEAD.encode() + b'caf\xe9.png,64,48,cat,1,1,9,9\n', 'not readable as text'),
    'another header': ('name,x\n' + ROW, 'no layout that we know'),
    'an empty file': ('', 'no layout that we know'),
}


def paired(tmp_path, content, suffix, good):
    "Four images with a file each, the first with `content`"
    for name in write_images(tmp_path): write(tmp_path/f'{name}{suffix}', good)
    write(tmp_path/f'p0{suffix}', content if isinstance(content, (bytes, str)) else json.dumps(content))
    write_images(tmp_path/'val', 1)
    write(tmp_path/'val'/f'p0{suffix}', good)


@pytest.mark.parametrize('case', XML)
@pytest.mark.parametrize('layout', ('beside', 'lists'))
def test_xml(tmp_path, case, layout):
    content, told = XML[case]
    if layout == 'beside': paired(tmp_path, content, '.xml', GOOD)
    else:
        names = write_images(tmp_path/'JPEGImages')
        for name in names: write(tmp_path/'Annotations'/f'{name}.xml', content if name == 'p0' else GOOD)
        for split in ('train', 'val'): write(tmp_path/'ImageSets'/'Main'/f'{split}.txt', '\n'.join(names))
    if told: refused(tmp_path.name, told, load_split, tmp_path, 'train')
    else: assert not said(load_split, tmp_path, 'train')
    assert load_split(tmp_path, 'train').class_names == ['cat']


@pytest.mark.parametrize('case', LABELME)
def test_labelme(tmp_path, case):
    content, told = LABELME[case]
    paired(tmp_path, content, '.json', json.dumps(labelme(shape())))
    refused(tmp_path.name, told, load_split, tmp_path, 'train')
    assert load_split(tmp_path, 'train').class_names == ['cat']


@pytest.mark.parametrize('case', CSV)
def test_csv(tmp_path, case):
    content, told = CSV[case]
    write_images(tmp_path)
    for split in ('train', 'val'): write(tmp_path/f'{split}.csv', content)
    refused(tmp_path.name, told, load_split, tmp_path, 'train')


DARKNET = {
    'nothing': ('', 'no layout that we know'),
    'a missing list': ('train = gone.txt\nnames = obj.names', 'names gone.txt, which is missing'),
    'missing names': ('train = train.txt\nnames = gone.names', 'names gone.names, which is missing'),
    'a list that is a picture': ('train = p0.png\nnames = obj.names', 'p0.png: not readable as text'),
    'names that are a picture': ('train = train.txt\nnames = p0.png', 'p0.png: not readable as text'),
    'lines that are no files': ('train = odd.txt\nnames = obj.names', 'no usable box in .* images'),
}


@pytest.mark.parametrize('case', DARKNET)
def test_darknet(tmp_path, case):
    content, told = DARKNET[case]
    names = write_images(tmp_path)
    for name, text in (('obj.data', content), ('obj.names', 'cat'), ('train.txt', '\n'.join(f'{name}.png' for name in names)), ('odd.txt', '/\n..\n.\n\x1b[31m\n' + 'a'*5000)): write(tmp_path/name, text)
    lines = said(load_split, tmp_path, 'train')
    assert re.search(told, lines[-1]) and all('\n' not in line for line in lines), lines


# ---- folders

def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


FOLDERS = {
    'a link to itself': lambda root: link(root/'images'/'loop', root/'images'),
    'a link to the folder above': lambda root: link(root/'images'/'up', root),
    'a link to the root of the disk': lambda root: link(root/'images'/'all', '/'),
    'a link to nothing': lambda root: link(root/'images'/'none', root/'gone'),
    'a circle of links': lambda root: [link(root/'images'/one, root/'images'/two) for one, two in ('ab', 'ba')],
    'twenty links to twenty links': lambda root: [link(root/folder/f'{n}', root/('two' if folder == 'one' else 'one')) for folder in ('one', 'two') for n in range(20)],
    'the images again by a link': lambda root: link(root/'again', root/'images'),
    'a pipe among the images': lambda root: os.mkfifo(root/'images'/'pipe.png'),
    'a pipe among the labels': lambda root: os.mkfifo(root/'labels'/'pipe.txt'),
    'a pipe of YAML': lambda root: os.mkfifo(root/'a.yaml'),
    'a folder called like an image': lambda root: (root/'images'/'folder.png').mkdir(),
    'a folder of 100 others': lambda root: (root/'/'.join('a'*100)).mkdir(parents=True),
}


@pytest.mark.parametrize('case', FOLDERS)
def test_folders(tmp_path, case):
    root = tmp_path/'mine'/'set'
    write_images(tmp_path/'mine'/'neighbour')
    for name in write_images(root/'images'): write(root/'labels'/f'{name}.txt', LINE)
    write(root/'classes.txt', 'cat')
    FOLDERS[case](root)
    with limits(): names = sorted(record.path.name for split in ('train', 'val') for record in load_split(root, split).records)
    assert names == ['p0.png', 'p1.png', 'p2.png', 'p3.png']
    write(root/'data.yaml', 'train: images\nval: images\nnames: [cat]')
    with limits(): assert len(load_split(root, 'train')) == 4


GIVEN = {
    'nothing': '',
    'what is not there': 'gone',
    'a pipe': 'pipe',
    'a device': '/dev/zero',
    'a picture': 'p0.png',
    'an empty folder': 'empty',
    'a name of 5000 letters': 'a'*5000,
    'a name with a zero': 'a\0b',
    'a name that terminals obey': 'a\x1b[31m',
    'a name that is no text': os.fsdecode(b'caf\xe9'),
}


@pytest.mark.parametrize('case', GIVEN)
def test_what_is_given_as_data(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, 1)
    os.mkfifo('pipe')
    Path('empty').mkdir()
    refused('', 'no folder|no layout|no name', load_split, GIVEN[case], 'train')
    refused('', 'no split', load_split, write_digits(tmp_path), GIVEN[case] or 'none')


def write_digits(folder):
    "A good set"
    for name in write_images(folder/'good'/'images'): write(folder/'good'/'labels'/f'{name}.txt', LINE)
    write(folder/'good'/'classes.txt', 'cat')
    return folder/'good'


# ---- images

def encoded(suffix):
    content = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(content, {'jpg': 'JPEG', 'tif': 'TIFF'}.get(suffix, suffix.upper()))
    return content.getvalue()


def two_pictures(kind):
    content = io.BytesIO()
    first, second = (Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 120, 3), np.uint8)) for seed in (0, 1))
    first.save(content, kind, save_all=True, append_images=[second])
    return content.getvalue()


def png_head(width, height, bits=8, colour=2):
    "A PNG that is nearly nothing but its head"
    def chunk(kind, content): return len(content).to_bytes(4, 'big') + kind + content + zlib.crc32(kind + content).to_bytes(4, 'big')
    head = width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + bytes([bits, colour, 0, 0, 0])
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


FORMATS = 'jpg', 'png', 'webp', 'bmp', 'tif', 'gif'
IMAGES = {f'{part} of a {suffix}': (suffix, encoded(suffix)[:int(len(encoded(suffix))*share)], 'does not decode')
          for suffix in FORMATS for part, share in (('a tenth', .1), ('a half', .5), ('nine tenths', .9))}
IMAGES |= {f'a {suffix} that lacks {less} of its bytes': (suffix, encoded(suffix)[:-less], 'does not decode')
           for suffix in FORMATS for less in (1, 2, 4, 12)}
IMAGES |= {
    'an empty file': ('jpg', b'', 'does not decode'),
    'one byte': ('png', b'\x89', 'does not decode'),
    'a web page': ('jpg', b'<html>', 'does not decode'),
    'bytes of zero': ('png', bytes(10**6), 'does not decode'),
    'noise': ('jpg', np.random.default_rng(0).bytes(10**5), 'does not decode'),
    'noise behind the head of a JPEG': ('jpg', encoded('jpg')[:20] + np.random.default_rng(0).bytes(10**4), 'does not decode'),
    'noise behind the head of a PNG': ('png', encoded('png')[:33] + np.random.default_rng(0).bytes(10**4), 'does not decode'),
    'noise behind the head of a TIFF': ('tif', encoded('tif')[:8] + np.random.default_rng(0).bytes(10**4), 'does not decode'),
    'a PNG of 30 000 x 30 000': ('png', png_head(30_000, 30_000), '30000x30000 are more than 100 megapixels; make it smaller'),
    'a PNG of 2**31 x 2**31': ('png', png_head(2**31 - 1, 2**31 - 1), 'more than 100 megapixels|does not decode'),
    'a PNG of nothing': ('png', png_head(0, 0), 'does not decode'),
    'a PNG without pixels': ('png', png_head(64, 48), 'does not decode'),
    'a PNG of 16 bits': ('png', cv2.imencode('.png', np.full((48, 64), 4000, np.uint16))[1].tobytes(), 'more than 8 bits a channel'),
    'a JPEG without its end': ('jpg', encoded('jpg')[:-2], 'does not decode'),
    'a GIF of two pictures, cut in the second': ('gif', two_pictures('GIF')[:-1000], 'does not decode'),
    'a JPEG of two pictures, cut in the second': ('jpg', two_pictures('MPO')[:-1000], 'does not decode'),
    'a photograph of a telephone': ('heic', b'\0\0\0\x18ftypheic', 'convert it to JPEG or PNG'),
    'a picture of the web': ('avif', encoded('png'), 'convert it to JPEG or PNG'),
}


@pytest.mark.parametrize('case', IMAGES)
def test_image(tmp_path, case):
    suffix, content, told = IMAGES[case]
    path = write(tmp_path/f'a.{suffix}', content)
    refused(path.name, told, read_image, path)


@pytest.mark.parametrize('case', IMAGES)
def test_image_in_training(tmp_path, case):
    suffix, content, _ = IMAGES[case]
    root = write_digits(tmp_path)
    write(root/'images'/f'q.{suffix}', content)
    write(root/'labels'/'q.txt', LINE)
    with warnings.catch_warnings(record=True) as caught, limits():
        warnings.simplefilter('always')
        detection_set = load_split(root/'images'/'..', 'train')
        items = TrainSet(detection_set, 64, Augmentation.none())
        for index in range(len(items)): items[0, index]
    assert any('q.' in str(warning.message) for warning in caught) or not any(r.path.stem == 'q' for r in detection_set.records)


def test_half_a_picture_is_none_for_the_whole_set(tmp_path):
    root = write_digits(tmp_path)
    for suffix in FORMATS: write(root/'images'/f'half_{suffix}.{suffix}', encoded(suffix)[:len(encoded(suffix))//2])
    write(root/'data.yaml', 'train: images\nval: images\nnames: [cat]')
    lines = said(load_split, root, 'train')
    assert any(re.search('x image that does not decode .half_', line) for line in lines), lines


@pytest.mark.parametrize('suffix', FORMATS)
def test_what_is_appended_to_a_picture_does_no_harm(tmp_path, suffix):
    assert read_image(write(tmp_path/f'a.{suffix}', encoded(suffix) + bytes(1000))).shape == (90, 120, 3)


ODD_FILES = {
    'a pipe': ('odd.png', os.mkfifo, 'no regular file'),
    'a link to a device': ('odd.jpg', lambda path: path.symlink_to('/dev/zero'), 'no regular file'),
    'a link to nothing': ('odd.png', lambda path: path.symlink_to('/nowhere'), 'no regular file|absent'),
    'a photograph of a telephone': ('odd.HEIC', Path.touch, 'convert to JPEG or PNG'),
    'a picture of the web': ('odd.avif', Path.touch, 'convert to JPEG or PNG'),
    'JPEG 2000': ('odd.jp2', Path.touch, 'convert to JPEG or PNG'),
}


@pytest.mark.parametrize('case', ODD_FILES)
@pytest.mark.parametrize('layout', ('classes.txt', 'data.yaml', 'detect'))
def test_an_odd_file_among_images_is_named(tmp_path, case, layout):
    name, make, told = ODD_FILES[case]
    root = write_digits(tmp_path)
    make(root/'images'/name)
    if layout == 'data.yaml': write(root/layout, YAML.replace('/train', '') + 'names: [cat]')
    lines = said(list_images, [root/'images']) if layout == 'detect' else said(load_split, root, 'train')
    named = [line for line in lines if name in line]
    if layout != 'classes.txt' or named: assert len(named) == 1 and re.search(told, named[0]), lines
    else: assert 'odd' in ' '.join(said(load_split, root, 'val'))       # a set without splits: it fell to the other


def test_kept_labels_that_are_damaged_are_read_again(tmp_path):
    root = write_digits(tmp_path)
    detection_set = load_split(root, 'train')
    path = tmp_path/'labels.npz'
    write_labels(detection_set, path)
    whole = {**np.load(path)}
    assert len(read_labels(path, root)) == len(detection_set)
    others = json.loads(whole['others'].tobytes())
    texts = [others | {name: value} for name in others for value in (None, 7, [7], {})] + [[], 7, {}, others | dict(more=1)]
    texts += [without(others, name) for name in others]
    cases = [without(whole, name) for name in whole]
    cases += [whole | {name: value} for name in whole for value in (whole[name][:-1], np.zeros((0, 6), np.float32), np.float32(7), np.full((3, 6), np.nan))]
    cases += [whole | dict(others=np.frombuffer(json.dumps(text).encode(), np.uint8)) for text in texts]
    for arrays in cases:
        np.savez(path, **arrays)
        kept = read_labels(path, root)
        assert kept is None or vars(kept).keys() == vars(detection_set).keys() and len(kept) == len(detection_set)
    for content in (b'', b'PK', b'\x93NUMPY', bytes(1000)): assert read_labels(write(path, content), root) is None
    np.save(tmp_path/'one.npy', np.zeros(3))
    assert read_labels(tmp_path/'one.npy', root) is None


def test_a_large_photograph_is_read_smaller(tmp_path):
    path = tmp_path/'large.jpg'
    pixels = np.zeros((12_288, 16_384), np.uint8)
    pixels[:6144, :8192] = 255
    path.write_bytes(cv2.imencode('.jpg', pixels)[1].tobytes())
    assert pixels.size > 2*MOST_PIXELS
    with limits(): image = read_image(path)
    assert image.shape == (3072*2, 4096*2, 3) and image[:3000, :4000].min() > 250 and image[-3000:, -4000:].max() < 5
    row = dict(id=0, file_name=path.name, height=12_288, width=16_384)
    content = coco(images=[row], annotations=[box(bbox=[0, 0, 8192, 6144])])
    for split in ('train', 'val'): write(tmp_path/'annotations'/f'instances_{split}.json', content)
    with limits():
        detection_set = load_split(tmp_path, 'val')
        canvas, placed = letterbox(detection_set.read(0), (96, 128), (row['height'], row['width']))
    assert placed.apply(detection_set.records[0].boxes).tolist() == [[0, 0, 64, 48]] and canvas[:48, :64].min() > 250


# ---- configurations

CONFIGS = {
    'an empty file': ('', 'holds no names'),
    'a list': ('- 1', 'holds no names'),
    'a word': ('epochs', 'holds no names'),
    'bytes': (b'\xe9: 1', 'not readable as text'),
    'a bracket open': ('epochs: [', 'malformed YAML'),
    'a bomb': (BOMB + 'out: *a9', 'an alias of a list'),
    '100 000 brackets': ('['*100_000, 'nested too deeply'),
    'a number of 5000 digits': (f'epochs: {"9"*5000}', 'malformed YAML'),
    'a number of 400 digits': (f'epochs: {"9"*400}', r'parameter epochs=9+\.\.\.9+: not of type int'),
    'an unknown name': ('epoch: 3', "'epoch': unknown; did you mean epochs"),
    'a name of 100 000 letters': (f'? {"a"*10**5}\n: 1', r'parameter .a+\.\.\.a+.: unknown'),
    'a key that is a list': ('? [a]\n: 1', 'malformed YAML'),
    'a date': ('out: 2020-01-01', 'parameter out=datetime.date.*: not of type str'),
    'a list as a number': ('epochs: [3]', 'parameter epochs=.3.: not of type int'),
    'a mapping as a name': ('data: {a: b}', 'parameter data=.*: not of type str'),
}


@pytest.mark.parametrize('case', CONFIGS)
def test_config_file(tmp_path, case):
    content, told = CONFIGS[case]
    refused('config.yaml', told, read_config, write(tmp_path/'config.yaml', content))


VALUES = [None, True, -2, 0, 10**400, 2**70, 1e308, math.inf, -math.inf, math.nan, [], [[1]], {'a': 1}, b'7']
VALUES += ['', 'x', '9'*5000, '1e999', '\x1b[31m', 'a'*10**5, '٣', '0x10', '1_0']


@pytest.mark.parametrize('name', [field.name for field in fields(RunConfig)])
def test_any_value_of_a_parameter(name):
    for value in VALUES:
        lines = said(lambda: check_config(make_config(RunConfig, {name: value})))
        assert len(lines) <= 1 and not any('\n' in line or len(line) > 700 for line in lines), lines


KNOBS = {
    'input_size=320000': 'more than 4096',
    'input_size=33': 'multiple of 32',
    'input_size=32': 'one pixel',
    'input_size=': 'multiple of 32',
    'input_size=0x0': 'multiple of 32',
    'device=meta': 'not available',
    'device=cpu:1': 'not available',
    'device=cuda:99': 'not available',
    'device=': 'not available',
    'device=mps': 'not available',
    'device=xla': 'not available',
    'workers=500': '-1 to 64',
    'workers=-2': 'at least -1',
    'workers=1.5': 'not of type int',
    'epochs=0': 'at least 1',
    f'epochs={10**9}': '1 to 1000000',
    f'batch_size={10**9}': '1 to 65536',
    'lr=nan': 'lr nan',
    'lr=inf': 'lr inf',
    'lr=1e308': '0 to 10',
    'seed=-1': 'seed -1',
    f'seed={2**64}': 'seed 1844',
    'optimizer=adam': 'use one of adamw, sgd',
    'precision=half': 'use one of',
    'calibration=mean': 'use one of',
    'calibration_images=0': 'at least 1',
    f'calibration_images={10**9}': '1 to 100000',
    'target=rk9999': 'use one of',
    'data=x': 'write --data',
    'epochs': 'no value',
    '=3': 'unknown',
}


@pytest.mark.parametrize('word', KNOBS)
def test_knob_of_a_command(tmp_path, word):
    code, err = command('train', '--data', tmp_path, '--out', tmp_path/'run', '-p', word)
    assert code == 2 and re.search(KNOBS[word], err) and err.count('\n') == 1, err
    assert not (tmp_path/'run').exists()


# ---- checkpoints

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint')/'best.pt'
    path.write_bytes((SHIPPED/'np.pt').read_bytes())
    return path


LISTS = [1]*3, ['cat', 7], [None], ['a']*3_000_000, []
WRONG = [(name, value) for name in ('format', 'model', 'class_names', 'input_size', 'weights') for value in (None, 7, 1.5, 'x', [], {}, b'a', torch.zeros(2))]
WRONG += [('class_names', value) for value in LISTS] + [('weights', value) for value in ({'a': 1}, {1: torch.zeros(1)}, {'a': torch.zeros(1)}, {'head': None})]
WRONG += [('input_size', value) for value in ('33x33', '320000', '32x32x32', '-32', '9'*5000)]


@pytest.mark.parametrize('number', range(len(WRONG)))
def test_checkpoint_with_a_wrong_entry(checkpoint, number):
    name, value = WRONG[number]
    path = checkpoint.with_name('wrong.pt')
    write_checkpoint(path, torch.load(checkpoint) | {name: value})
    refused('wrong.pt', 'give|comes from another', load_model, path)
    write_checkpoint(path, without(torch.load(checkpoint), name))
    refused('wrong.pt', 'give', load_model, path)


FILES = {'an empty file': b'', 'a text': b'a text', 'bytes of zero': bytes(10**5), 'an archive of nothing': b'PK\x05\x06' + bytes(18), 'a pickle': b'\x80\x02}q\x00.'}


@pytest.mark.parametrize('case', FILES)
def test_file_that_is_no_checkpoint(tmp_path, case):
    refused('a.pt', 'not a readable checkpoint', read_checkpoint, write(tmp_path/'a.pt', FILES[case]))


def test_other_places_of_checkpoints(tmp_path):
    os.mkfifo(tmp_path/'pipe.pt')
    for name in ('gone.pt', 'pipe.pt', '', '\x1b[31m', 'a'*5000): refused('', 'no such checkpoint', read_checkpoint, tmp_path/name)
    refused('zero', 'no such checkpoint', read_checkpoint, '/dev/zero')


def test_archive_that_grows(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.pt', 'w', zipfile.ZIP_DEFLATED) as archive: archive.writestr('archive/data.pkl', bytes(10**8))
    refused('a.pt', 'an archive that grows', read_checkpoint, tmp_path/'a.pt')


class Shout:
    def __reduce__(self): return print, ('run by a checkpoint',)


def test_checkpoint_that_runs_a_program(tmp_path, capsys):
    torch.save(dict(format='yolov9001', weights=Shout()), tmp_path/'a.pt')
    refused('a.pt', 'not a readable checkpoint', read_checkpoint, tmp_path/'a.pt')
    assert 'run by' not in capsys.readouterr().out


@pytest.mark.parametrize('share', np.linspace(0, .999, 24))
def test_checkpoint_with_a_flipped_byte_or_cut_off(checkpoint, share):
    content = bytearray(checkpoint.read_bytes())
    place = int(len(content)*share)
    refused('cut.pt', 'not a readable checkpoint', read_checkpoint, write(checkpoint.with_name('cut.pt'), bytes(content[:place])))
    content[place] ^= 255
    path = write(checkpoint.with_name('flipped.pt'), bytes(content))
    lines = said(read_checkpoint, path)
    if lines: assert 'flipped.pt: ' in lines[0]
    else:                                               # between two entries of the archive
        flipped, whole = (torch.load(one)['weights'].values() for one in (path, checkpoint))
        assert all(a.equal(b) for a, b in zip(flipped, whole))


STATE = dict(config={}, batch=0, sums={}, seconds=0., history=[], best=0., updates=0, model={}, optimizer={})


@pytest.mark.parametrize('name', STATE)
def test_state_with_a_wrong_entry(tmp_path, name):
    known = dict(format='yolov9001', model='np', class_names=['cat'], input_size='64', epoch=1, weights={})
    for state in (without(STATE, name), STATE | {name: 'x'}, STATE | {name: None}, 7, []):
        write_checkpoint(tmp_path/'last.pt', known | dict(state=state))
        refused('last.pt', 'train again with --overwrite', read_state, tmp_path/'last.pt')


# ---- ONNX

def external(place):
    "Weights in another file"
    def change(model):
        onnx.external_data_helper.set_external_data(model.graph.initializer[0], place)
        model.graph.initializer[0].ClearField('raw_data')
    return change


def node(**changes):
    "The second operator changed"
    def change(model):
        for name, value in changes.items(): setattr(model.graph.node[1], name, value)
    return change


def edge(name): return lambda model: model.graph.node[2].input.__setitem__(0, name)
def weight(content): return lambda model: setattr(model.graph.initializer[0], 'raw_data', content)
def shape_of(*sides): return lambda model: model.graph.input[0].CopyFrom(helper.make_tensor_value_info('images', 1, sides))


def several(model): model.graph.input.append(helper.make_tensor_value_info('more', 1, [1, 3, 64, 96]))
def circle(model): model.graph.node[0].input[0] = model.graph.node[-1].output[0]
def twice(model): model.graph.node.append(model.graph.node[0])
def vendor(model):
    model.graph.node[1].domain = 'mine'
    model.opset_import.append(helper.make_opsetid('mine', 1))
def huge(model): model.graph.initializer[0].dims[:] = [10**9, 10**9, 3, 3]
def negative(model): model.graph.initializer[0].dims[:] = [-16, 3, 3, 3]


MODELS = {
    'an unknown operator': (node(op_type='Frobnicate'), 'No Op registered for Frobnicate'),
    'an operator without a name': (node(op_type=''), 'broken'),
    'an operator that terminals obey': (node(op_type='\x1b[31m'), 'broken'),
    'an operator of 100 000 letters': (node(op_type='a'*10**5), 'broken'),
    'an operator of a vendor': (vendor, 'operator Relu of mine is unknown'),
    'a vendor that is not imported': (node(domain='mine'), 'operator Relu of mine is unknown'),
    'an edge to nowhere': (edge('nowhere'), "input 'nowhere'"),
    'an empty edge': (edge(''), 'broken'),
    'a circle': (circle, 'broken'),
    'an operator twice': (twice, 'broken'),
    'opset 999': (lambda model: setattr(model.opset_import[0], 'version', 999), 'opset 999, we know those up to'),
    'opset 0': (lambda model: setattr(model.opset_import[0], 'version', 0), 'broken'),
    'opset -1': (lambda model: setattr(model.opset_import[0], 'version', -1), 'broken'),
    'no opset': (lambda model: model.ClearField('opset_import'), 'broken'),
    'version 99': (lambda model: setattr(model, 'ir_version', 99), 'ir_version 99'),
    'version 0': (lambda model: setattr(model, 'ir_version', 0), 'broken'),
    'no weights': (lambda model: model.graph.ClearField('initializer'), 'broken'),
    'weights without bytes': (weight(b''), 'broken'),
    'weights of three bytes': (weight(b'123'), 'broken'),
    'weights of 10**18 numbers': (huge, 'broken'),
    'weights below zero': (negative, 'broken'),
    'weights of an unknown kind': (lambda model: setattr(model.graph.initializer[0], 'data_type', 99), 'broken'),
    'weights in the folder above': (external('../secret.bin'), 'broken'),
    'weights in /etc': (external('/etc/passwd'), 'broken'),
    'weights that are not there': (external('gone.bin'), 'broken'),
    'weights in a pipe': (external('pipe.bin'), 'broken'),
    'weights behind a link': (external('link.bin'), 'outside its folder'),
    'no operators': (lambda model: model.graph.ClearField('node'), 'without operators'),
    'no input': (lambda model: model.graph.ClearField('input'), 'broken|0 inputs'),
    'two inputs': (several, '2 inputs'),
    'no output': (lambda model: model.graph.ClearField('output'), 'broken|no output'),
    'an output that is not made': (lambda model: setattr(model.graph.output[0], 'name', 'gone'), 'broken'),
    'an open size': (shape_of(1, 3, None, None), 'fixed 1x3xHxW'),
    'a size below zero': (shape_of(1, 3, -64, 96), 'fixed 1x3xHxW|broken'),
    'five sides': (shape_of(1, 3, 64, 96, 1), 'fixed 1x3xHxW'),
    'no sides': (shape_of(), 'fixed 1x3xHxW'),
    'colours last': (shape_of(1, 64, 96, 3), 'colours first'),
    'an input of words': (lambda model: setattr(model.graph.input[0].type.tensor_type, 'elem_type', 8), 'export it'),
    'an input of an unknown kind': (lambda model: setattr(model.graph.input[0].type.tensor_type, 'elem_type', 99), 'broken|export it'),
}


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('onnx')/'files'
    folder.mkdir()
    os.mkfifo(folder/'pipe.bin')
    os.mkfifo(folder/'pipe.onnx')
    write(folder.parent/'secret.bin', bytes(10**5))
    (folder/'link.bin').symlink_to(folder.parent/'secret.bin')
    return toy_detector(folder/'toy.onnx')


@pytest.mark.parametrize('case', MODELS)
def test_onnx_that_nobody_compiles(toy, case):
    change, told = MODELS[case]
    model = onnx.load(toy)
    change(model)
    refused('wrong.onnx', told, read_onnx, write(toy.with_name('wrong.onnx'), model.SerializeToString()))


CALLED_ONNX = {'best.pt': 'a PyTorch checkpoint', 'np.rknn': 'an RKNN model', 'a pickle': 'a pickle of Python'}


@pytest.mark.parametrize('case', CALLED_ONNX)
def test_another_file_that_is_called_onnx(tmp_path, checkpoint, case):
    contents = {'best.pt': checkpoint.read_bytes(), 'np.rknn': (SHIPPED/'np.rknn').read_bytes(), 'a pickle': b'\x80\x02}q\x00.'}
    path = write(tmp_path/'a.onnx', contents[case])
    for words in (['bench', path], ['val', path, '--data', write_digits(tmp_path)]):
        code, err = command(*words)
        assert code == 2 and f'a.onnx: {CALLED_ONNX[case]}' in err.splitlines()[-1] and 'yolov9001 export' in err, err


NO_MODELS = {'an empty file': b'', 'a text': b'hello, I am a text', 'bytes of zero': bytes(10**5), 'noise': np.random.default_rng(0).bytes(10**5)}


@pytest.mark.parametrize('case', NO_MODELS)
def test_file_that_is_no_onnx(toy, case):
    path = write(toy.with_name('wrong.onnx'), NO_MODELS[case])
    for read in (read_onnx, read_metadata): refused('wrong.onnx', 'export|give', read, path)


@pytest.mark.parametrize('share', np.linspace(0, .999, 24))
def test_onnx_with_a_flipped_byte_or_cut_off(toy, share):
    content = bytearray(Path(toy).read_bytes())
    place = int(len(content)*share)
    for name, damaged in (('cut.onnx', content[:place]), ('flipped.onnx', content[:place] + bytes([content[place] ^ 255]) + content[place + 1:])):
        lines = said(read_onnx, write(toy.with_name(name), bytes(damaged)))
        assert not lines or f'{name}: ' in lines[0] and len(lines) == 1 and '\n' not in lines[0], lines


NAMES = json.dumps([f'class {number}' for number in range(20)])
METADATA = [('box_code', 'dfl'), ('box_code', ''), ('box_code', 'a'*10**5), ('strides', '8'), ('strides', '\x1b[31m'), ('input_size', ''), ('input_size', '100'), ('input_size', '64x64'), ('input_size', '9'*5000),
            ('class_names', ''), ('class_names', 'cat'), ('class_names', '7'), ('class_names', '{}'), ('class_names', '[]'), ('class_names', '[1]'), ('class_names', '["a"]'), ('class_names', '['*10**5), ('class_names', '9'*5000),
            ('class_names', json.dumps(['cat']*3_000_000)), ('box_code', None), ('strides', None), ('input_size', None), ('class_names', None)]


@pytest.mark.parametrize('number', range(len(METADATA)))
def test_metadata_of_somebody_else(tmp_path, number):
    name, value = METADATA[number]
    model = onnx.load(SHIPPED/'np_int8.onnx')
    known = {row.key: row.value for row in model.metadata_props}
    helper.set_model_props(model, without(known, name) | ({name: value} if value is not None else {}))
    refused('wrong.onnx', 'give|export it again', read_metadata, write(tmp_path/'wrong.onnx', model.SerializeToString()))


@pytest.mark.parametrize('name', ('val', 'detect', 'bench', 'compare'))
@pytest.mark.parametrize('case', ('an unknown operator', 'an edge to nowhere', 'opset 999', 'no weights', 'weights in the folder above', 'a pipe', 'a device', 'nothing'))
def test_every_command_refuses_an_onnx_file_at_once(toy, tmp_path, case, name):
    path = dict(zip(('a pipe', 'a device', 'nothing'), (toy.with_name('pipe.onnx'), Path('/dev/null.onnx'), tmp_path/'gone.onnx'))).get(case)
    if not path:
        model = onnx.load(toy)
        MODELS[case][0](model)
        path = write(toy.with_name('wrong.onnx'), model.SerializeToString())
    data = write_digits(tmp_path)
    words = dict(val=[path, '--data', data], detect=[path, data/'images', '--out', tmp_path/'out'],
        bench=[path, '--json', tmp_path/'out.json'], compare=['--data', data, '--models', path, '--out', tmp_path/'out'])
    code, err = command(name, *words[name])
    assert code == 2 and path.name in err.splitlines()[-1] and 'Traceback' not in err, err
    assert not (tmp_path/'out').exists() and not (tmp_path/'out.json').exists()


CARDS = [('onnx', '../../np_int8.onnx'), ('onnx', 7), ('onnx', ''), ('calibration', None), ('target', None), ('onnx_sha256', 7), ('input_size', 'x'), ('rknn_sha256', 'x'), ('rknn_sha256', None)]


@pytest.mark.parametrize('number', range(len(CARDS) + 4))
def test_card_of_a_compiled_model(tmp_path, number):
    for name in ('np.rknn', 'np.rknn.json', 'np_int8.onnx'): write(tmp_path/name, (SHIPPED/name).read_bytes())
    card = json.loads((tmp_path/'np.rknn.json').read_text())
    text = json.dumps(card | dict(CARDS[number:number + 1])) if number < len(CARDS) else ('', '[]', '7', '['*10**5)[number - len(CARDS)]
    write(tmp_path/'np.rknn.json', text)
    refused('np.rknn', 'copy|keep|not a|Expecting', source_of, tmp_path/'np.rknn')


# ---- commands

def test_an_empty_out_is_refused_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_digits(tmp_path)
    before = sorted(tmp_path.rglob('*'))
    given = [[name, '--data', data] for name in ('train', 'run', 'compare')]
    for words in (*given, ['data', data], ['detect', data/'images'], ['export', 'pretrained']):
        code, err = command(*words, '--out', '')
        assert code == 2 and "--out '': no name" in err and err.count('\n') == 1, err
    assert sorted(tmp_path.rglob('*')) == before


NO_FOLDERS = {
    'a file': (lambda path: path.touch(), '', 'out: is a file'),
    'under a file': (lambda path: path.touch(), '/sub', 'out is a file'),
    'a pipe': (os.mkfifo, '', 'out: is a device or pipe'),
    'a device': (lambda path: path.symlink_to('/dev/null'), '', 'out: is a device or pipe'),
    'a link to nothing': (lambda path: path.symlink_to('/nowhere/at/all'), '', 'out: is a link to nothing'),
}


@pytest.mark.parametrize('case', NO_FOLDERS)
@pytest.mark.parametrize('name', ('train', 'run', 'compare', 'data', 'detect', 'export'))
def test_an_out_that_is_no_folder(tmp_path, case, name):
    make, more, told = NO_FOLDERS[case]
    data = write_digits(tmp_path)
    make(tmp_path/'out')
    def state(): return [getattr(os.lstat(tmp_path/'out'), f'st_{name}') for name in ('mode', 'ino', 'size', 'mtime_ns')]
    before = state()
    words = dict(data=[data], detect=[data/'images'], export=['pretrained']).get(name, ['--data', data])
    code, err = command(name, *words, '--out', f'{tmp_path}/out{more}')
    assert code == 2 and err.count('\n') == 1, err
    assert re.search('give an --out that ends in .onnx' if name == 'export' else f'{told}; give the name of a folder', err), err
    assert state() == before


def test_names_that_terminals_obey_are_shown_escaped(tmp_path, capsys):
    root = write_digits(tmp_path)
    write(root/'classes.txt', 'ca\x1b[31mt')
    checkpoint = torch.load(SHIPPED/'np.pt')
    weights = {name: w[:1] if w.shape[:1] == (20,) else w for name, w in checkpoint['weights'].items()}
    write_checkpoint(tmp_path/'a.pt', checkpoint | dict(class_names=['ca\x1b[31mt'], weights=weights))
    assert main(['val', str(tmp_path/'a.pt'), '--data', str(root)]) == 0
    shown = capsys.readouterr()
    assert r'ca\x1b[31mt' in shown.out and '\x1b' not in shown.out + shown.err.replace('\x1b[A', '')


def test_resume_from_another_folder(tmp_path, monkeypatch):
    write_digits(tmp_path)
    knobs = [word for value in ('weights=none', 'input_size=64', 'epochs=1', 'batch_size=4', 'device=cpu') for word in ('-p', value)]
    monkeypatch.chdir(tmp_path)
    assert command('train', '--data', 'good', '--out', 'run', *knobs)[0] == 0
    (tmp_path/'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path/'elsewhere')
    code, err = command('train', '--out', '../run', '--resume')
    assert code == 0, err
    assert not any((tmp_path/'elsewhere').iterdir())


def test_detect_skips_and_names_what_it_cannot_use(tmp_path):
    folder = tmp_path/'images'
    write_images(folder, 2, '.jpg')
    write_images(folder/'other', 1, '.jpg')
    os.rename(folder/'other'/'p0.jpg', folder/('a'*250 + '.jpg'))           # 254 bytes
    os.mkfifo(folder/'pipe.jpg')
    link(folder/'again.jpg', folder/'p1.jpg')
    for suffix in FORMATS: write(folder/f'half_{suffix}.{suffix}', encoded(suffix)[:len(encoded(suffix))//2])
    write(folder/'large.png', png_head(30_000, 30_000))
    code, err = command('detect', folder, folder, '--out', tmp_path/'out')
    assert code == 0, err
    for name in (*(f'half_{suffix}.{suffix}' for suffix in FORMATS), 'large.png'): assert f'{name}: ' in err, err
    drawn = {path.name for path in (tmp_path/'out').glob('*.jpg')}
    assert 'p0.jpg' in drawn and len(drawn & {'p1.jpg', 'again.jpg'}) == 1 and not any('half' in name for name in drawn)
    assert 'a'*250 + '.jpg' in drawn or 'too long' in err


NOT_UTF8 = '''
import os, sys, warnings
from pathlib import Path
import cv2, numpy as np
from yolov9001.cli import main
from yolov9001.data.augment import TrainSet
from yolov9001.data.formats import load_split
from yolov9001.data.images import read_image
from yolov9001.npu.board import Frame, Writer, read_images
root = Path(sys.argv[1])
for number in range(10):
    name = os.fsdecode(b'caf\\xe9%d' % number)
    for place, content in (('images', cv2.imencode('.jpg', np.full((48, 64, 3), 9*number, np.uint8))[1].tobytes()), ('labels', b'0 .5 .5 .4 .4')):
        (root/place).mkdir(exist_ok=True)
        (root/place/(name + dict(images='.jpg', labels='.txt')[place])).write_bytes(content)
(root/'classes.txt').write_text('cat')
image = next((root/'images').iterdir())
assert read_image(image).shape == (48, 64, 3)
items = TrainSet(load_split(root, 'train'), 64)
assert items[0, 0][0].shape == (3, 64, 64)
assert len(list(read_images(str(root/'images')))) == 10
for words in (['detect', root/'images', '--out', root/'out', '--confidence', '0'], ['data', root, '--out', root/'page', '--convert', root/'coco']):
    assert main([*map(str, words)]) == 0, words
assert len(list((root/'out').glob('*.jpg'))) == 10 and 'caf' in (root/'page'/'data.html').read_text()
assert load_split(root/'coco', 'val').read(0).shape == (48, 64, 3)
print('all of', os.fsdecode(b'caf\\xe9'))
'''


def test_names_that_are_no_text(tmp_path):
    done = subprocess.run([sys.executable, '-c', NOT_UTF8, tmp_path], capture_output=True, timeout=240)
    assert done.returncode == 0 and b'all of caf' in done.stdout, done.stderr.decode(errors='replace')[-3000:]
