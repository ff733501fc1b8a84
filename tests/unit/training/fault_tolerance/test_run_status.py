"""heartbeat.json as read by scripts and by a process that torchrun has restarted."""

import json
import time

import pytest

from mesh_megatron.checkpoint.folder import TRACKER
from mesh_megatron.commands import heartbeat
from mesh_megatron.training.callbacks.heartbeat import Heartbeat
from mesh_megatron.training.fault_tolerance.run_status import (
    HEARTBEAT,
    RunStatus,
    note_refusal,
    read_status,
    restarted_in_vain,
    write_status,
)


def exit_code(save, monkeypatch):
    monkeypatch.setattr("sys.argv", ["heartbeat.py", str(save)])
    return heartbeat.main()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (RunStatus(status="finished"), 0),
        (RunStatus(status="stopped early"), 75),
        (RunStatus(status="running"), 4),
        (RunStatus(status="failed"), 1),
        (RunStatus(status="failed", exit_code=1), 1),
        (RunStatus(status="failed", exit_code=3), 3),
    ],
)
def test_exit_codes(status, code, tmp_path, monkeypatch):
    write_status(tmp_path, status)
    assert exit_code(tmp_path, monkeypatch) == code


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '"running"', '{"status": "runnimg"}', '{"iteration": 3}'])
def test_a_damaged_file_is_no_status(content, tmp_path, monkeypatch, capsys):
    (tmp_path / HEARTBEAT).write_text(content)
    with pytest.raises(ValueError, match=f"{HEARTBEAT} is damaged: "):
        read_status(tmp_path)
    assert exit_code(tmp_path, monkeypatch) == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_clock_that_is_ahead(tmp_path, monkeypatch, capsys):
    write_status(tmp_path, RunStatus(status="running"))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert exit_code(tmp_path, monkeypatch) == 4 and "written 0:00:00 ago" in capsys.readouterr().out


def test_a_damaged_tracker_stops_no_heartbeat(tmp_path):
    (tmp_path / TRACKER).write_text("x")
    Heartbeat(tmp_path)
    assert read_status(tmp_path).status == "starting" and read_status(tmp_path).last_checkpoint is None


def test_a_refusal_is_noted(tmp_path, monkeypatch):
    note_refusal(tmp_path / "absent", "a flag")
    assert exit_code(tmp_path, monkeypatch) == 2
    note_refusal(tmp_path, "a flag")
    assert exit_code(tmp_path, monkeypatch) == 2
    assert read_status(tmp_path).reason == "a flag"
    note_refusal(tmp_path, "another flag")
    assert read_status(tmp_path).reason == "another flag" and read_status(tmp_path).refusal is None


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("stopped early", 2), ("running", 2), ("failed", 2)])
def test_a_refused_start_keeps_the_status_of_the_run_before(status, code, tmp_path, monkeypatch, capsys):
    before = RunStatus(status=status, reason="its own", exit_code=1 if status == "failed" else None, iteration=7)
    write_status(tmp_path, before)
    note_refusal(tmp_path, "a flag")
    after = read_status(tmp_path)
    assert (after.status, after.reason, after.exit_code, after.iteration) == (status, "its own", before.exit_code, 7)
    assert after.refusal == "a flag" and exit_code(tmp_path, monkeypatch) == code
    assert f"the newest start was refused (a flag); the run before it | {status}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("a flag"), "finished"), (OSError("disk"), "failed"), (None, "starting")]
)
def test_the_heartbeat_of_a_refused_start(error, status, tmp_path):
    write_status(tmp_path, RunStatus(status="finished", iteration=7))
    beat = Heartbeat(tmp_path)
    if error is not None:
        beat.fail(error)
    after = read_status(tmp_path)
    assert after.status == status and after.refusal == ("a flag" if status == "finished" else None)


def test_wrong_numbers_are_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert restarted_in_vain(tmp_path) is None
    for code, vain in {None: False, 1: False, 3: True}.items():
        write_status(tmp_path, RunStatus(status="failed", reason="10 bad steps", exit_code=code))
        assert (restarted_in_vain(tmp_path) is not None) == vain
    earlier = json.loads((tmp_path / HEARTBEAT).read_text()) | {"time": time.time() - 10 * 365 * 86400}
    (tmp_path / HEARTBEAT).write_text(json.dumps(earlier))
    assert restarted_in_vain(tmp_path) is None  # the launcher is younger
    write_status(tmp_path, RunStatus(status="failed", exit_code=3))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert restarted_in_vain(tmp_path) is None
