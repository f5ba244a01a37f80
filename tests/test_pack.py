"A pack gives the pictures that decoding gives, and no other pack is ever taken for it."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from torch.utils.data import DataLoader

from yolov9001.core import shared_folder
from yolov9001.data.augment import Augmentation, TrainSet, collate
from yolov9001.data.dataset import fit_image, make_digits
from yolov9001.data.formats import load_split
from yolov9001.data.pack import cache_folder, open_pack, pack_name


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    return tmp_path/'cache'


@pytest.fixture(scope='module')
def digits(tmp_path_factory): return make_digits(tmp_path_factory.mktemp('data')/'digits', train=40, val=8)


def packs(): return sorted((cache_folder()/'packs').glob('*.pack'))


@pytest.mark.parametrize('size', [(96, 96), (64, 160), (480, 640)])     # shrunk, of another shape, enlarged
def test_samples_are_those_of_decoding(digits, size):
    train = load_split(digits, 'train')
    packed, decoded = TrainSet(train, size), TrainSet(train, size, packed=False)
    assert packed.tiles.pack and not decoded.tiles.pack
    for key in [(epoch, index) for epoch in range(2) for index in range(0, 40, 5)]:
        for ours, theirs in zip(packed[key], decoded[key], strict=True): assert ours.equal(theirs)


@pytest.mark.skipif(not shared_folder(), reason='no ../shared')
def test_photographs_of_many_shapes(digits):
    train = load_split(shared_folder()/'data'/'coco_open', 'val')
    pack = open_pack(train, (320, 320))
    assert len({record.height/record.width for record in train.records}) > 3
    for index in range(0, len(train), 7): assert (pack[index] == fit_image(train.read(index), (320, 320))).all()


def test_a_worker_of_another_kind_maps_the_same_file(digits):
    train = TrainSet(load_split(digits, 'train'), 64)
    loader = DataLoader(train, 8, collate_fn=collate, num_workers=1, multiprocessing_context='spawn')
    images, targets = next(iter(loader))
    expected = collate([train[index] for index in range(8)])
    assert images.equal(expected[0]) and targets.equal(expected[1])


def test_another_set_size_or_image_has_a_pack_of_its_own(digits, tmp_path):
    copy = tmp_path/'copy'
    shutil.copytree(digits, copy)
    train = load_split(copy, 'train')
    names = [pack_name(train, (64, 64)), pack_name(train, (64, 96)), pack_name(load_split(copy, 'val'), (64, 64)),
             pack_name(load_split(digits, 'train'), (64, 64))]
    before = open_pack(train, (64, 64))[0].copy()
    shutil.copy(train.records[1].path, train.records[0].path)           # another picture under the same name
    names.append(pack_name(train, (64, 64)))
    assert len({*names}) == 5
    assert not (open_pack(train, (64, 64))[0] == before).all()


@pytest.mark.parametrize('left', [0, 1000, -1], ids=['empty', 'a part', 'all but one byte'])
def test_a_truncated_pack_is_made_again(digits, left):
    train = load_split(digits, 'train')
    path = open_pack(train, (64, 64)).path
    whole = path.read_bytes()
    path.write_bytes(whole[:left])
    assert open_pack(train, (64, 64)).path.read_bytes() == whole


PACKING = '''
import sys, time
from yolov9001.data import pack
from yolov9001.data.formats import load_split
fit = pack.fit_image
def slowly(*words):
    time.sleep(float(sys.argv[2]))
    return fit(*words)
pack.fit_image = slowly
pack._BLOCK = 4
print(pack.open_pack(load_split(sys.argv[1], 'train'), (64, 64)).path.stat().st_ino)
'''


def start_packing(digits, seconds): return subprocess.Popen([sys.executable, '-c', PACKING, digits, str(seconds)], stdout=subprocess.PIPE, text=True)


def wait_for_half(folder):
    for _ in range(600):
        if any(path.stat().st_size for path in folder.glob('.writing-*/*.pack')): return
        time.sleep(.1)
    raise AssertionError('nobody packs')


def test_a_killed_packing_is_never_used(digits, cache):
    process = start_packing(digits, .2)
    folder = cache/'yolov9001'/'packs'
    wait_for_half(folder)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [*folder.glob('.writing-*')] and not packs_in(folder)
    train = load_split(digits, 'train')
    pack = open_pack(train, (64, 64))
    for index in range(len(train)): assert (pack[index] == fit_image(train.read(index), (64, 64))).all()
    assert not [*folder.glob('.writing-*')]


def packs_in(folder): return [path for path in folder.glob('*.pack') if path.name[0] != '.']


def test_processes_of_a_host_make_it_once(digits, cache):
    "The second waits for the first, and both map the same file"
    first = start_packing(digits, .1)
    wait_for_half(cache/'yolov9001'/'packs')
    second = start_packing(digits, 100)         # if it packed too, it would never end
    told = [process.communicate(timeout=90)[0] for process in (first, second)]
    assert told[0] == told[1] and len(packs()) == 1


def test_a_disk_that_is_too_small_costs_time_only(digits, monkeypatch):
    monkeypatch.setattr('yolov9001.data.pack.PACK_SHARE', 0.)
    train = load_split(digits, 'train')
    with pytest.warns(UserWarning, match='has room for 0 GB.*set XDG_CACHE_HOME.*decoded again') as told: items = TrainSet(train, 64)
    assert len(told) == 1 and not packs() and not items.tiles.pack
    assert items[0, 3][0].equal(TrainSet(train, 64, packed=False)[0, 3][0])


def test_a_full_disk_while_writing(digits, monkeypatch):
    def full(file): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.warns(UserWarning, match='No space left.*decoded again'): assert open_pack(load_split(digits, 'train'), (64, 64)) is None
    assert not [*(cache_folder()/'packs').glob('*.pack')]       # hidden ones too


def test_the_oldest_pack_makes_room(digits, monkeypatch):
    train = load_split(digits, 'train')
    old, new = (open_pack(train, size).path for size in ((64, 64), (96, 96)))
    os.utime(old, (1e9, 1e9))
    free = shutil.disk_usage(old.parent).free
    monkeypatch.setattr('yolov9001.data.pack.PACK_SHARE', (new.stat().st_size + 300_000)/free)        # fits beside the newer alone
    third = open_pack(train, (32, 64)).path
    assert {*packs()} == {new, third}


def test_an_image_that_does_not_decode_is_replaced(digits, tmp_path):
    shutil.copytree(digits, tmp_path/'digits')
    train = load_split(tmp_path/'digits', 'train')
    train.records[1].path.write_bytes(b'\xff\xd8 torn')
    with pytest.warns(UserWarning, match='does not decode, 1 such.*replace'): items = TrainSet(train, 64, Augmentation.none())
    assert items[0, 1][0].equal(items[0, 2][0])


@pytest.fixture
def large(digits, tmp_path):
    "Digits with labels of nine megabytes, most of them spaces"
    folder = tmp_path/'large'
    shutil.copytree(digits, folder)
    path = folder/'annotations'/'instances_train.json'
    path.write_text(path.read_text() + ' '*9_000_000)
    return folder


def labels(): return [*(cache_folder()/'labels').glob('*.npz')]


def no_reading(*_): raise AssertionError('read again')


def test_large_labels_are_read_once(large, monkeypatch):
    first = load_split(large, 'train')
    monkeypatch.setattr('yolov9001.data.readers._read_json', no_reading)
    second = load_split(large, 'train')
    assert len(labels()) == 1 and second.digest() == first.digest() and second.coco_ground_truth() == first.coco_ground_truth()
    for own, other in zip(first.records, second.records, strict=True): np.testing.assert_equal(vars(own), vars(other))


def test_small_labels_are_not_kept(digits):
    load_split(digits, 'train')
    assert not labels()


def test_what_was_left_out_is_said_again(large):
    path = large/'annotations'/'instances_train.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'][2:] = [0, 0]
    path.write_text(json.dumps(content) + ' '*9_000_000)
    for _ in range(2):
        with pytest.warns(UserWarning, match='1 x box of zero size .train_0000.jpg.'): train = load_split(large, 'train')
        assert train.skipped == {'box of zero size': 1}
    assert len(labels()) == 1


def test_changed_labels_and_images_are_read_again(large):
    train = load_split(large, 'train')
    path = large/'annotations'/'instances_train.json'
    content = json.loads(path.read_text())
    content['annotations'].pop()
    path.write_text(json.dumps(content) + ' '*9_000_000)
    assert load_split(large, 'train').digest() != train.digest()
    train.records[0].path.unlink()
    with pytest.warns(UserWarning, match='image that is absent'): assert len(load_split(large, 'train')) == 39
    with pytest.warns(UserWarning, match='image that is absent'): load_split(large, 'train')      # never kept: it may come back
    assert len(labels()) == 2


def test_broken_arrays_are_read_again(large):
    train = load_split(large, 'train')
    path, = labels()
    path.write_bytes(path.read_bytes()[:500])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert load_split(large, 'train').digest() == train.digest()
    assert path.stat().st_size > 500
