"Notebooks and package agree: the package exported anew equals the one in the repository, and the notebooks are clean."
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root, tools = Path(__file__).resolve().parents[1], Path(sys.executable).parent


def files(folder): return {p.relative_to(folder): p.read_bytes() for name in ('yolov9001', 'nbs') for p in (folder/name).rglob('*')
                           if p.suffix in ('.py', '.ipynb') and '.ipynb_checkpoints' not in p.parts}


with tempfile.TemporaryDirectory() as temporary:
    copy = Path(temporary)/'copy'
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.venv', 'runs', '.git', '__pycache__'))
    for module in (copy/'yolov9001').glob('*.py'):
        if module.name != '__init__.py': module.unlink()
    for command in ('nbdev_clean', 'nbdev_export'): subprocess.run([tools/command], cwd=copy, check=True)
    before, after = files(root), files(copy)
differing = sorted(str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))
if differing: sys.exit(f"notebooks and package differ: {', '.join(differing)}; run nbdev_clean and nbdev_export, and commit")
print(f'notebooks and package agree: {len(before)} files')
