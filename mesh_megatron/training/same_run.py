"""What all ranks must have in common before they join their groups: settings, code, data files."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import Counter
from pathlib import Path

import mesh_megatron
from mesh_megatron.config import cli
from mesh_megatron.config.run import RunConfig
from mesh_megatron.training.agreement import gather

_ENDS = 1 << 20


def check_same_run(run: RunConfig) -> None:
    """Raise ``ValueError`` on every rank if one has other settings, code or data, naming it and what differs."""
    differences = differing(gather(facts_of(run)))
    if differences:
        raise ValueError(f"the ranks do not start the same run: {'; '.join(differences)}")


def facts_of(run: RunConfig) -> dict[str, str]:
    """Every setting by its flag, versions, a hash of the package's source, and what the data files are."""
    facts: dict[str, str] = {}
    for name, value in cli.to_dict(run).items():
        group = value if isinstance(value, dict) else {name: value}
        facts |= {"--" + field.replace("_", "-"): str(setting) for field, setting in group.items()}
    facts |= {package: importlib.metadata.version(package) for package in ("torch", "megatron-core")}
    facts["source of mesh_megatron"] = _source_hash(Path(mesh_megatron.__file__).parent)
    for prefixes in run.data.sources().values():
        facts |= {f"{prefix}{end}": _file(Path(f"{prefix}{end}")) for prefix in prefixes for end in (".idx", ".bin")}
    return facts


def differing(facts: list[dict[str, str]]) -> list[str]:
    """A line for every fact that is not the same on all ranks; ``facts`` by rank, the commonest value is the rule."""
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


def _source_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _file(path: Path) -> str:
    """Size and a hash of both ends: enough to tell another data set, and quick on a shared disk."""
    if not path.exists():
        return "missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_ENDS))
        file.seek(max(size - _ENDS, 0))
        digest.update(file.read())
    return f"{size} bytes ({digest.hexdigest()[:16]})"
