"""What the fork server of ``rank_pool.py`` imports once, for all ranks."""

from mesh_megatron.platform import device

device.prepare()

import mesh_megatron.training.checkpoint  # noqa: E402
import mesh_megatron.training.loop  # noqa: E402, F401
