"""Imports of all ranks, done once in the process from which ``commands/launch.py`` forks them; imported there alone.

A process that has used CUDA cannot be forked, and Megatron-Core, or Transformer Engine with it, may use CUDA when it is
imported. So with a GPU this is torch alone.
"""

from __future__ import annotations

import os

import torch.distributed.run  # noqa: F401

import mesh_megatron.config.run  # noqa: F401
from mesh_megatron.platform import device
from mesh_megatron.util.processes import die_with_parent

# The ranks end with this process, but this process would not end with the launcher: ranks hold its pipe, too.
die_with_parent(os.getppid())
os.setsid()  # Ctrl-C is for the launcher, which passes it on
if device.uses_no_gpu():
    device.prepare()
    import mesh_megatron.training.pretrain  # noqa: F401
