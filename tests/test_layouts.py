"Whatever a labelling tool wrote is read rightly, or refused in a line that helps: a test a row of the tables of issue 33"
import json
import warnings

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from yolov9001.core import InputError
from yolov9001.data.augment import Augmentation, TrainSet, collate
from yolov9001.data.dataset import sample_images
from yolov9001.data.formats import FORMATS, choose_val, load_split
from yolov9001.data.images import read_image

BOX = [10, 10, 30, 30]                                          # in images of 48 x 64


def write_images(folder, count=10, suffix='.png', first=0):
    "Images of noise; their names"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), np.uint8)
        cv2.imwrite(str(folder/f'p{number}{suffix}'), pixels)
    return [f'p{number}' for number in range(first, first + count)]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def read(root, split='train'):
    "A split, and what was said about it"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return load_split(root, split), [str(warning.message) for warning in caught]


def boxes(root, split='train'): return [record.boxes.tolist() for record in read(root, split)[0].records]


def coco(names, prefix='', **changes):
    "COCO for images p0, p1, ..."
    images = [dict(id=i, file_name=f'{prefix}{name}.png', height=48, width=64) for i, name in enumerate(names, 1)]
    annotations = [dict(id=i, image_id=i, category_id=1, bbox=[10, 10, 20, 20]) for i in range(1, len(names) + 1)]
    return dict(images=images, annotations=annotations, categories=[dict(id=1, name='cat')]) | changes


def voc(first=11, difficult=0, size='<size><width>64</width><height>48</height></size>'):
    return (f'<annotation>{size}<object><name>cat</name><difficult>{difficult}</difficult><bndbox><xmin>{first}</xmin>'
        f'<ymin>{first}</ymin><xmax>30</xmax><ymax>30</ymax></bndbox></object></annotation>')


LINE = '0 .3125 .4166667 .3125 .4166667'                        # BOX in YOLO's form
LABELME = dict(shapes=[dict(label='cat', points=[[30, 30], [10, 10]], shape_type='rectangle')], imageHeight=48, imageWidth=64)
CSV = 'filename,width,height,class,xmin,ymin,xmax,ymax\n'


# ---- silent and wrong before

@pytest.fixture
def yolo(tmp_path):
    "A YOLO set of one image with the given lines; the path of its YAML"
    def make(lines, yaml='names: [cat]\n'):
        write_images(tmp_path/'images'/'train', 1)
        write(tmp_path/'labels'/'train'/'p0.txt', lines)
        return write(tmp_path/'data.yaml', f'train: images/train\nval: images/train\n{yaml}')
    return make


def test_yolo_line_with_confidence_and_track(yolo):
    for more in ('', ' .9', ' .9 1', ' .9 12'):
        assert np.allclose(boxes(yolo('0 .5 .5 .4 .4' + more)), [[[19.2, 14.4, 44.8, 33.6]]])


def test_yolo_outline_lies_in_the_image(yolo):
    with pytest.warns(UserWarning, match='1 x label line'): detection_set = load_split(yolo(f'{LINE}\n0 .1 .1 1.4 .1 .5 .5'), 'train')
    assert len(detection_set.records[0].boxes) == 1
    assert np.allclose(boxes(yolo('0 .25 .25 .75 .25 .75 .75')), [[[16, 12, 48, 36]]])


def test_yolo_keypoints_are_not_an_outline(yolo):
    pose = LINE + ' .9 .9'*17
    assert np.allclose(boxes(yolo(pose, 'names: [cat]\nkpt_shape: [17, 2]\n')), [[BOX]], atol=1e-3)


@pytest.mark.parametrize('suffix', ('.png', '.tif'))
@pytest.mark.parametrize('channels', ((), (3,)))
def test_16_bits_are_refused_by_name(tmp_path, suffix, channels):
    names = write_images(tmp_path/'images', 2)
    deep = tmp_path/'images'/f'deep{suffix}'
    cv2.imwrite(str(deep), np.random.default_rng(0).integers(0, 4096, (48, 64, *channels)).astype(np.uint16))
    content = coco([*names, 'deep'])
    content['images'][2]['file_name'] = deep.name
    for split in ('train', 'val'): write(tmp_path/'annotations'/f'instances_{split}.json', content)
    detection_set, said = read(tmp_path)
    assert detection_set.skipped == {'image of more than 8 bits a channel': 1} and deep.name in said[0]
    with pytest.raises(InputError, match=f'{deep.name}: more than 8 bits a channel; convert'): read_image(deep)


def test_the_folder_of_the_split_comes_first(tmp_path):
    Image.new('RGB', (64, 48), 'red').save(write_images(tmp_path/'images', 0) or tmp_path/'images'/'p0.png')
    for split, colour in (('val', 'blue'), ('train', 'green')):
        (tmp_path/'images'/split).mkdir()
        Image.new('RGB', (64, 48), colour).save(tmp_path/'images'/split/'p0.png')
        write(tmp_path/'annotations'/f'instances_{split}.json', coco(['p0']))
    assert [load_split(tmp_path, split).read(0)[0, 0].tolist() for split in ('train', 'val')] == [[0, 128, 0], [0, 0, 255]]


def test_yolo_nc_beside_other_names(yolo):
    assert any('nc is 3 but names has 1' in text for text in read(yolo(LINE, 'nc: 3\nnames: [cat]\n'))[1])


def test_class_without_a_box_in_train(yolo):
    assert any('no box in train for 1 of 2 classes (dog)' in text for text in read(yolo(LINE, 'names: [cat, dog]\n'))[1])


def test_half_of_the_images_without_a_label_file(yolo, tmp_path):
    path = yolo(LINE)
    assert not any('label file' in text for text in read(path)[1])
    write_images(tmp_path/'images'/'train', 1, first=1)
    said = ' '.join(read(path)[1])
    assert '1 of 2 images have no label file' in said and 'labels/train/p1.txt' in said


def test_yolo_path_that_is_not_there(yolo, tmp_path):
    said = read(yolo(LINE, 'names: [cat]\npath: /home/somebody/pets\n'))[1]
    assert any('its path /home/somebody/pets is not there' in text for text in said)


def test_yolo_parent_folder_of_a_neighbour(tmp_path):
    write_images(tmp_path/'train'/'images', 3)                  # the neighbour's
    write_images(tmp_path/'mine'/'train'/'images', 1)
    write(tmp_path/'mine'/'train'/'labels'/'p0.txt', LINE)
    write(tmp_path/'mine'/'data.yaml', 'train: ../train/images\nval: ../train/images\nnames: [cat]\n')
    assert [record.path.parent for record in load_split(tmp_path/'mine', 'train').records] == [tmp_path/'mine'/'train'/'images']


@pytest.mark.parametrize('suffix', ('.jpg', '.png', '.tif', '.webp'))
def test_turned_images_of_every_format(tmp_path, suffix):
    names = write_images(tmp_path/'images', 1)
    exif = Image.Exif()
    exif[274] = 6                                               # shown 64 high and 48 wide
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:20, :20] = 255
    Image.fromarray(pixels).save(tmp_path/'images'/f'turned{suffix}', exif=exif, quality=95)
    content = coco(names + ['turned'])
    content['images'][1] |= dict(file_name=f'turned{suffix}', height=64, width=48)
    content['annotations'][1]['bbox'] = [28, 0, 20, 20]
    for split in ('train', 'val'): write(tmp_path/'annotations'/f'instances_{split}.json', content)
    detection_set, said = read(tmp_path)
    assert not said and detection_set.read(1)[:20, 28:].mean() > 245
    assert read_image(tmp_path/'images'/f'turned{suffix}')[:20, 28:].mean() > 245


@pytest.fixture
def difficult(tmp_path):
    "A VOC set in which one of two objects is difficult"
    write_images(tmp_path/'JPEGImages', 2, '.jpg')
    for number in (0, 1): write(tmp_path/'Annotations'/f'p{number}.xml', voc(difficult=number))
    for split in ('train', 'val'): write(tmp_path/'ImageSets'/'Main'/f'{split}.txt', 'p0\np1\n')
    return load_split(tmp_path, 'train')


def test_difficult_is_no_crowd(difficult):
    assert [(len(r.boxes), len(r.crowds), len(r.difficult)) for r in difficult.records] == [(1, 0, 0), (0, 0, 1)]
    assert [(a['iscrowd'], a.get('ignore', 0)) for a in difficult.coco_ground_truth()['annotations']] == [(0, 0), (0, 1)]


def test_difficult_counts_neither_for_nor_against(difficult):
    from yolov9001.detection.decode import Detections
    from yolov9001.detection.evaluate import coco_metrics
    box, none = torch.tensor([BOX]).float(), torch.zeros(0)
    hit = Detections(box, torch.tensor([.9]), torch.tensor([0]))
    nothing = Detections(none.reshape(0, 4), none, none.long())
    twice = Detections(*(torch.cat([part, part]) for part in hit))
    assert [coco_metrics(difficult, {1: hit, 2: found}).map for found in (hit, nothing)] == pytest.approx([100, 100])
    assert coco_metrics(difficult, {1: hit, 2: twice}).map < 100    # a crowd would take both


def test_difficult_is_not_background_in_the_loss(difficult):
    from yolov9001.detection.loss import DetectionLoss
    items = TrainSet(difficult, (64, 64), Augmentation.none())
    assert items[0, 1][1][0, 0] == -2                           # class -2 - 0
    _, targets = collate([items[0, 1]])
    logits = [torch.zeros(1, channels, 64//s, 64//s, requires_grad=True) for s in (8, 16, 32) for channels in (4, 1)]
    sum(DetectionLoss()(logits, targets)).backward()
    gradient = logits[1].grad[0, 0]
    assert gradient[3, 2] == 0 and gradient[0, 0] > 0           # in the object, and beside it


# ---- layouts

def write_layout(name, root):
    "Ten images with a box each, as a tool writes them"
    if name == 'PASCAL VOC':
        names = write_images(root/'JPEGImages')
        for one in names: write(root/'Annotations'/f'{one}.xml', voc())
        write(root/'ImageSets'/'Main'/'default.txt', '\n'.join(names))
    if name == 'COCO': write(root/'annotations'/'instances_default.json', coco(write_images(root/'images')))
    if name == 'YOLO':
        for one in write_images(root/'images'): write(root/'labels'/f'{one}.txt', LINE)
        write(root/'dataset.yaml', 'train: images\nnames: [cat]\n')
    if name == 'YOLO 1.1 of CVAT':
        names = write_images(root/'obj_train_data')
        for one in names: write(root/'obj_train_data'/f'{one}.txt', LINE)
        write(root/'obj.names', 'cat\n')
        write(root/'obj.data', 'classes = 1\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n')
        write(root/'train.txt', '\n'.join(f'data/obj_train_data/{one}.png' for one in names))
    if name == 'YOLO without YAML':
        for one in write_images(root/'images'): write(root/'labels'/f'{one}.txt', LINE)
        write(root/'classes.txt', 'cat\n')
    if name == 'COCO beside images': write(root/'result.json', coco(write_images(root/'images'), prefix='images\\1\\'))
    if name == 'VOC XML':
        for one in write_images(root/'images'): write(root/'annotations'/f'{one}.xml', voc())
    if name == 'LabelMe':
        for one in write_images(root): write(root/f'{one}.json', LABELME | dict(imagePath=f'..\\{one}.png'))
    if name == 'CSV': write(root/'labels.csv', CSV + ''.join(f'{one}.png,64,48,cat,10,10,30,30\n' for one in write_images(root/'images')))


@pytest.mark.parametrize('name', [format.name for format in FORMATS])
def test_layout_as_it_is_and_val_by_rule(tmp_path, name):
    write_layout(name, tmp_path)
    train, said = read(tmp_path)
    val, _ = read(tmp_path, 'val')
    assert (train.format, train.class_names, len(train) + len(val)) == (name, ['cat'], 10)
    assert {r.path.name for r in val.records} == choose_val([f'p{n}.png' for n in range(10)])
    assert len(said) == 1 and 'no val split' in said[0] and 'by a hash of their file names' in val.rule
    for record in train.records + val.records: assert np.allclose(record.boxes, [BOX], atol=1e-3)


SPLIT_NAMES = [('train', 'val'), ('train', 'valid'), ('train', 'validation'), ('training', 'val')]


@pytest.mark.parametrize('names', SPLIT_NAMES)
@pytest.mark.parametrize('kind', ('xml', 'labelme', 'yolo', 'coco', 'csv'))
def test_folders_of_splits_by_any_name(tmp_path, kind, names):
    for count, split in zip((3, 2), names):
        found = write_images(tmp_path/split, count, first=10*count)
        for one in found:
            if kind == 'xml': write(tmp_path/split/f'{one}.xml', voc())
            if kind == 'labelme': write(tmp_path/split/f'{one}.json', LABELME)
            if kind == 'yolo': write(tmp_path/split/f'{one}.txt', LINE)
        if kind == 'yolo': write(tmp_path/split/'classes.txt', 'cat')
        if kind == 'coco': write(tmp_path/split/'_annotations.coco.json', coco(found))
        if kind == 'csv': write(tmp_path/split/'_annotations.csv', CSV + ''.join(f'{one}.png,64,48,cat,10,10,30,30\n' for one in found))
    assert [len(load_split(tmp_path, split)) for split in ('train', 'val')] == [3, 2]


def test_labelimg_beside_the_images(tmp_path):
    for one in write_images(tmp_path/'train', suffix='.jpg'): write(tmp_path/'train'/f'{one}.xml', voc(size=''))
    assert read(tmp_path)[0].format == 'VOC XML' and np.allclose(boxes(tmp_path, 'val')[0], [BOX])


def test_xml_that_counts_from_0(tmp_path):
    for one in write_images(tmp_path): write(tmp_path/f'{one}.xml', voc(first=0 if one == 'p0' else 10))
    assert sorted(boxes(tmp_path) + boxes(tmp_path, 'val'))[1] == [BOX]


def test_image_that_nobody_labelled_yet(tmp_path):
    for one in write_images(tmp_path)[:8]: write(tmp_path/f'{one}.xml', voc())
    assert read(tmp_path)[0].skipped == {'image without a file of labels': 2}


def test_parent_category_of_roboflow_is_no_class(tmp_path):
    parent = [dict(id=0, name='pets', supercategory='none'), dict(id=1, name='cat', supercategory='pets')]
    for split in ('train', 'valid'):
        write(tmp_path/split/'_annotations.coco.json', coco(write_images(tmp_path/split, 2), categories=parent))
    assert [load_split(tmp_path, split).class_names for split in ('train', 'val')] == [['cat'], ['cat']]
    content = coco(['p0', 'p1'], categories=parent)
    content['annotations'][0]['category_id'] = 0                # in val alone
    write(tmp_path/'valid'/'_annotations.coco.json', content)
    assert [load_split(tmp_path, split).class_names for split in ('train', 'val')] == [['pets', 'cat'], ['pets', 'cat']]


@pytest.mark.parametrize('name', ('train.json', 'train_annotations.json', 'instances_train2017.json', 'instances_Train.json'))
def test_coco_by_any_name(tmp_path, name):
    write(tmp_path/'annotations'/name, coco(write_images(tmp_path/'images', 3)))
    write(tmp_path/'annotations'/name.lower().replace('train', 'val'), coco(['p0']))
    assert [len(load_split(tmp_path, split)) for split in ('train', 'val')] == [3, 1]


def test_a_file_given_by_itself(tmp_path):
    path = write(tmp_path/'annotations'/'mine.json', coco(write_images(tmp_path/'images')))
    write(tmp_path/'annotations'/'other.json', coco(['p0']))
    assert len(load_split(path, 'train')) + len(load_split(path, 'val')) == 10
    table = write(tmp_path/'mine.csv', CSV + ''.join(f'p{n}.png,64,48,cat,10,10,30,30\n' for n in range(10)))
    assert len(load_split(table, 'train')) + len(load_split(table, 'val')) == 10


def test_yolo_of_roboflow(tmp_path):
    for split in ('train', 'valid', 'test'):
        for one in write_images(tmp_path/split/'images', 2): write(tmp_path/split/'labels'/f'{one}.txt', LINE)
    write(tmp_path/'data.yaml', 'train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 1\nnames: [cat]\n')
    for split, folder in (('train', 'train'), ('val', 'valid'), ('test', 'test')):
        assert load_split(tmp_path, split).records[0].path.parent == tmp_path/folder/'images'


def test_labels_of_another_split_are_never_used(tmp_path):
    for split in ('train', 'val'): write_images(tmp_path/'images'/split, 2)
    write(tmp_path/'annotations'/'train'/'p0.xml', voc())
    write(tmp_path/'annotations'/'train'/'p1.xml', voc())
    write(tmp_path/'annotations'/'val'/'p0.xml', voc())
    assert read(tmp_path, 'val')[0].skipped == {'image without a file of labels': 1}


def test_an_archive_with_one_folder(tmp_path):
    write_layout('VOC XML', tmp_path/'pets-main')
    assert load_split(tmp_path, 'train').format == 'VOC XML'


def test_csv_with_semicolons(tmp_path):
    rows = CSV + ''.join(f'{one}.png,64,48,cat,10,10,30,30\n' for one in write_images(tmp_path))
    write(tmp_path/'labels.csv', rows.replace(',', ';'))
    assert boxes(tmp_path)[0] == [BOX]


REFUSED = {
    'text files without names': (('p0.txt', LINE), 'found 1 \\*.txt beside 2 images, .*classes.txt'),
    'JSON of another kind': (('p0.json', '{"tasks": []}'), 'found 1 \\*.json beside 2 images, .*as COCO'),
    'XML of another kind': (('p0.xml', '<svg></svg>'), 'found 1 \\*.xml beside 2 images, '),
    'other columns': (('a.csv', 'name,x\np0.png,3\n'), 'found 1 \\*.csv beside 2 images, .*filename, class, xmin'),
    'images alone': (None, 'found no labels beside 2 images, .*label the images'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_anything_else_is_described(tmp_path, case):
    write_images(tmp_path, 2)
    extra, expected = REFUSED[case]
    if extra: write(tmp_path/extra[0], extra[1])
    with pytest.raises(InputError, match=expected) as caught: load_split(tmp_path, 'train')
    assert '\n' not in str(caught.value)


def test_gif_as_training_image(tmp_path):
    (tmp_path/'images').mkdir()
    for number in range(10): Image.new('P', (64, 48), number).save(tmp_path/'images'/f'p{number}.gif')
    for number in range(10): write(tmp_path/'labels'/f'p{number}.txt', LINE)
    write(tmp_path/'classes.txt', 'cat')
    assert sample_images(load_split(tmp_path, 'train'), (64, 64)).shape[1:] == (3, 64, 64)


# ---- the made val split

def test_val_stays_when_images_are_added():
    names = [f'img_{n:05}.jpg' for n in range(2000)]
    few, many = choose_val(names[:1000]), choose_val(names)
    assert few == many & {*names[:1000]} and .1 <= len(many)/2000 <= .2


def test_val_is_10_to_20_percent_of_any_set():
    for count in range(10, 200): assert .1 <= len(choose_val([f'{n}.jpg' for n in range(count)]))/count <= .2


def test_copies_of_a_picture_stay_together():
    val = choose_val([f'{n}_jpg.rf.{copy:032x}.jpg' for n in range(100) for copy in range(3)])
    assert len(val) == 3*len({name.split('.rf.')[0] for name in val})


def test_images_without_a_split_folder_are_train(tmp_path):
    for folder, count in (('images', 10), ('test', 2)):
        for one in write_images(tmp_path/folder, count, first=count): write(tmp_path/folder/f'{one}.xml', voc())
    assert len(load_split(tmp_path, 'test')) == 2
    assert sum(len(load_split(tmp_path, split)) for split in ('train', 'val')) == 10


def test_images_of_cvat_lie_in_a_folder_called_after_the_file(tmp_path):
    write(tmp_path/'annotations'/'instances_default.json', coco(write_images(tmp_path/'images'/'default')))
    assert load_split(tmp_path, 'train').records[0].path.parent.name == 'default'


def test_a_stray_yaml_is_no_data_yaml(tmp_path):
    write_layout('VOC XML', tmp_path)
    write(tmp_path/'settings.yaml', 'author:\n  names: of people\n')
    assert load_split(tmp_path, 'train').format == 'VOC XML'
