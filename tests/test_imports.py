"Who may import whom: one way, no circles."
import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1]/'yolov9001'
ROOMS = {'core': '',                                            # a room: those that it may import
         'weights': 'core',
         'blocks': 'core',
         'diagram': '',
         'drawing': 'core diagram',
         'npu': 'core',
         'model': 'core blocks npu weights',
         'data': 'core',
         'detection': 'core data',
         'training': 'core blocks data model weights',
         'train': 'core data detection model training weights',
         'rk3588_bench': 'core npu',
         'int8': 'core blocks data detection model rk3588_bench train training',
         'quantize': 'core weights blocks data detection int8 model train training',
         'report': 'core data detection int8 npu quantize',
         'workbook': 'core weights data detection int8 model npu quantize report rk3588_bench train training',
         'research': 'core weights report blocks data detection int8 model npu quantize rk3588_bench train training',
         'cli': 'core data detection int8 model npu quantize report rk3588_bench train training workbook research'}


def module_of(file): return '.'.join(file.relative_to(PACKAGE.parent).with_suffix('').parts)


def room_of(module): return module.split('.')[1]


def imported(file, nodes):
    "The modules that some nodes of a file's syntax tree import, by their full names"
    for node in nodes:
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            name = resolve_name('.'*node.level + (node.module or ''), module_of(file).rpartition('.')[0])
            for alias in node.names: yield f'{name}.{alias.name}' if (PACKAGE.parent/name.replace('.', '/')).is_dir() else name


FILES = sorted(file for file in PACKAGE.rglob('*.py') if file.stem not in ('__init__', '_modidx'))
IMPORTS = {file: {*imported(file, ast.walk(ast.parse(file.read_text())))} for file in FILES}
OWN = {module_of(file): {name for name in names if name.startswith('yolov9001.')} for file, names in IMPORTS.items()}


def test_every_room_is_in_the_table_and_imports_are_seen():
    assert {room_of(module) for module in OWN} == {*ROOMS}
    assert 'yolov9001.blocks' in OWN['yolov9001.model'] and 'yolov9001.int8.twin' in OWN['yolov9001.int8.fidelity']
    assert {name for names in OWN.values() for name in names} <= {*OWN}


@pytest.mark.parametrize('module', OWN)
def test_a_room_imports_only_those_below_it(module):
    room = room_of(module)
    assert {room_of(name) for name in OWN[module]} - {room} <= {*ROOMS[room].split()}


def test_no_circles(): assert [*TopologicalSorter(OWN).static_order()]


def test_rooms_have_no_circles(): assert [*TopologicalSorter({room: below.split() for room, below in ROOMS.items()}).static_order()]


def test_the_npu_knows_no_pytorch():
    for file, names in IMPORTS.items():
        if room_of(module_of(file)) in ('npu', 'rk3588_bench'): assert not any(name.split('.')[0] in ('torch', 'torchvision') for name in names), file


def test_research_is_imported_within_a_function_alone():
    cli = PACKAGE/'cli.py'
    assert any('.research.' in name for name in OWN['yolov9001.cli'])
    assert not any('.research.' in name for name in imported(cli, ast.parse(cli.read_text()).body))
