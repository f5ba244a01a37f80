"Hosts as network namespaces: a switch and the ends of all cables are in namespaces too, so no name of one test can meet that of another."
import itertools
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager

import pytest

count = itertools.count()


class Namespaces:
    "Hosts on one switch; what runs in them is ended with them"
    def __init__(self): self.tag, self.names, self.processes = f'y{os.getpid()}n{next(count)}', [], []

    def connect(self, addresses):
        self.create('sw')
        self.inside('sw', 'ip', 'link', 'add', 'name', 'switch', 'type', 'bridge')
        self.inside('sw', 'ip', 'link', 'set', 'switch', 'up')
        for name, address in addresses.items(): self.add(name, address)

    def ip(self, *words): subprocess.run(['ip', *words], check=True, capture_output=True, text=True)

    def create(self, name):
        self.ip('netns', 'add', self.tag + name)
        self.names.append(name)

    def add(self, name, address):
        self.create(name)
        self.ip('link', 'add', 'name', 'eth0', 'netns', self.tag + name, 'type', 'veth', 'peer', 'name', name, 'netns', f'{self.tag}sw')
        self.inside('sw', 'ip', 'link', 'set', name, 'master', 'switch', 'up')
        for words in (('addr', 'add', f'{address}/24', 'dev', 'eth0'), ('link', 'set', 'eth0', 'up'), ('link', 'set', 'lo', 'up')): self.inside(name, 'ip', *words)

    def words(self, name, words): return ['ip', 'netns', 'exec', self.tag + name, *map(str, words)]

    def inside(self, name, *words, **options): return subprocess.run(self.words(name, words), check=True, capture_output=True, text=True, **options)

    def start(self, name, *words, **options):
        self.processes.append(subprocess.Popen(self.words(name, words), **options))
        return self.processes[-1]

    def pids(self, name):
        "What runs on a host"
        found = subprocess.run(['ip', 'netns', 'pids', self.tag + name], capture_output=True, text=True).stdout
        return [int(pid) for pid in found.split()]

    def kill(self, name):
        "End all that runs on a host, at once, as if it lost power"
        for pid in self.pids(name):
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass

    def close(self):
        for name in self.names:
            self.kill(name)
            self.ip('netns', 'delete', self.tag + name)
        for process in self.processes: process.wait()


@contextmanager
def open_hosts(**addresses):
    "Namespaces for as long as they are needed; skips the test where they are not allowed"
    if os.geteuid() or not shutil.which('ip'): pytest.skip('network namespaces need root and iproute2')
    probe = f'y{os.getpid()}probe'
    result = subprocess.run(f'ip netns add {probe} && ip netns exec {probe} ip link add name probe type bridge; ip netns delete {probe}', shell=True, capture_output=True, text=True)
    if result.stderr: pytest.skip(f'no network namespaces here: {result.stderr}')
    hosts = Namespaces()
    try:
        hosts.connect(addresses)
        yield hosts
    finally: hosts.close()
