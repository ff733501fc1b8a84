"""make env on machines with one Python, the wrong one, no venv, or uv: stand-ins that record their calls."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!{bash}
case "$*" in
  *version_info*) echo {version} ;;
  *ensurepip*) exit {no_venv} ;;
  "-m venv "*) echo "python{version} $*" >> "$CALLS"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *) echo "python{version} $*" >> "$CALLS" ;;
esac
"""
UV = """#!{bash}
echo "uv $*" >> "$CALLS"
"""
# uv on a machine whose pip is told of a mirror: the environment that it makes has this pip in it.
UV_BESIDE_PIP = """#!{bash}
if [[ $1 == venv ]]; then mkdir -p "{venv}/bin"; cp "{pip}" "{venv}/bin/python"; fi
if [[ $1 == pip ]]; then
  printf '%s\\n' "$UV_DEFAULT_INDEX" "$UV_INDEX" "$UV_FIND_LINKS" "$UV_CONSTRAINT" >> "$CALLS"
fi
"""
PIP = r"""#!{bash}
case "$*" in *"pip config list"*) cat <<'END'
:env:.find-links='/wheels /more'
global.constraint='/limits.txt'
global.extra-index-url='\nhttps://one\nhttps://two'
global.find-links='/not these'
global.index-url='https://mirror'
END
esac
"""


class Machine:
    """A machine with a shell, and no programs but those that a test adds."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.calls, self.folder = folder / "bin", folder / "calls", folder
        self.bin.mkdir()
        self.calls.touch()
        for program in ("bash", "sed", "dirname", "mkdir", "cp", "rm", "cat"):
            (self.bin / program).symlink_to(shutil.which(program))

    def add(self, name: str, text: str, **values: object) -> None:
        path = self.bin / name
        path.write_text(text.format(bash=self.bin / "bash", **values))
        path.chmod(0o755)

    def python(self, name: str, version: str, venv: bool = True) -> None:
        self.add(name, PYTHON, version=version, no_venv=int(not venv))

    def make_env(self, *python: str, **environment: str) -> subprocess.CompletedProcess:
        command = [self.bin / "bash", ROOT / "requirements/make_env.sh", self.folder / "venv", *python]
        variables = {"PATH": str(self.bin), "CALLS": str(self.calls), **environment}
        return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_the_only_python_is_too_old(machine):
    machine.python("python3", "3.9")
    machine.add("apt-get", "#!{bash}\n")
    done = machine.make_env()
    assert done.returncode == 1 and "no Python 3.10 to 3.13 here (python3 is 3.9)" in done.stderr
    assert "apt-get install python3.13 python3.13-venv" in done.stderr and "uv (https://" in done.stderr
    assert not machine.calls.read_text()


def test_no_python_at_all(machine):
    done = machine.make_env()
    assert done.returncode == 1 and "(python3 is not there)" in done.stderr and "install python3.13," in done.stderr


def test_the_named_python_does_not_fit(machine):
    machine.python("python3", "3.12")
    machine.python("python3.14", "3.14")
    for name, found in (("python3.14", "3.14"), ("python3.99", "not there")):
        done = machine.make_env(name)
        assert done.returncode == 1 and f"PYTHON={name} is {found}; Python 3.10 to 3.13 is needed" in done.stderr


def test_a_python_without_venv(machine):
    machine.python("python3", "3.13", venv=False)
    done = machine.make_env()
    assert done.returncode == 1 and "its modules venv and ensurepip are missing" in done.stderr
    assert "python3.13-venv" in done.stderr


@pytest.mark.parametrize("uv", [False, True])
def test_another_python_than_the_default_one(machine, uv):
    """python3 is too new; the newest that will do is taken, and uv, if it is there, installs the packages."""
    machine.python("python3", "3.15")
    machine.python("python3.11", "3.11")
    machine.python("python3.13", "3.13")
    if uv:
        machine.add("uv", UV)
    done = machine.make_env()
    assert done.returncode == 0, done.stderr
    made, packages, project, *wheel = machine.calls.read_text().splitlines()
    if uv:
        assert made == f"uv venv --quiet --seed --python python3.13 {machine.folder}/venv"
        assert packages.startswith(
            f"uv pip install --quiet --python {machine.folder}/venv/bin/python -r requirements/run"
        )
    else:
        assert made == f"python3.13 -m venv {machine.folder}/venv"
        assert packages.startswith("python3.13 -m pip install")
    assert "-r requirements/runtime.txt -r requirements/dev.txt" in packages
    assert project.endswith("--no-deps --editable .")
    if uv:  # which this stand-in has not brought a Python for
        assert "no wheel of Transformer Engine; its tests on the CPU will be skipped" in done.stderr
    else:
        assert wheel[0].endswith(f"--no-deps --dest {machine.folder}/venv/wheels -r requirements/te.txt")


def test_uv_brings_a_python(machine):
    machine.add("uv", UV)
    assert machine.make_env().returncode == 0
    assert "venv --quiet --seed --python 3.13" in machine.calls.read_text()


def test_uv_is_told_what_pip_is_told(machine):
    machine.add("pip", PIP)
    machine.add("uv", UV_BESIDE_PIP, venv=machine.folder / "venv", pip=machine.bin / "pip")
    assert machine.make_env(UV_CONSTRAINT="mine.txt").returncode == 0
    told = machine.calls.read_text().splitlines()[:4]
    assert told == ["https://mirror", "https://one https://two", "/wheels,/more", "mine.txt"]


def test_uv_can_be_left_out(machine):
    machine.add("uv", UV)
    machine.python("python3", "3.10")
    assert machine.make_env(UV="").returncode == 0
    assert "uv" not in machine.calls.read_text().replace(str(machine.folder), "")


def test_an_environment_is_kept(machine):
    machine.python("python3", "3.11")
    (machine.folder / "venv/bin").mkdir(parents=True)
    shutil.copy(machine.bin / "python3", machine.folder / "venv/bin/python")
    assert machine.make_env().returncode == 0
    assert "venv " not in machine.calls.read_text().replace(str(machine.folder), "")


def test_make_env_runs_it():
    shown = subprocess.run(
        ["make", "env", "--dry-run", "VENV=none", "PYTHON=python3.12"],
        cwd=ROOT, check=True, capture_output=True, text=True, env={**os.environ},
    )  # fmt: skip
    assert "bash requirements/make_env.sh none python3.12" in shown.stdout
