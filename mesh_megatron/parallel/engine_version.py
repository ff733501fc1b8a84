"""Which versions of Transformer Engine go with the installed Megatron-Core (the table of docs/training.md)."""

from __future__ import annotations

from importlib import metadata

from megatron.core import __version__
from packaging.version import Version

# Megatron-Core below -> Transformer Engine from, and below: what Megatron-Core declares; where it declares no end, the
# newest release at that time, whose Python was held against ours.
_GOES_WITH = (("0.19", "2.9", "2.12"), ("0.20", "2.9", "2.21"))


def engine_mismatch() -> str | None:
    """Return why the installed Transformer Engine does not go with Megatron-Core; None if it does, or is absent."""
    try:
        installed = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None
    return mismatch(__version__, installed)


def mismatch(core: str, engine: str) -> str | None:
    """Return why Transformer Engine ``engine`` does not go with Megatron-Core ``core``; None if it does."""
    for below, first, end in _GOES_WITH:
        if Version(core) < Version(below):
            version = Version(Version(engine).base_version)  # images of NVIDIA append the commit
            if Version(first) <= version < Version(end):
                return None
            return (
                f"Transformer Engine {engine} does not go with megatron-core {core}, which needs at least {first} and "
                f"less than {end}: pip install 'mesh-megatron[te]'"
            )
    return None
