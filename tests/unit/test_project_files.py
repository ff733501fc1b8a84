"""The files around the code agree with each other: licence, citation, changelog, workflow, hooks, container."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import mesh_megatron

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def declared(key: str):
    """A value of pyproject.toml; Python 3.10 has no reader for it."""
    return ast.literal_eval(re.search(rf"^{re.escape(key)} = (.+)$", PYPROJECT, flags=re.MULTILINE)[1])


def test_licence_is_the_declared_one_in_full():
    assert declared("license") == "Apache-2.0"
    licence = (ROOT / "LICENSE").read_text()
    title, terms, appendix = re.split(r"TERMS AND CONDITIONS FOR USE.*|END OF TERMS AND CONDITIONS", licence)
    assert re.search(r"Apache License\s+Version 2.0, January 2004", title)
    assert re.findall(r"^   (\d)\. ", terms, flags=re.MULTILINE) == list("123456789")
    assert "http://www.apache.org/licenses/LICENSE-2.0" in appendix


@pytest.mark.parametrize("pattern", [name for name in declared('"*"') if "*" not in name])
def test_declared_package_files_exist(pattern):
    assert list((ROOT / "mesh_megatron").rglob(pattern)), f"pyproject.toml packages {pattern}, of which there is none"


def test_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == mesh_megatron.__version__
    assert citation["license"] == declared("license")
    [paper] = citation["references"]
    assert f"]({paper['url']})" in (ROOT / "README.md").read_text()
    assert all(author["family-names"] and author["given-names"] for author in paper["authors"])


def test_changelog_keeps_its_form():
    headings = re.findall(r"^##+ (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for heading in headings[1:]:
        assert heading in kinds or re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", heading), heading


def test_workflow_runs_ci_on_the_oldest_and_newest_python():
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    accepted = SpecifierSet(declared("requires-python"))
    supported = [f"3.{minor}" for minor in range(8, 30) if f"3.{minor}" in accepted]
    tested = job["strategy"]["matrix"]["python"]
    assert {supported[0], supported[-1]} <= set(tested) <= set(supported)


def test_classifiers_name_every_supported_python():
    accepted = SpecifierSet(declared("requires-python"))
    supported = {f"3.{minor}" for minor in range(8, 30) if f"3.{minor}" in accepted}
    assert set(re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT)) == supported
    for page in ("README.md", "CONTRIBUTING.md"):
        assert f"Python 3.10 to {max(supported, key=lambda name: int(name[2:]))}" in (ROOT / page).read_text()


def test_hooks_run_what_make_check_runs():
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [shlex.split(hook["entry"]) for hook in repository["hooks"]]
    check = re.search(r"^check:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    programs = [shlex.split(command)[0].removeprefix("$(BIN)/") for command in check.split("&&")]
    assert [hook[0].removeprefix(".venv/bin/") for hook in hooks] == programs


def test_the_package_keeps_the_torch_of_an_image(monkeypatch):
    """Exact versions would replace what NVIDIA's images compile for themselves. The pins are among those accepted."""
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    requirements = [Requirement(line) for line in given["install_requires"]]
    pins = [Requirement(line) for line in (ROOT / "requirements/runtime.txt").read_text().splitlines()]
    assert [(r.name, r.marker) for r in requirements] == [(r.name, r.marker) for r in pins]
    for asked, pin in zip(requirements, pins, strict=True):
        [version] = [part.version for part in pin.specifier]
        assert version in asked.specifier
        if asked.name == "torch":
            assert asked.specifier.contains("2.14.0a0+nv26.09", prereleases=True)
        assert (asked.specifier == pin.specifier) == (asked.name == "megatron-core"), asked


def test_container_copies_files_that_exist():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    copied = [line.split()[1] for line in commands if line.startswith("COPY ")]
    required = re.findall(r"-r (\S+)", " ".join(commands))
    assert copied and required
    for path in [*copied, *required]:
        assert (ROOT / path).exists(), path
