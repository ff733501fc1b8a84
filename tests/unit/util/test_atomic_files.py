"""Modes of files that a library makes for its owner alone."""

from __future__ import annotations

import os

import pytest

from mesh_megatron.util.atomic_files import open_to_others


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path, mask, mode):
    path = tmp_path / "file"
    path.touch(mode=0o600)
    before = os.umask(mask)
    try:
        open_to_others(path)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode
