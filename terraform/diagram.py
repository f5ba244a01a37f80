#!/usr/bin/env python3
"""Draw terraform-diagram.svg: which resource needs which, as Terraform says, in lanes by the file that declares them.

Run it here after `terraform init`; a test fails where the picture is out of step with the configuration."""
import re
import subprocess
import sys
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
LANES = {'network.tf': 'Network and access',
         'jump.tf': 'Phase 1: prepare, no GPU is paid for',
         'mlserver.tf': 'Phase 2: train'}
LABELS = { # address: two lines, from top to bottom; {names} are the defaults of variables
    'terraform_data.caller': ('your address', 'asked for by each apply'),
    'aws_vpc_security_group_ingress_rule.ssh': ('SSH', 'from your address only'),
    'aws_subnet.cluster': ('subnet', 'in a zone that offers both types'),
    'aws_key_pair.user': ('your public key', ''),
    'aws_iam_role_policy.jump': ('role', 'may terminate own ML servers'),
    'aws_instance.jump': ('jump host', '{jump_type}'),
    'terraform_data.prep': ('prep', 'send, download, pack, serve'),
    'terraform_data.results': ('results', 'destroy warns before they go'),
    'aws_placement_group.ml': ('placement group', 'on request'),
    'aws_instance.mlserver': ('ML servers', 'ml_count x {ml_type}'),
}
WIDTH, HEIGHT, GAP, LANE, TOP = 220, 48, 28, 300, 56
HEAD = """<style>text{font:13px sans-serif;fill:#222} .small{font-size:11px;fill:#555}
.lane{fill:#f4f6f8} .box{fill:#fff;stroke:#456} .edge{fill:none;stroke:#456}</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">
<path d="M0 0L8 4L0 8z" fill="#456"/></marker></defs>"""


def resources(
    text:str, # of a .tf file
)->list: # addresses of its resources
    "What a file declares"
    return ['.'.join(pair) for pair in re.findall(r'^resource "(\w+)" "(\w+)"', text, re.M)]


def defaults(
    text:str, # of variables.tf
)->dict: # name -> default
    "Texts that variables have unless set"
    return dict(re.findall(r'^variable "(\w+)" \{\n(?:  .*\n)*?  default +=\s+"(.*)"$', text, re.M))


def edges(
    dot:str, # what `terraform graph` prints
)->set: # pairs (needed first, needs it)
    "Which resource needs which"
    return {(needed, user) for user, needed in re.findall(r'"([\w.]+)" -> "([\w.]+)"', dot)}


def contract(
    pairs:set, # of `edges`
    kept:set, # the resources that are drawn
)->set: # pairs of kept ones, joined where only others lie between, without those that a longer way implies
    "The graph of the resources that matter"
    users = {}
    for needed, user in pairs: users.setdefault(needed, set()).add(user)

    def reach(start):
        found = set()
        for user in users.get(start, ()): found |= {user} if user in kept else reach(user)
        return found
    near = {name: reach(name) for name in kept}

    def far(name): return near[name].union(*(far(user) for user in near[name]))
    longer = {name: {user for other in near[name] for user in far(other)} for name in kept}
    return {(name, user) for name in kept for user in near[name] - longer[name]}


def place(
    lanes:list, # lists of addresses
)->dict: # address -> (x, y) of the box's upper left corner
    "A column a lane"
    return {name: (LANE * column + (LANE - WIDTH) // 2, TOP + row * (HEIGHT + GAP))
            for column, lane in enumerate(lanes) for row, name in enumerate(lane)}


def arrow(
    start:tuple, # corner of the box that is needed
    end:tuple, # of the box that needs it
)->str: # an SVG path
    "Down within a column, around what lies between, and from side to side"
    (x, y), (to_x, to_y) = start, end
    right, middle, to_middle = x + WIDTH, y + HEIGHT // 2, to_y + HEIGHT // 2
    if x != to_x: line = f'M{right} {middle} C{right + 50} {middle} {to_x - 50} {to_middle} {to_x} {to_middle}'
    elif to_y - y == HEIGHT + GAP: line = f'M{x + WIDTH // 2} {y + HEIGHT} L{x + WIDTH // 2} {to_y}'
    else: line = f'M{right} {middle} C{right + 34} {middle} {right + 34} {to_middle} {right} {to_middle}'
    return f'<path class="edge" marker-end="url(#head)" d="{line}"/>'


def rectangle(x, y, width, height, kind):
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'


def words(x, y, text, more=''):
    return f'<text x="{x}" y="{y}" text-anchor="middle"{more}>{escape(text)}</text>'


def svg(
    dot:str, # what `terraform graph` prints
)->str: # the whole file
    "The diagram"
    known = defaults((HERE/'variables.tf').read_text())
    declared = [resources((HERE/file).read_text()) for file in LANES]
    places = place([[name for name in LABELS if name in names] for names in declared])
    width, height = LANE * len(LANES), max(y for _, y in places.values()) + HEIGHT + GAP
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', HEAD]
    for column, title in enumerate(LANES.values()):
        lines += [rectangle(LANE * column + 4, 4, LANE - 8, height - 8, 'lane'),
                  words(LANE * column + LANE // 2, 30, title, ' font-weight="bold"')]
    lines += [arrow(places[needed], places[user]) for needed, user in sorted(contract(edges(dot), set(LABELS)))]
    for name, (x, y) in places.items():
        first, second = LABELS[name]
        lines += [rectangle(x, y, WIDTH, HEIGHT, 'box'), words(x + WIDTH // 2, y + (20 if second else 29), first),
                  words(x + WIDTH // 2, y + 37, second.format(**known), ' class="small"')]
    return '\n'.join([*lines, '</svg>', ''])


def main():
    graph = subprocess.run(['terraform', 'graph'], cwd=HERE, capture_output=True, text=True)
    if graph.returncode: sys.exit(f'diagram: terraform graph failed; run terraform init first\n{graph.stderr}')
    (HERE/'terraform-diagram.svg').write_text(svg(graph.stdout))


if __name__ == '__main__': main()
