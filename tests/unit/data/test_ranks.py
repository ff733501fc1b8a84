"""Rank 0 first, on two gloo ranks: its result, its error and its death reach the other."""

import multiprocessing
import os
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from rank_pool import free_port

from mesh_megatron.data import ranks


def run(rank, marker, port, scenario, answers):
    ranks.BEAT_SECONDS, ranks.PATIENCE_SECONDS = 0.2, 5.0
    if rank == 0 and scenario == "dies":
        ranks.BEAT_SECONDS = (
            60.0  # one beat: death in the middle of another leaves a file that its store reads for ever
        )
    limit = timedelta(seconds=300)
    if scenario == "dies with the store":
        shared = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=limit)
    else:
        shared = dist.FileStore(marker + ".store", 2)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=2, timeout=limit)

    if rank == 1:
        open(marker + ".ready", "w").close()

    def build():
        if rank == 0:
            while not os.path.exists(marker + ".ready"):  # dying while the other still connects is another test
                time.sleep(0.01)
            if scenario.startswith("dies"):
                time.sleep(0.5)
                os._exit(1)
            if scenario == "fails":
                raise ValueError("--data-path x: no such data")
            with open(marker, "w") as stream:
                stream.write("by rank 0")
        with open(marker) as stream:
            return stream.read()

    try:
        answers.put((rank, ranks.rank_zero_first(build)))
    except Exception as error:
        answers.put((rank, f"{type(error).__name__}: {error}"))
    answers.close()
    answers.join_thread()
    os._exit(0)  # leaving a process group whose peer is gone may block


@pytest.mark.parametrize(
    "scenario, expected",
    [
        ("builds", {0: "by rank 0", 1: "by rank 0"}),
        (
            "fails",
            {
                0: "ValueError: --data-path x: no such data",
                1: "ValueError: rank 0 could not build the datasets: --data-path x: no such data",
            },
        ),
        pytest.param(
            "dies with the store",
            {1: "RuntimeError: rank 0 died before it could build the datasets; its own output says why"},
            marks=pytest.mark.full,
        ),
        pytest.param(
            "dies",
            {1: "RuntimeError: rank 0 has sent no heartbeat for 5 s and did not build the datasets"},
            marks=pytest.mark.full,
        ),
    ],
)
def test_rank_zero_first(tmp_path, scenario, expected):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    arguments = (str(tmp_path / "built"), free_port(), scenario, answers)
    workers = [context.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    got = dict(answers.get(timeout=300) for _ in expected)
    for worker in workers:
        worker.join(300)
    assert got == expected
    assert all(worker.exitcode is not None for worker in workers)


def test_without_process_group_it_only_builds():
    assert ranks.rank_zero_first(lambda: sys.maxsize) == sys.maxsize
