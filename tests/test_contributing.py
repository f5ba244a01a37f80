"The example of CONTRIBUTING.md does what is said there."
import re
from pathlib import Path

CONTRIBUTING = Path(__file__).resolve().parents[1]/'CONTRIBUTING.md'


def test_a_block_in_ten_lines():
    block, check = re.findall(r'```python\n(.+?)```', CONTRIBUTING.read_text(), re.S)
    names = {}
    exec('from yolov9001.blocks import *\nimport torch\nimport torch.nn.functional as F\nfrom torch import Tensor, nn', names)
    exec(block, names)
    exec(check, names)
    assert type(names['fuse'](names['block'])) is names['FusedConv']
