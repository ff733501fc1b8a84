"""Commands, flags, links and files that the documents name exist."""

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/*.md")])
PYPROJECT = ROOT / "pyproject.toml"
FENCED = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+(?!\w)")
OTHERS_FLAGS = {
    *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"),  # torchrun's
    *("--module", "--start-method", "--shutdown-timeout"),  # torchrun's, which tools/launch.py refuses
    *("--account", "--array", "--nodes", "--partition", "--requeue", "--signal", "--time"),  # sbatch's
    *("--write", "--report-only"),  # tests/distributed/update_golden.py, python -m benchmarks.study
    *("--no-python", "--device"),  # torchrun's, lm_eval's
    *("--model-impl", "--trust-remote-code", "--served-model-name", "--enforce-eager"),  # vllm serve's
    *("--continuous-batching", "--cb-num-blocks"),  # transformers serve's
    *("--fp8-param-gather", "--use-torch-fsdp2", "--use-megatron-fsdp", "--reset-position-ids"),  # Megatron-LM's
    *("--inprocess-restart",),  # Megatron-LM's
    *("--partitions", "--keep-sequential-samples", "--split-sentences"),  # Megatron-LM's preprocess_data.py
    # What import_megatron.py reads or refuses in a checkpoint of Megatron-LM.
    *("--ckpt-format", "--ckpt-convert-format", "--bias-gelu-fusion", "--add-qkv-bias", "--apply-layernorm-1p"),
}


def test_start_is_two_commands():
    start = (ROOT / "README.md").read_text().split("## Start")[1].split("##")[0]
    commands = [line.split("#")[0].strip() for line in start.splitlines() if line.startswith("    ")]
    assert commands == ["make demo", "make test"]
    for command in commands:  # make knows both, and what they depend on
        subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def steps_of(target: str) -> list[str]:
    """The commands that make would run for it."""
    shown = subprocess.run(["make", target, "--dry-run"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [line for line in shown.stdout.splitlines() if "-m pytest" in line]


def test_ci_runs_the_readmes_test_command():
    """As the first part of ``make test-all``."""
    assert "\nmake test-all" in (ROOT / ".ci/run").read_text()
    assert steps_of("test") == steps_of("test-all")[:1]


def test_the_tiers_of_tests_leave_none_out():
    """Each test is run by one of the three, whatever its marks."""
    steps = [*steps_of("test-all"), *steps_of("nightly")]
    expressions = [re.search(r" -m '?((?:not |and |or |full ?|long ?)+)'?", step)[1] for step in steps]
    assert len(expressions) == 3
    for full, long in itertools.product((False, True), repeat=2):
        chosen = [eval(expression, {"full": full, "long": long}) for expression in expressions]
        assert chosen.count(True) == 1, f"full {full}, long {long}: {expressions}"


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)", FENCED.sub("", document.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
            linked = path.parent / target if target else path
            assert not anchor or anchor in anchors(linked), f"{path.name}: {target} has no heading #{anchor}"


def commands(path: Path) -> str:
    """A script without its comments, or the code of a document: fenced, indented, or between backquotes."""
    text = path.read_text()
    if path.suffix == ".md":
        spans = re.findall(r"`[^`\n]+`", FENCED.sub("", text))
        text = "\n".join([*FENCED.findall(text), *re.findall(r"^    .*", text, flags=re.MULTILINE), *spans])
    return re.sub(r"#.*", "", text)


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / ".ci/run"], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_exists(path):
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", commands(path)))
    assert named <= set(targets), f"{path.name}: the Makefile has no {sorted(named - set(targets))}"


def known_flags() -> set[str]:
    """A command's flags are the fields of its dataclasses."""
    package = ROOT / "mesh_megatron"
    shared = [package / "planning/hardware.py", package / "hf/import_options.py"]
    sources = [*package.glob("commands/*.py"), *ROOT.glob("benchmarks/*.py"), *shared]
    fields = re.findall(r"^    (\w+): ", "".join(path.read_text() for path in sources), flags=re.MULTILINE)
    return {"--" + field.replace("_", "-") for field in fields}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_exists(path):
    flags = {"--help", *(ROOT / "tests/unit/config/flags.txt").read_text().split(), *known_flags(), *OTHERS_FLAGS}
    if path.name in ("megatron.md", "CHANGELOG.md"):
        folder = ROOT / "tests/unit/config"
        flags |= {*(folder / "megatron_flags.txt").read_text().split()}
        flags |= {*FLAG.findall((folder / "megatron_examples.txt").read_text())}
    for flag in FLAG.findall(path.read_text()):
        assert {flag, flag.replace("--no-", "--", 1)} & flags, f"{path.name}: no command has {flag}"


COMMANDS = sorted(path.stem for path in (ROOT / "mesh_megatron/commands").glob("[!_]*.py"))
SCRIPTS = dict(
    re.findall(r'^(mesh-[\w-]+) = "mesh_megatron\.commands\.(\w+):main"$', PYPROJECT.read_text(), flags=re.MULTILINE)
)
# The program that pip installs; in addition it reports whether torch was imported.
PROGRAM = """
import sys
from mesh_megatron.commands.{command} import main
sys.argv[0] = "/usr/bin/{script}"
try:
    sys.exit(main())
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_every_tool_is_documented_and_helps(tool):
    assert any(tool.name in path.read_text() for path in DOCUMENTS), f"no document names tools/{tool.name}"
    shown = subprocess.run([sys.executable, tool, "--help"], check=True, capture_output=True, text=True).stdout
    assert re.search(rf"^usage: \S*{tool.name} ", shown)


def test_a_tool_runs_the_package_of_its_own_tree(tmp_path):
    """As Megatron-LM's tools do: a clone needs its dependencies, but neither ``pip install`` nor PYTHONPATH."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    commands = tmp_path / "mesh_megatron/commands"
    commands.mkdir(parents=True)
    (commands.parent / "__init__.py").touch()
    for tool in (tmp_path / "tools").glob("*.py"):
        (commands / tool.name).write_text("def main():\n    print(__file__)\n")
        run = subprocess.run([sys.executable, tool], cwd="/", check=True, capture_output=True, text=True)
        assert run.stdout.strip() == str(commands / tool.name)


def test_every_command_has_a_starter_and_a_program():
    starters = {path.stem for path in (ROOT / "tools").glob("*.py")} | {"pretrain"}
    assert set(COMMANDS) == starters == set(SCRIPTS.values())
    assert len(SCRIPTS) == len(COMMANDS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_program_is_documented_and_helps_without_torch(script):
    page = (ROOT / "docs/architecture.md").read_text()
    assert re.search(rf"`(torchrun --no-python )?{script}`", page), f"docs/architecture.md does not list {script}"
    program = PROGRAM.format(command=SCRIPTS[script], script=script)
    shown = subprocess.run(
        [sys.executable, "-c", program, "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert re.search(rf"^usage: {script} ", shown.stdout)
    assert shown.stderr == "False\n", "--help imported torch"
