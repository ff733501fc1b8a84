"""The lock on a --save folder: which runs start at once, which after watching it, and which are refused."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from mesh_megatron.training.fault_tolerance import save_lock
from mesh_megatron.training.fault_tolerance.save_lock import OWNER, InUse, Owner, hold_save_lock, wait_until_free


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch):
    monkeypatch.setattr(save_lock, "_TOUCH_SECONDS", 0.1)
    monkeypatch.setattr(save_lock, "_WATCH_SECONDS", 2.0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def seconds_to_enter(save):
    start = time.monotonic()
    wait_until_free(save)
    return time.monotonic() - start


@pytest.fixture
def lives():
    """An owner that is a process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process, replace(Owner(), pid=process.pid, birth=save_lock._birth(process.pid))
    process.kill()
    process.wait()


ELSEWHERE = Owner(host="node7", machine="another boot", job="12")


def wait_for_a_touch(save):
    first, deadline = save_lock._read(save), time.monotonic() + 60
    while save_lock._read(save).touched == first.touched:
        assert time.monotonic() < deadline, "the file is not touched"
        time.sleep(0.02)
    assert save_lock._read(save).owner == first.owner


@pytest.fixture
def touching(tmp_path):
    """A process of another machine that keeps touching the file."""
    save_lock._write(tmp_path, ELSEWHERE)
    holder = save_lock._start_holding(tmp_path, ELSEWHERE)
    wait_for_a_touch(tmp_path)
    yield
    holder.kill()
    holder.wait()


def test_a_folder_is_owned_until_its_run_ends(tmp_path):
    with hold_save_lock(tmp_path):
        assert (tmp_path / OWNER).exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), hold_save_lock(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_lives_here_keeps_its_folder(tmp_path, lives):
    process, owner = lives
    save_lock._write(tmp_path, owner)
    with pytest.raises(InUse, match=f"--save {tmp_path} is in use by another run, process {process.pid} on .*: wait"):
        wait_until_free(tmp_path)  # although it does not touch the file: it may have been stopped for a while


def test_a_killed_process_loses_it_at_once(tmp_path, lives):
    process, owner = lives
    save_lock._write(tmp_path, owner)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie as long as its parent does not ask
    assert seconds_to_enter(tmp_path) < 1
    process.wait()
    assert seconds_to_enter(tmp_path) < 1


def test_a_killed_process_whose_id_is_used_again_loses_it_at_once(tmp_path, lives):
    save_lock._write(tmp_path, replace(lives[1], birth="1"))
    assert seconds_to_enter(tmp_path) < 1


def test_one_that_is_dying_is_waited_for(tmp_path, lives):
    process, owner = lives
    save_lock._write(tmp_path, owner)
    threading.Timer(0.5, process.kill).start()
    assert 0.3 < seconds_to_enter(tmp_path) < 2


@pytest.mark.usefixtures("touching")
def test_a_process_elsewhere_keeps_it_while_it_touches_the_file(tmp_path):
    with pytest.raises(InUse, match=r"process \d+ on node7 of SLURM job 12"):
        wait_until_free(tmp_path)


def test_a_process_elsewhere_loses_it_by_standing_still(tmp_path):
    save_lock._write(tmp_path, ELSEWHERE)
    os.utime(tmp_path / OWNER, (0, time.time() + 3600))  # its clock is wrong
    assert 2 <= seconds_to_enter(tmp_path) < 4


@pytest.mark.usefixtures("touching")
def test_the_same_job_gets_it_back_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert seconds_to_enter(tmp_path) < 1


def test_what_is_no_owners_file_keeps_nobody_out(tmp_path):
    for text in ("", "{}}", '["x"]', '{"owner": 1}'):
        (tmp_path / OWNER).write_text(text)
        assert seconds_to_enter(tmp_path) < 1


OWNS = """
import ctypes, sys
from pathlib import Path
from mesh_megatron.training.fault_tolerance import save_lock
save_lock._TOUCH_SECONDS = 0.1
with save_lock.hold_save_lock(Path(sys.argv[1])):
    print("owns", flush=True)
    ctypes.PyDLL(None).sleep(3600)  # which lets no thread run, as Megatron-Core's index of data
"""


@pytest.fixture
def standing_still(tmp_path):
    """A run that never ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNS, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "owns\n"
    yield process
    process.kill()
    process.communicate()


def test_a_busy_run_keeps_its_folder(tmp_path, standing_still):
    for _ in range(3):
        wait_for_a_touch(tmp_path)
    standing_still.kill()
    standing_still.wait()
    last = save_lock._read(tmp_path)
    time.sleep(0.5)
    assert save_lock._read(tmp_path) == last, "the file is still touched after its run was killed"


def test_a_run_whose_place_was_taken_ends(tmp_path, standing_still):
    save_lock._write(tmp_path, ELSEWHERE)
    assert standing_still.wait(timeout=60) == -signal.SIGKILL
    assert f"--save {tmp_path} now belongs to another run, process" in standing_still.stderr.read()
    assert save_lock._read(tmp_path).owner == ELSEWHERE


def test_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    save_lock._write(tmp_path, replace(Owner(), birth="1"))

    def no_room(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_lock, "write_atomically", no_room)
    with hold_save_lock(tmp_path):
        time.sleep(0.5)
