"""Everything else is in pyproject.toml.

``make env`` installs exactly what requirements/ pins; the package itself accepts other versions, so that an image that
brings its own torch keeps it.
"""

from pathlib import Path

from setuptools import setup

REQUIREMENTS = Path(__file__).parent / "requirements"
EXACT = ("megatron-core",)  # more than its public interface is used
OLDEST = {"torch": "2.11", "transformers": "5.4"}  # that were tried


def pinned(name: str) -> list[str]:
    lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]


def accepted(requirement: str) -> str:
    """Return ``NAME==VERSION; MARKER`` without the version, or with the oldest one."""
    name, _, rest = requirement.partition("==")
    if name in EXACT:
        return requirement
    _, semicolon, marker = rest.partition(";")
    return name + (f">={OLDEST[name]}" if name in OLDEST else "") + semicolon + marker


setup(
    install_requires=[accepted(requirement) for requirement in pinned("runtime")],
    extras_require={
        "te": pinned("te"),
        "eval": [accepted(requirement) for requirement in pinned("eval")],
        "dev": pinned("dev"),
    },
)
