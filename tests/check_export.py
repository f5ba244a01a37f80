"Notebooks and package agree: an export gives the package in the repository, and the notebooks are clean, with lines that fit."
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root, tools = Path(__file__).resolve().parents[1], Path(sys.executable).parent
WIDEST = 120    # characters of a line of code


def files(folder): return {p.relative_to(folder): p.read_bytes() for name in ('yolov9001', 'nbs') for p in (folder/name).rglob('*')
                           if p.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in p.parts}


def long_lines(notebook):
    "The lines of a notebook's code that are too long to be read beside something else"
    code = [cell for cell in json.loads(notebook.read_text())['cells'] if cell['cell_type'] == 'code']
    lines = [(cell['id'], line.rstrip()) for cell in code for line in ''.join(cell['source']).splitlines()]
    return [f'{notebook.relative_to(root)}, cell {cell}: {line}' for cell, line in lines if len(line) > WIDEST]


notebooks = [path for path in sorted((root/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in path.parts]
too_long = [line for path in notebooks for line in long_lines(path)]
if too_long: sys.exit('\n'.join([*too_long, f'{len(too_long)} lines of code over {WIDEST} characters; break them']))

with tempfile.TemporaryDirectory() as temporary:
    copy = Path(temporary)/'copy'
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.venv', 'runs', '_docs', '.git', '__pycache__'))
    for module in (copy/'yolov9001').rglob('*.py'):
        if module != copy/'yolov9001'/'__init__.py': module.unlink()
    for command in ('nbdev_clean', 'nbdev_export'): subprocess.run([tools/command], cwd=copy, check=True)
    before, after = files(root), files(copy)
differing = sorted(str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))
if differing: sys.exit(f"notebooks and package differ: {', '.join(differing)}; run nbdev_clean and nbdev_export, and commit")
print(f'notebooks and package agree: {len(before)} files')
