"""heartbeat.json as read by scripts and by a process that torchrun has restarted."""

import json
import time

import pytest

from mesh_megatron.commands import heartbeat
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


def test_a_refusal_is_noted(tmp_path, monkeypatch):
    note_refusal(tmp_path / "absent", "a flag")
    assert exit_code(tmp_path, monkeypatch) == 2
    note_refusal(tmp_path, "a flag")
    assert exit_code(tmp_path, monkeypatch) == 2
    write_status(tmp_path, RunStatus(status="running", iteration=7))
    note_refusal(tmp_path, "a flag")
    assert exit_code(tmp_path, monkeypatch) == 2
    assert (read_status(tmp_path).iteration, read_status(tmp_path).reason) == (7, "a flag")


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
