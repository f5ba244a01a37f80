"README.md is nbs/index.ipynb, executed and written as Markdown. With --check nothing is written: a README that differs or grows long is an error."
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT/'nbs'/'index.ipynb'
MOST_WORDS, MOST_DECIMALS = 700, 30


def shown(notebook):
    "The notebook without its hidden cells, and without the source of cells that say `#| echo: false`"
    cells = [cell for cell in notebook.cells if not cell.source.startswith('#| hide')]
    for cell in cells:
        if cell.source.startswith('#| echo: false'): cell.metadata['transient'] = {'remove_source': True}
    return nbformat.NotebookNode(notebook | {'cells': cells})


def from_root(text, drawn):
    "Text whose links start at the root of the repository instead of `nbs/`; files in `drawn` are still to be written"
    def move(link):
        path = (ROOT/'nbs'/link[1]).resolve()
        if not path.exists() and path not in drawn: sys.exit(f'nbs/index.ipynb: links to {link[1]}, which is not there; mend the link')
        return f']({path.relative_to(ROOT)})'
    return re.sub(r'\]\((?!https?:)([^)#]+)\)', move, text)


def readme(notebook):
    "The text of README.md, and the pictures that the notebook draws, by path"
    text, resources = MarkdownExporter().from_notebook_node(shown(notebook), dict(unique_key='index', output_files_dir='images'))
    pictures = {ROOT/'nbs'/name: content for name, content in resources['outputs'].items()}
    return re.sub(r'\n{3,}', '\n\n', from_root(text, pictures)).strip() + '\n', pictures


def main(check):
    "Write README.md, or compare it"
    notebook = nbformat.read(INDEX, as_version=4)
    NotebookClient(notebook, resources={'metadata': {'path': INDEX.parent}}).execute()
    text, pictures = readme(notebook)
    words, decimals = len(text.split()), len(re.findall('[0-9][.][0-9]', text))
    if words > MOST_WORDS or decimals > MOST_DECIMALS:
        sys.exit(f'README.md: {words} words and {decimals} decimals, more than {MOST_WORDS} and {MOST_DECIMALS}; shorten nbs/index.ipynb')
    if check:
        if (ROOT/'README.md').read_text() != text: sys.exit('README.md: is not what nbs/index.ipynb gives; run make readme, and commit')
    else:
        for path in (INDEX.parent/'images').glob('index_*'): path.unlink()
        for path, content in pictures.items(): path.write_bytes(content)
        (ROOT/'README.md').write_text(text)
        nbformat.write(notebook, INDEX)
    print(f'README.md is nbs/index.ipynb: {words} words, {decimals} decimals')


main('--check' in sys.argv)
