"""Run work on rank 0 before the other ranks, which never wait for a rank that failed or died."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

Result = TypeVar("Result")
_calls = itertools.count()  # every rank calls in the same order, so the numbers agree

BEAT_SECONDS = 5.0
# Megatron's index builder holds the interpreter lock while it runs, so a missing heartbeat may still mean work.
PATIENCE_SECONDS = 900.0


def rank_zero_first(build: Callable[[], Result], task: str = "build the datasets") -> Result:
    """Run ``build()`` on rank 0 and then on the others; without a process group simply run it.

    An error of rank 0 is raised on every rank. The death of rank 0 is noticed when its store closes or its
    heartbeat stops for ``PATIENCE_SECONDS``. Ranks wait on the rendezvous store instead of a collective: this works
    with any backend, and no collective's timeout limits how long building may take. ``task`` names in errors what
    rank 0 could not do.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return build()
    store, key = _get_default_store(), f"mesh_megatron/data/{next(_calls)}"
    if dist.get_rank() == 0:
        return _build_with_heartbeat(build, store, key)
    _wait(store, key, task)
    return build()


def _build_with_heartbeat(build: Callable[[], Result], store: dist.Store, key: str) -> Result:
    done = threading.Event()

    def beat() -> None:
        for number in itertools.count():
            store.set(f"{key}/beat", str(number))
            if done.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    outcome = {"error": "rank 0 was interrupted", "user": False}
    try:
        result = build()
        outcome = {}
        return result
    except Exception as error:
        outcome = {"error": str(error) or repr(error), "user": isinstance(error, ValueError)}
        raise
    finally:
        done.set()
        thread.join()
        store.set(key, json.dumps(outcome))


def _wait(store: dist.Store, key: str, task: str) -> None:
    last_beat, last_change = None, time.monotonic()
    while True:
        try:
            store.wait([key], timedelta(seconds=BEAT_SECONDS))
            outcome = json.loads(store.get(key))
            break
        except RuntimeError as error:  # a timeout is one, and so is a lost connection
            try:
                beat = store.get(f"{key}/beat") if store.check([f"{key}/beat"]) else None
            except RuntimeError:
                raise RuntimeError(f"rank 0 died before it could {task}; its own output says why") from error
        if beat != last_beat:
            last_beat, last_change = beat, time.monotonic()
        elif time.monotonic() - last_change >= PATIENCE_SECONDS:
            raise RuntimeError(f"rank 0 has sent no heartbeat for {PATIENCE_SECONDS:.0f} s and did not {task}")
    if outcome:
        kind = ValueError if outcome["user"] else RuntimeError
        raise kind(f"rank 0 could not {task}: {outcome['error']}")
