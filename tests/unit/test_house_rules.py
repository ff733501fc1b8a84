"""House rules: who may import whom, small empty packages, no catch-all modules."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mesh_megatron"

# house -> houses it may import, besides itself (docs/architecture.md has the reasons)
ALLOWED = {
    "util": set(),
    "config": {"util"},
    "planning": {"config", "util"},
    "platform": {"util"},
    "data": {"config", "util"},
    "model": {"config", "util"},
    "parallel": {"config", "platform", "model", "util"},
    "checkpoint": {"config", "platform", "parallel", "util"},
    "training": {"config", "planning", "platform", "data", "model", "parallel", "checkpoint", "util"},
    "hf": {"config", "data", "checkpoint", "util"},
    "analysis": {"config", "data", "checkpoint", "hf", "util"},
}
ALLOWED["commands"] = set(ALLOWED)
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")  # only what travels with weights imports relatively
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    house = path.relative_to(PACKAGE).parts[0]
    if house == "__init__.py":
        return
    assert house == "hf" or not any(name.startswith(".") for name in imported(path)), "relative import"
    used = {name.split(".")[1] for name in imported(path) if name.startswith("mesh_megatron.")}
    assert used <= ALLOWED[house] | {house}, f"{house}/ may not import {sorted(used - ALLOWED[house] - {house})}"


def test_no_modules_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {module: imported(path) & (modules.keys() - {module}) for module, path in modules.items()}
    assert sum(map(len, graph.values())) > len(modules), "imports are not found"
    graphlib.TopologicalSorter(graph).prepare()  # a CycleError names the circle


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_platform_names_devices_and_backends(path):
    if path.relative_to(PACKAGE).parts[0] == "platform":
        return
    words = {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ("cuda", "nccl", "gloo")
    }
    named_in_flags = {"nccl", "gloo"} if path.name == "parallel.py" and path.parent.name == "config" else set()
    assert words <= named_in_flags


@pytest.mark.parametrize("room", ["platform", "data", "model", "parallel", "checkpoint", "training"])
def test_ranks_print_through_the_logger(room):
    """A print on each of a thousand ranks is a thousand lines, and fails on a full disk."""
    for path in (PACKAGE / room).rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert "print" not in [call.id for call in calls if isinstance(call, ast.Name)], f"{path}: use logging"


def test_what_travels_with_the_weights_imports_nothing_of_ours():
    for name in ("modeling_mesh.py", "configuration_mesh.py"):
        ours = {module for module in imported(PACKAGE / "hf" / name) if module.startswith((".", "mesh_megatron"))}
        assert all(module.startswith(".configuration_mesh") for module in ours), ours


SOURCES = ("mesh_megatron", "tests", "benchmarks", "examples", "tools")
PYTHON = sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first = (node.value.value.split() or [""])[0]
            assert first not in ("Of", "What", "Whether", "How", "And"), f"line {node.lineno}: {first} ..."


def test_packages_hold_no_code_and_no_module_is_a_drawer():
    """A package may list what it provides: imports of its own modules and ``__all__``."""
    for path in FILES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            own = ".".join(("mesh_megatron", *path.parent.relative_to(PACKAGE).parts))
            for statement in ast.parse(path.read_text(encoding="utf-8")).body[1:]:
                if isinstance(statement, ast.ImportFrom):
                    assert (statement.module or "").startswith(own + "."), path
                else:
                    assert isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__", path
        assert path.stem not in ("utils", "helpers", "misc", "common"), path


COMMANDS = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/**/*.py")])
MOST_PARAMETERS = 7


@pytest.mark.parametrize("path", [*FILES, *COMMANDS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_has_many_parameters(path):
    """More are grouped into a dataclass. Triton kernels are excepted: they take tensors and strides one by one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [part.arg for part in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            kernel = "triton.jit" in map(ast.unparse, node.decorator_list)
            transformers_own = path.name == "modeling_mesh.py" and names[1:2] == ["input_ids"]
            assert len(names) <= MOST_PARAMETERS or kernel or transformers_own, (
                f"{path.name}:{node.lineno} {node.name}{names}"
            )
