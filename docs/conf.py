"The site of `make docs`: the notebooks as they are stored, and the API from docstrings and docments. Sphinx reads this file."
import ast
import json
import shutil
from configparser import ConfigParser
from pathlib import Path

from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
parser = ConfigParser(delimiters=['='])
parser.read(ROOT/'settings.ini', encoding='utf-8')

project = 'YOLOv9001'
author = parser['DEFAULT']['author']
copyright = parser['DEFAULT']['copyright']
release = parser['DEFAULT']['version']

extensions = ['myst_nb', 'sphinx_external_toc', 'sphinx.ext.autodoc', 'sphinx.ext.viewcode', 'sphinx_copybutton']
external_toc_path = 'docs/toc.yml'
include_patterns = ['nbs/**.ipynb', 'docs/api/*.md', 'terraform/*.md', '*.md']
exclude_patterns = ['README.md', '**/.ipynb_checkpoints']

nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_render_markdown_format = 'myst'
myst_heading_anchors = 3
suppress_warnings = ['mystnb.unknown_mime_type', 'misc.highlighting_failure']
default_role = 'literal'
highlight_language = 'none'
add_module_names = False
autodoc_default_options = {'members': True, 'undoc-members': True}
autodoc_inherit_docstrings = False
autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
maximum_signature_line_length = 90

html_theme = 'furo'
html_title = 'YOLOv9001'
html_static_path = ['static']
html_css_files = ['site.css']
html_additional_pages = {'index': 'start.html'}
templates_path = ['templates']


def write_api_pages():
    "A page for each module or room at the top of the package"
    pages, package = ROOT/'docs'/'api', ROOT/'yolov9001'
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    for module in package.glob('[a-z]*.py'): (pages/f'{module.stem}.md').write_text(f'# {module.stem}\n' + automodule(module.stem))
    for room in package.glob('[a-z]*/'):
        parts = [f'## {file.stem}\n' + automodule(f'{room.name}.{file.stem}') for file in sorted(room.glob('[a-z]*.py'))]
        if parts: (pages/f'{room.name}.md').write_text('\n'.join([f'# {room.name}\n', *parts]))


def automodule(name):
    "Where autodoc puts what it finds in a module of the package"
    return f'\n```{{eval-rst}}\n.. automodule:: yolov9001.{name}\n```\n'


def is_shown(cell):
    "Whether a reader of the site sees a cell"
    return not ''.join(cell['source']).startswith(('#| hide', '#| default_exp'))


def is_preamble(code):
    "Whether a cell only imports, and names what it imports late"
    kinds = {type(node) for node in ast.parse(code).body}
    return bool(kinds & {ast.Import, ast.ImportFrom}) and kinds <= {ast.Import, ast.ImportFrom, ast.Assign}


def tidy_notebook(app, docname, source):
    "Leave out what is for nbdev alone: hidden cells and directives"
    if app.env.doc2path(docname).suffix != '.ipynb': return
    notebook = json.loads(source[0])
    notebook['cells'] = [cell for cell in notebook['cells'] if is_shown(cell)]
    for cell in notebook['cells']:
        lines = ''.join(cell['source']).splitlines(keepends=True)
        tags = {'#| echo: false\n': 'remove-input', '#| export\n': 'exported', '#| exporti\n': 'exported'}
        cell['metadata']['tags'] = [tags[line] for line in lines if line in tags]
        if cell['cell_type'] != 'code': continue
        cell['source'] = [line for line in lines if not line.startswith('#|')]
        if 'exported' in cell['metadata']['tags'] and is_preamble(''.join(cell['source'])):
            cell['metadata']['tags'].append('hide-input')       # folded: one click shows it
    source[0] = json.dumps(notebook)


def add_docments(app, what, name, thing, options, lines):
    "The comments behind parameters become the parameters' descriptions"
    if what not in ('function', 'method', 'class') or isinstance(thing, type) and issubclass(thing, Exception): return
    try: told = docments(thing, full=True)
    except (TypeError, ValueError, OSError): return
    described = {name: ' '.join(part.docment.split()) for name, part in told.items() if part.get('docment')}
    result = described.pop('return', None)
    lines += ['', *(f':param {name}: {text}' for name, text in described.items())]
    if result: lines.append(f':returns: {result}')


def skip_fields(app, what, name, thing, skip, options):
    "Fields of a dataclass stand among its parameters, and what matplotlib adds to a class is not ours"
    foreign = getattr(thing, '__module__', None) == 'matplotlib.artist'
    return skip or foreign or what == 'class' and not callable(thing) and not isinstance(thing, property)


def setup(app):
    "Called by Sphinx"
    write_api_pages()
    app.connect('source-read', tidy_notebook)
    app.connect('autodoc-skip-member', skip_fields)
    app.connect('autodoc-process-docstring', add_docments)
