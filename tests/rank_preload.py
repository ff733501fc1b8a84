"""Imports that the fork server of ``rank_pool.py`` and ``survival/fleet.py`` makes once, for all ranks."""

from mesh_megatron.platform import device

device.prepare()

import mesh_megatron.training.pretrain  # noqa: E402, F401
import pretrain_mesh  # noqa: E402, F401
