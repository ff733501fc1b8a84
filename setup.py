"""Everything is in pyproject.toml; what is installed is read from the pinned requirement files."""

from pathlib import Path

from setuptools import setup

REQUIREMENTS = Path(__file__).parent / "requirements"


def pinned(name: str) -> list[str]:
    lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]


setup(
    install_requires=pinned("runtime"),
    extras_require={
        "te": pinned("te"),
        "eval": pinned("eval"),
        "dev": pinned("dev"),
    },
)
