"""What must be settled before the first test module is imported."""

import os

import torch

if not torch.cuda.is_available():
    # Triton decides once, when it is first imported, whether its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# Some test modules import megatron.core as they are collected, and the CPU platform must come before it.
from mesh_megatron.platform import device  # noqa: E402

device.prepare()
