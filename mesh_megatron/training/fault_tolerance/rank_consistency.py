"""A check that all ranks have the same settings, code, data files and --save folder, before they form groups."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import secrets
import socket
import time
from collections import Counter
from pathlib import Path

import torch.distributed as dist

import mesh_megatron
from mesh_megatron.config import cli
from mesh_megatron.config.bounds import flag
from mesh_megatron.config.run import RunConfig
from mesh_megatron.data.fingerprint import data_files
from mesh_megatron.parallel.collectives import first_failure, gather
from mesh_megatron.platform import device

_SECONDS_TO_SEE_A_FILE = 5.0  # just created by another machine on a shared disk


def check_rank_consistency(run: RunConfig) -> None:
    """Raise ``ValueError`` on every rank if settings, code, data or --save are not the same, naming the differences."""
    facts = facts_of(run)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(gather(digest))) > 1:  # exchange all facts only if they differ: there may be many
        raise ValueError(f"the ranks do not start the same run: {'; '.join(differing(gather(facts)))}")
    if run.checkpoint.save is not None:
        _check_shared(run.checkpoint.save)


def facts_of(run: RunConfig) -> dict[str, str]:
    """Return every setting by its flag, versions, a hash of the package's source, and the data files."""
    facts: dict[str, str] = {}
    for name, value in cli.to_dict(run).items():
        group = value if isinstance(value, dict) else {name: value}
        facts |= {flag(field): str(setting) for field, setting in group.items()}
    facts |= {package: importlib.metadata.version(package) for package in ("torch", "megatron-core")}
    facts["source of mesh_megatron"] = _source_hash(Path(mesh_megatron.__file__).parent)
    return facts | data_files(run.data)


def differing(facts: list[dict[str, str]]) -> list[str]:
    """Return a line for every rank and fact whose value is not the most common one; ``facts`` is by rank."""
    lines = []
    for name in sorted(set().union(*facts)):
        values = [mine.get(name, "missing") for mine in facts]
        rule = Counter(values).most_common(1)[0][0]
        lines += [
            f"{name} is {value} on rank {rank} and {rule} elsewhere"
            for rank, value in enumerate(values)
            if value != rule
        ]
    return lines


def _check_shared(save: Path) -> None:
    """Raise ``ValueError`` on every rank if any rank's --save folder is not that of rank 0."""
    proof = save / f".shared.{gather(secrets.token_hex(4))[0]}"
    if device.rank() == 0:
        proof.touch()
    dist.barrier()
    deadline = time.monotonic() + _SECONDS_TO_SEE_A_FILE
    while not (seen := proof.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    failure = None
    if not seen:
        failure = f"--save {save} is another folder on {socket.gethostname()} than on rank 0's machine"
    reason = first_failure(failure)
    if device.rank() == 0:
        proof.unlink()
    if reason is not None:
        raise ValueError(f"{reason}: name one on a disk that all machines share")


def _source_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]
