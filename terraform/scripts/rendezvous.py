"""Where the hosts of a training meet: a key-value store on the jump host, which outlives every ML server.

rendezvous.py serve PORT                          on the jump host
rendezvous.py wait SERVER PORT OWN ALL MINUTES    on an ML server: until ALL hosts (with commas between) are there"""
import pickle
import sys
import time
from datetime import timedelta

import psutil
from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend

ID = 'yolov9001'  # the --rdzv-id that the launcher gives torchrun
BEGUN = 'begun'
IDLE = 180  # seconds without any host until all is forgotten; torchrun needs some to come after `wait`
CLOSED = 10  # seconds for which a closed rendezvous is left to those that are leaving


def connections(
    port:int, # of this process's store
)->int: # besides the store's own client
    "How many hosts are connected"
    found = psutil.Process().net_connections('tcp')
    return sum(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in found) - 1


def closed(
    store:TCPStore, # that torchrun uses
)->bool: # then no host is ever let in again
    "Whether a torchrun has left for good, done or after too many failures"
    state = C10dRendezvousBackend(store, ID).get_state()
    return state is not None and pickle.loads(state[0]).closed


def lasts(
    condition, # callable
    seconds:float, # for which it must hold
)->bool:
    "Whether something stays so"
    end = time.monotonic() + seconds
    while condition():
        if time.monotonic() > end: return True
        time.sleep(.5)
    return False


def serve(
    port:int, # TCP
):
    "Keep a store; a fresh one where torchrun has closed it, so that hosts may try again, and where all hosts have left"
    begun = False
    while True:
        store = TCPStore('localhost', port, is_master=True, wait_for_workers=False)
        if begun: store.set(BEGUN, '')
        begun = tend(store, port)
        del store


def tend(
    store:TCPStore, # of this process
    port:int, # where it listens
)->bool: # whether the training that has begun goes on in the next one
    "Return when a fresh store is needed"
    used = False
    while True:
        used = used or connections(port) > 0 or store.check([BEGUN])
        if lasts(lambda: closed(store), CLOSED): return store.check([BEGUN])
        if used and lasts(lambda: connections(port) < 1, IDLE): return False
        time.sleep(1)


def meet(
    store:TCPStore, # of the jump host
    own:str, # address of this host
    hosts:list, # addresses of all
    end:float, # when to give up, by `time.monotonic`
)->str: # what happened
    "Return when all hosts are there: one that comes later makes all others start again from their last checkpoint"
    store.set(f'ready/{own}', '')
    while not store.check([BEGUN]):
        missing = [host for host in hosts if not store.check([f'ready/{host}'])]
        if not missing or time.monotonic() > end:
            store.set(BEGUN, '')
            return f"training begins without {', '.join(missing)}" if missing else 'all hosts are there'
        time.sleep(1)
    return 'training has begun'


def wait(
    server:str, # address of the jump host
    port:int, # TCP
    own:str, # address of this host
    hosts:list, # addresses of all
    minutes:float, # at most
)->str: # what happened
    "As `meet`, although the jump host may open a fresh store meanwhile"
    end = time.monotonic() + 60 * minutes
    while True:
        try: return meet(TCPStore(server, port, is_master=False, timeout=timedelta(minutes=5)), own, hosts, end)
        except DistError:
            if time.monotonic() > end: raise
            time.sleep(1)


def main(words):
    if words[0] == 'serve': return serve(int(words[1]))
    server, port, own, hosts, minutes = words[1:]
    print(wait(server, int(port), own, hosts.split(','), float(minutes)), file=sys.stderr)


if __name__ == '__main__': main(sys.argv[1:])
