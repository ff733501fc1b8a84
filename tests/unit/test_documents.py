"""What the documents promise exists: commands, flags, links, files they name."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_start_is_two_commands():
    start = (ROOT / "README.md").read_text().split("## Start")[1].split("##")[0]
    commands = [line.split("#")[0].strip() for line in start.splitlines() if line.startswith("    ")]
    assert commands == ["make demo", "make test"]
    for command in commands:  # make knows both, and what they depend on
        subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_ci_runs_the_readmes_test_command():
    assert "\nmake test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_flags_of_the_trainer_exist(path):
    flags = set((ROOT / "tests/unit/config/flags.txt").read_text().split())
    text = path.read_text().replace("\\\n", " ")
    for command in re.findall(r"pretrain_mesh\.py ([^\n`]*)", text):
        for flag in re.findall(r"(?<!\S)--[a-z0-9-]+", command):
            known = {flag, flag.replace("--no-", "--", 1)} & flags
            assert known or flag == "--help", f"{path.name}: pretrain_mesh.py has no {flag}"


def test_every_tool_is_documented_and_helps():
    documents = "".join(path.read_text() for path in DOCUMENTS)
    for tool in sorted((ROOT / "tools").glob("*.py")):
        assert tool.name in documents, f"no document names tools/{tool.name}"
