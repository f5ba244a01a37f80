"What bad data sets get: each message names the file and the remedy"
import json
import re
import warnings

import cv2
import numpy as np
import pytest

from yolov9001.core import InputError
from yolov9001.data.augment import Augmentation, TrainSet
from yolov9001.data.dataset import make_digits
from yolov9001.data.formats import load_split


def coco(**changes):
    "A good COCO file with parts replaced"
    good = dict(images=[dict(id=n, file_name=f'{n}.png', height=64, width=96) for n in (1, 2)],
        annotations=[dict(id=n, image_id=n, category_id=1, bbox=[10, 10, 20, 20]) for n in (1, 2)],
        categories=[dict(id=1, name='cat'), dict(id=2, name='dog')])
    return {**good, **changes}


def write_image(path, height=64, width=96):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def load(tmp_path):
    "Writes a COCO folder around the given content and loads it; warnings are returned too"
    def run(content, split='train', images='images'):
        for name in ('1.png', '2.png'): write_image(tmp_path/images/name)
        path = tmp_path/'annotations'/'instances_train.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        (path.parent/'instances_val.json').write_text(path.read_text())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            return load_split(tmp_path, split), [said for warning in caught if 'no box in train for' not in (said := str(warning.message))]
    return run


def test_good_set_has_nothing_to_say(load):
    detection_set, said = load(coco(categories=[dict(id=1, name='cat')]))
    assert (len(detection_set), detection_set.skipped, said) == (2, {}, [])
    assert detection_set.records[1].boxes.tolist() == [[10, 10, 30, 30]]


def test_images_of_a_split_in_their_own_folder(load):
    assert load(coco(), images='images/train')[0].records[0].path.parent.name == 'train'


BROKEN = {
    'cut short': ('{"images": [', r'line 1, column 13.*export'),
    'a list': ([], r"no list 'images'"),
    'no categories key': ({k: v for k, v in coco().items() if k != 'categories'}, r"no list 'categories'"),
    'no categories': (coco(categories=[]), r'no categories'),
    'no images': (coco(images=[]), r'no images'),
    'no annotations': (coco(annotations=[]), r'no usable box in 2 images.*check'),
    'image id twice': (coco(images=coco()['images'][:1]*2), r'images hold 1 more than once; .*remove'),
    'category id twice': (coco(categories=coco()['categories'][:1]*2), r'categories hold 1 more than once; rename'),
    'category name twice': (
        coco(categories=[dict(id=1, name='cat'), dict(id=2, name='cat')]), r"hold 'cat' more than once"),
    'no bbox': (
        coco(annotations=[dict(image_id=1, category_id=1)]), r"annotations\[0\] has no proper 'bbox'; correct or remove"),
    'image id a list': (
        coco(annotations=[dict(image_id=[1], category_id=1, bbox=[1, 1, 5, 5])]), r"no proper 'image_id'"),
    'no file name': (coco(images=[dict(id=1, height=64, width=96)]), r"images\[0\] has no proper 'file_name'"),
    'all absent': (
        coco(images=[dict(id=1, file_name='gone.png', height=64, width=96)]),
        r'none of its 1 images is there, not .*images/.*correct each file_name'),
    'only crowds': (
        coco(annotations=[dict(image_id=1, category_id=1, bbox=[1, 1, 9, 9], iscrowd=1)]), r'no usable box'),
}


@pytest.mark.parametrize('case', BROKEN)
def test_broken_set_stops(load, case):
    content, expected = BROKEN[case]
    with pytest.raises(InputError, match=expected) as caught: load(content)
    assert 'instances_train.json' in str(caught.value) and '\n' not in str(caught.value)


SKIPPED = {
    'box of zero size': (dict(bbox=[10, 10, 0, 5]), '1.png'),
    'box outside its image': (dict(bbox=[200, 10, 5, 5]), '1.png'),
    'box with a value that is no number': (dict(bbox=[10, 'x', 5, 5]), '1.png'),
    'box of an unknown category': (dict(category_id=9), '1.png'),
    'box of an image that is not listed': (dict(image_id=9), 'image_id 9'),
}


@pytest.mark.parametrize('reason', SKIPPED)
@pytest.mark.parametrize('times', (1, 3))
def test_bad_box_is_counted_and_skipped(load, reason, times):
    change, place = SKIPPED[reason]
    bad = {**coco()['annotations'][0], **change}
    detection_set, said = load(coco(annotations=coco()['annotations'] + [bad]*times))
    assert detection_set.skipped == {reason: times}
    told = f"{times} x {reason} ({place}{', ...' if times > 1 else ''})"
    assert len(said) == 1 and told in said[0] and 'instances_train.json' in said[0]
    assert [len(record.boxes) for record in detection_set.records] == [1, 1]


@pytest.mark.parametrize('bbox', ([float('nan'), 1, 5, 5], [1, 2, 3], None, [1, 2, float('inf'), 4], {}))
def test_box_that_is_not_four_numbers(load, bbox):
    bad = {**coco()['annotations'][0], 'bbox': bbox}
    assert load(coco(annotations=coco()['annotations'] + [bad]))[0].skipped == {'box with a value that is no number': 1}


def test_box_partly_outside_is_clipped(load):
    bad = {**coco()['annotations'][0], 'bbox': [-10, 50, 30, 30]}
    detection_set = load(coco(annotations=[bad]))[0]
    assert detection_set.skipped == {'box clipped to its image': 1}
    assert detection_set.records[0].boxes.tolist() == [[0, 50, 20, 64]]


def test_image_of_another_size_than_annotated(load):
    images = [coco()['images'][0], {**coco()['images'][1], 'width': 100}]
    detection_set, said = load(coco(images=images))
    assert len(detection_set) == 1 and '1 x image of another size than annotated (2.png)' in said[0]


def test_file_that_is_no_image(load, tmp_path):
    (tmp_path/'images').mkdir()
    (tmp_path/'images'/'3.png').write_text('a web page')
    images = coco()['images'] + [dict(id=3, file_name='3.png', height=64, width=96)]
    detection_set, said = load(coco(images=images))
    assert detection_set.skipped == {'image that does not decode': 1} and '(3.png)' in said[0]


def test_orientation_follows_the_annotated_size(tmp_path, load):
    from PIL import Image
    load(coco())
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48] = 255
    exif = Image.Exif()
    exif[274] = 6 # the camera was turned: shown 96 high and 64 wide
    Image.fromarray(pixels).save(tmp_path/'images'/'turned.jpg', exif=exif, quality=95)
    for height, width in ((64, 96), (96, 64)):
        detection_set = load(coco(images=[dict(id=1, file_name='turned.jpg', height=height, width=width)],
            annotations=coco()['annotations'][:1]))[0]
        image = detection_set.read(0)
        assert image.shape == (height, width, 3)
        assert image[:height//4, :width//4].mean() > 250
        bottom_left = image[-(height//4):, :width//4].mean()
        assert bottom_left > 250 if height == 64 else bottom_left < 5


@pytest.mark.parametrize('seen', (False, True))
def test_orientation_that_sizes_do_not_tell_is_that_of_the_split(tmp_path, load, seen):
    from PIL import Image
    load(coco())
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:20, :20] = 255
    for name, orientation in (('upside_down', 3), ('turned', 6)):
        exif = Image.Exif()
        exif[274] = orientation
        for kind in ('jpg', 'mpo'): Image.fromarray(pixels).save(tmp_path/'images'/f'{name}.{kind}', exif=exif, quality=95)
    images = [dict(id=i, file_name=f'{name}.{kind}', height=height, width=width) for i, (name, kind, height, width) in enumerate(
        [('upside_down', kind, 64, 96) for kind in ('jpg', 'mpo')] + [('turned', kind, *((96, 64) if seen else (64, 96))) for kind in ('jpg', 'mpo')])]
    corners = [(76, 44), (76, 44), (44, 0), (44, 0)] if seen else [(0, 0)] * 4
    annotations = [dict(image_id=i, category_id=1, bbox=[*corner, 20, 20]) for i, corner in enumerate(corners)]
    detection_set = load(coco(images=images, annotations=annotations))[0]
    assert len(detection_set) == 4
    for i, (x, y) in enumerate(corners): assert detection_set.read(i)[y:y + 20, x:x + 20].mean() > 245


def test_normalized_boxes_are_refused(load):
    with pytest.raises(InputError, match='less than two pixels wide and high; write them in pixels'):
        load(coco(annotations=[dict(image_id=1, category_id=1, bbox=[.1, .2, .3, .4])]))


def test_crowds_reach_the_evaluator_only(load):
    crowd = dict(image_id=2, category_id=2, bbox=[0, 0, 50, 50], iscrowd=1, area=77)
    detection_set = load(coco(annotations=[coco()['annotations'][0], crowd]))[0]
    assert [len(record.boxes) for record in detection_set.records] == [1, 0]
    truth = detection_set.coco_ground_truth()['annotations']
    keys = ('id', 'image_id', 'category_id', 'iscrowd', 'area')
    assert [tuple(a[key] for key in keys) for a in truth] == [(1, 1, 1, 0, 400), (2, 2, 2, 1, 77)]


def test_folder_that_is_no_data_set(tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path)) + ': found no labels beside no images'): load_split(tmp_path, 'train')


@pytest.fixture
def yolo(tmp_path):
    "A good YOLO set whose data.yaml holds the given text"
    def write(text='train: images/train\nval: [images/train]\nnames: {0: cat, 1: dog}\n', label='1 .5 .5 .25 .25\n'):
        write_image(tmp_path/'images'/'train'/'1.png')
        (tmp_path/'labels'/'train').mkdir(parents=True, exist_ok=True)
        (tmp_path/'labels'/'train'/'1.txt').write_text(label)
        (tmp_path/'data.yaml').write_text(text)
        return tmp_path/'data.yaml'
    return write


def test_yolo_file_or_folder_string_or_list(yolo):
    path = yolo()
    for root, split in ((path, 'train'), (path.parent, 'val')):
        record = load_split(root, split).records[0]
        assert (record.boxes.tolist(), record.classes.tolist()) == ([[36, 24, 60, 40]], [1])


@pytest.mark.parametrize('text, expected', (
    ('names: [a\n', r'malformed YAML.*line 2, column 1'),
    ('train: images/train\n', r'no class names; add'),
    ('names: [cat, cat]\ntrain: images/train\n', r"names hold 'cat' more than once"),
    ('names: {cat: 0}\ntrain: images/train\n', r'no class numbers; write'),
    ('names: [cat, dog]\nval: images/train\n', r"no split 'train'; the splits there are: val"),
    ('names: [cat, dog]\ntrain: labels\n', r'no images for the split train'),
    ('names: [cat]\ntrain: images/train\n', r'no usable box.*1 x box of an unknown category'),
))
def test_broken_yaml_stops(yolo, text, expected):
    with pytest.raises(InputError, match='data.yaml: .*' + expected): load_split(yolo(text), 'train')


def test_yolo_folder_that_is_missing(yolo):
    with pytest.raises(InputError, match=r'images/nowhere: missing; .*data.yaml'):
        load_split(yolo('names: [cat, dog]\ntrain: images/nowhere\n'), 'train')


def test_yolo_bad_lines_are_counted(yolo):
    path = yolo(label='1 .5 .5 .25 .25\n1 .5\nnan .5 .5 .1 .1\n1 .5 .5 0 .1\n')
    with pytest.warns(UserWarning, match='data.yaml: 1 x label line .*txt line 2'): detection_set = load_split(path, 'train')
    assert sum(detection_set.skipped.values()) == 3 and len(detection_set.records[0].boxes) == 1


def test_damaged_image_without_cache_never_stops_an_epoch(load, tmp_path):
    detection_set = load(coco())[0]
    path = tmp_path/'images'/'2.png'
    path.write_bytes(path.read_bytes()[:100])
    train_set = TrainSet(detection_set, 64, Augmentation.none(), packed=False)
    with pytest.warns(UserWarning, match='2.png: does not decode, 1 such.*replace'): image, _ = train_set[0, 1]
    assert image.equal(train_set[0, 0][0])


def test_digits_never_overwrite_a_folder(tmp_path):
    (tmp_path/'mine').mkdir()
    with pytest.raises(InputError, match='mine.*remove it or name another'):
        make_digits(tmp_path/'mine', train=1, val=1)
    assert not list((tmp_path/'mine').iterdir())
