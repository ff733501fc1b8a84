"""Rendezvous store for ranks that torchrun may restart."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_PORT = "mesh_megatron/port"
_SECONDS = 5.0


def restarts() -> bool:
    """Return whether torchrun restarts failed ranks and hosts their store."""
    hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return hosts and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def fresh_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return a store that no earlier attempt has used, this rank and the number of ranks.

    torchrun keeps one store for all attempts (as of torch 2.13), in which ranks find the addresses of dead ones and
    fail to connect. The number of an attempt cannot tell them apart: nodes count differently. So rank 0 hosts a store
    for the attempt and leaves its port in torchrun's. A port found there whose store does not answer is of an earlier
    attempt, all of whose processes have ended.
    """
    common, rank, ranks = next(rendezvous("env://", timeout=timeout))
    host = os.environ["MASTER_ADDR"]  # where rank 0 runs, as torchrun sets it
    if rank == 0:
        own = dist.TCPStore(host, 0, ranks, is_master=True, wait_for_workers=False, timeout=timeout)
        common.set(_PORT, str(own.port))
        return own, rank, ranks
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(common.get(_PORT))
        try:
            socket.create_connection((host, port), _SECONDS).close()
            store = dist.TCPStore(host, port, ranks, is_master=False, wait_for_workers=False, timeout=timeout)
            return store, rank, ranks
        except OSError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)
