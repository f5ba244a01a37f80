#!/usr/bin/env python3
"""The diagram of the two phases in README.md, drawn from what Terraform says depends on what.

diagram.py prints it, diagram.py --write puts it into README.md; both need `terraform init` to have run here."""
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PHASES = {'network.tf': 'Network and access', 'jump.tf': 'Phase 1: prepare, no GPU is paid for', 'mlserver.tf': 'Phase 2: train'}
LABELS = {'aws_instance.jump': 'jump host<br>c8gn.8xlarge', 'terraform_data.prep': 'prep<br>send, download, pack, serve', 'aws_instance.mlserver': 'ML servers<br>g5.xlarge x ml_count',
          'aws_security_group.cluster': 'security group', 'aws_iam_role_policy.jump': 'role: terminate own ML servers', 'aws_placement_group.ml': 'placement group',
          'aws_network_interface.efa': 'EFA interfaces, optional', 'aws_subnet.cluster': 'subnet', 'aws_key_pair.user': 'your public key'}


def resources(
    text:str, # of a .tf file
)->list: # addresses of its resources
    "What a file declares"
    return ['.'.join(pair) for pair in re.findall(r'^resource "(\w+)" "(\w+)"', text, re.M)]


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
    return {(name, user) for name in kept for user in near[name] if not any(user in far(other) for other in near[name] if other != user)}


def identifier(address): return address.replace('.', '_')


def mermaid(
    dot:str, # what `terraform graph` prints
)->str: # a flowchart that GitHub draws
    "The diagram"
    files = {name: (HERE/name).read_text() for name in PHASES}
    lines = ['flowchart LR']
    for number, (name, title) in enumerate(PHASES.items()):
        lines += [f'  subgraph p{number}["{title}"]', *(f'    {identifier(r)}["{LABELS[r]}"]' for r in resources(files[name]) if r in LABELS), '  end']
    return '\n'.join(lines + [f'  {identifier(needed)} --> {identifier(user)}' for needed, user in sorted(contract(edges(dot), set(LABELS)))])


def main():
    graph = subprocess.run(['terraform', 'graph'], cwd=HERE, capture_output=True, text=True)
    if graph.returncode: sys.exit(f'diagram: terraform graph failed; run terraform init first\n{graph.stderr}')
    block = f'```mermaid\n{mermaid(graph.stdout)}\n```'
    if sys.argv[1:] != ['--write']: return print(block)
    readme = HERE/'README.md'
    readme.write_text(re.sub(r'```mermaid\n.*?```', lambda _: block, readme.read_text(), flags=re.S))


if __name__ == '__main__': main()
