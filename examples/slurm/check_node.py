"""Check that this node can run the job: print all errors, or write the facts that must be the same on every node.

check_environment.sh starts this on every node: check_node.py FOLDER writes FOLDER/<node>.
"""

import hashlib
import os
import platform
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main(folder: Path) -> int:
    node = os.environ["SLURMD_NODENAME"]
    errors = [*check_meeting_point(), *check_packages(), *check_gpus()]
    try:
        (folder / node).write_text("" if errors else "".join(f"{fact}\n" for fact in facts()))
    except OSError as error:
        errors.append(
            f"SAVE={folder.parent} cannot be written: {error.strerror}; name a folder on a disk that all nodes share"
        )
    for error in errors:
        print(f"{node}: error: {error}", file=sys.stderr)
    return 1 if errors else 0


def check_meeting_point() -> Iterator[str]:
    """Yield errors about the first node's name and, on the first node, about the port if HEAD_PORT is set."""
    head, port = os.environ["HEAD"], os.environ.get("HEAD_PORT")
    try:
        socket.getaddrinfo(head, port)
    except OSError as error:
        yield f"the first node's name {head} cannot be resolved: {error.strerror}; fix /etc/hosts or DNS"
    if port and os.environ["SLURM_NODEID"] == "0":
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            yield f"HEAD_PORT={port} cannot be used: {error.strerror}; set another one, or none to use a free port"


def check_packages() -> Iterator[str]:
    """Yield an error if a package that training needs cannot be imported."""
    try:
        from mesh_megatron.platform import device  # imports torch

        device.prepare()
        import megatron.core  # noqa: F401
    except ImportError as error:
        yield f"{sys.executable} cannot import {error.name}: {error}; run make env, or set PYTHON"


def check_gpus() -> Iterator[str]:
    """Yield an error if torch sees fewer GPUs than SLURM assigned to the job on this node, or fewer than ranks."""
    asked = int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))
    ranks = os.environ.get("RANKS_PER_NODE", str(asked))
    if asked and "torch" in sys.modules:
        seen = sys.modules["torch"].cuda.device_count()
        if seen < asked:
            yield f"torch sees {seen} of {asked} GPUs: fix the driver (nvidia-smi), or give sbatch --gpus-per-node=0"
        elif int(ranks) > seen:
            yield f"RANKS_PER_NODE={ranks} is more than {seen} GPUs"


def facts() -> list[str]:
    """Return the lines that must be the same on all nodes: code, Python and packages."""
    digest = hashlib.sha256()
    for path in [REPOSITORY / "pretrain_mesh.py", *sorted((REPOSITORY / "mesh_megatron").rglob("*.py"))]:
        digest.update(str(path.relative_to(REPOSITORY)).encode() + path.read_bytes())
    versions = [f"{package} {version(package)}" for package in ("torch", "megatron-core")]
    return [f"code {digest.hexdigest()[:16]}", f"Python {platform.python_version()}", *versions]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
