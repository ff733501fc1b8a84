"""Imports that the fork server of ``rank_pool.py`` and ``survival/fleet.py`` makes once, for all ranks."""

import os
from pathlib import Path

from engine import install

from mesh_megatron.platform import device

if install.FOLDER in os.environ:
    install.install(Path(os.environ[install.FOLDER]))
device.prepare()

import mesh_megatron.training.pretrain  # noqa: E402, F401
import pretrain_mesh  # noqa: E402, F401
