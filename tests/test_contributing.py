"What CONTRIBUTING.md says and `make mutations` breaks is still there."
import re
import shutil
from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, break_line

CONTRIBUTING = Path(__file__).resolve().parents[1]/'CONTRIBUTING.md'


def test_a_block_in_ten_lines():
    block, check = re.findall(r'```python\n(.+?)```', CONTRIBUTING.read_text(), re.S)
    names = {}
    exec('from yolov9001.blocks import *\nimport torch\nimport torch.nn.functional as F\nfrom torch import Tensor, nn', names)
    exec(block, names)
    exec(check, names)
    assert type(names['fuse'](names['block'])) is names['FusedConv']


@pytest.mark.parametrize('mutation', MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_finds_its_line(mutation, tmp_path):
    "As the product changes, `make mutations` still breaks what it says"
    for name in (f'nbs/{mutation.notebook}.ipynb', f'yolov9001/{mutation.module}.py'):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, tmp_path/name)
    break_line(mutation, tmp_path)
    assert mutation.wrong in (tmp_path/f'yolov9001/{mutation.module}.py').read_text()
