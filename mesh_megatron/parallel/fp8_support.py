"""Check that this machine supports what the FP8 flags request."""

from __future__ import annotations

from megatron.core.utils import is_te_min_version

from mesh_megatron.config.run import RunConfig
from mesh_megatron.parallel.build_model import resolve_implementation
from mesh_megatron.platform import device

# Recipe -> (lowest compute capability, lowest version of Transformer Engine).
_NEEDS = {
    "tensorwise": ((8, 9), "2.2.0"),
    "delayed": ((8, 9), "1.0.0"),
    "blockwise": ((9, 0), "2.3.0"),
    "mxfp8": ((10, 0), "2.1.0"),
}


def check_fp8(run: RunConfig) -> None:
    """Raise ``ValueError`` with flag, value and fix if the device or the software does not support the FP8 flags."""
    fp8 = run.fp8
    if fp8.fp8_format is None:
        return
    if not device.has_gpu():
        raise ValueError(f"--fp8-format {fp8.fp8_format} needs a GPU and there is none: drop it and use --bf16")
    if resolve_implementation(run) != "transformer_engine":
        raise ValueError(
            f"--fp8-format {fp8.fp8_format}: FP8 needs Transformer Engine, which is not installed or does not fit; "
            "pip install 'mesh-megatron[te]' or drop the flag"
        )
    recipe, have = f"--fp8-recipe {fp8.fp8_recipe}", device.compute_capability()
    needed, version = _NEEDS[fp8.fp8_recipe]
    instead = "drop --fp8-format" if fp8.fp8_recipe in ("tensorwise", "delayed") else "use --fp8-recipe tensorwise"
    if have < needed:
        raise ValueError(
            f"{recipe} needs compute capability {needed[0]}.{needed[1]}; {device.device_name()} has "
            f"{have[0]}.{have[1]}: {instead}"
        )
    if fp8.fp8_recipe == "mxfp8" and have >= (12, 0):
        raise ValueError(f"{recipe} lacks matrix products on compute capability {have[0]}.{have[1]}: {instead}")
    if fp8.fp8_recipe == "blockwise" and device.cuda_version() < (12, 9):
        raise ValueError(f"{recipe} needs CUDA 12.9 or newer: {instead}")
    if not is_te_min_version(version):
        raise ValueError(f"{recipe} needs Transformer Engine {version} or newer: pip install 'mesh-megatron[te]'")
