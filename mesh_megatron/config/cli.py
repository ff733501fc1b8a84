"""Command-line and YAML parsing into frozen dataclasses; a field's docstring is its ``--help`` text.

In increasing precedence, values come from the dataclass, ``--preset``, ``--router-preset``, ``--config FILE.yaml`` and
flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from mesh_megatron.config.bounds import check_bounds, flag
from mesh_megatron.config.megatron_flags import flags_with_values, translate, with_defaults
from mesh_megatron.config.presets import ROUTER_PRESETS
from mesh_megatron.config.words import check_words, nearest

Config = TypeVar("Config")

_MARKERS = (tyro.conf.OmitArgPrefixes,)
REFUSALS: tuple[type[Exception], ...] = (ValueError, OSError)


def program() -> str:
    """Return the name under which the user started this command, such as plan.py or mesh-plan."""
    return Path(sys.argv[0]).name


def print_error(error: object, prog: str | None = None) -> None:
    """Print ``error`` on standard error behind the command's name, as argparse does."""
    with contextlib.suppress(OSError):  # a full disk must not change the exit code
        print(f"{prog or program()}: error: {error}", file=sys.stderr)


def parse(cls: type[Config], args: Sequence[str] | None = None, **kwargs: Any) -> Config:
    """Parse ``args`` (default ``sys.argv[1:]``) into the dataclass ``cls``; groups are nested dataclasses.

    ``kwargs`` (``prog``, ``description``) go to tyro. A bad flag ends the program with exit code 2 and an error that
    names the nearest valid flag or the value's bounds; ``--help`` prints the help and ends it with exit code 0.
    """
    settings = _parse(cls, args, **kwargs)
    try:
        check_bounds(settings)
    except ValueError as error:
        print_error(error, kwargs.get("prog"))
        sys.exit(2)
    return settings


def run(
    work: Callable[[], int | None],
    refusals: tuple[type[Exception], ...] = REFUSALS,
    interrupted: str = "interrupted",
) -> int:
    """Return the exit code of ``work`` (0 for None); report one of ``refusals`` as an error and return 2.

    Ctrl-C is reported as ``interrupted`` (130). When the reader of the output ends, as ``head`` does, the command ends
    silently, with the code that a shell gives for that (141).
    """
    try:
        code = work() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left must not fail again at exit
        return 141
    except refusals as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print_error(interrupted)
        return 130


def _parse(cls: type[Config], args: Sequence[str] | None, **kwargs: Any) -> Config:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        check_words(cls, sys.argv[1:] if args is None else args)
        settings = tyro.cli(cls, args=args, config=_MARKERS, **{"prog": program(), **kwargs})
        _check_paths(settings)
    except ValueError as error:
        print_error(error, kwargs.get("prog"))
        sys.exit(2)
    return settings


def _check_paths(settings: Any) -> None:
    """Raise ``ValueError`` for a path that begins with ~, which would become a folder of that name."""
    for name, value in ((field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings)):
        if dataclasses.is_dataclass(value):
            _check_paths(value)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and str(path).startswith("~"):
                raise ValueError(f"{flag(name)} {path}: only a shell knows what ~ stands for; write the complete path")


def parse_run(
    cls: type[Config], presets: Mapping[str, Mapping[str, Any]], args: Sequence[str] | None = None, **kwargs: Any
) -> Config:
    """Parse as ``parse`` does, with defaults from ``--preset`` (group ``model``), ``--router-preset`` and ``--config``.

    Flags of Megatron-LM are accepted or refused as ``megatron_table.py`` says.

    Bounds are not checked here: the run's ``validate`` checks them, since it also needs the number of ranks.
    """
    args = list(sys.argv[1:] if args is None else args)
    file = _value_of("--config", args)
    default = cls()
    try:
        args = translate(args)
        content = _settings_in(Path(file)) if file else {}
        given = {"--preset": presets, "--router-preset": ROUTER_PRESETS}
        chosen = {name: _chosen(name, args, content, known) for name, known in given.items()}
        preset, routers = chosen.values()
        if preset is not None:
            default = from_dict(cls, {"model": dict(presets[preset])}, "--preset", default)
        if routers is not None:
            default = from_dict(cls, ROUTER_PRESETS[routers], "--router-preset", default)
        default = from_dict(cls, content, str(file), default)
        args = with_defaults(args, content, presets.get(preset or "", {}))
    except (ValueError, OSError) as error:
        print_error(error, kwargs.get("prog"))
        sys.exit(2)
    return _parse(cls, args, default=default, **kwargs)


def _value_of(name: str, words: Sequence[str]) -> str | None:
    """Return the last value of flag ``name``, which may be written with underscores, or None without one."""
    given = [values for flag, values in flags_with_values(words) if flag.replace("_", "-") == name and values]
    return given[-1][0] if given else None


def _chosen(name: str, words: Sequence[str], content: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    """Return the preset that the flag ``name`` or a file's ``content`` names; raise ``ValueError`` if it is unknown."""
    value = _value_of(name, words)
    if value is None:
        value = content.get(name.removeprefix("--").replace("-", "_"))
    if value is not None and (not isinstance(value, str) or value not in known):
        raise ValueError(f"{name} {value}: no such preset{nearest(str(value), known)}")
    return value


def _settings_in(path: Path) -> dict[str, Any]:
    """Return the groups of settings in a file of --config; names of settings have underscores."""
    content = _with_underscores(read_yaml(path), f"--config {path}")
    if "config" in content:
        raise ValueError(f"--config {path}: config: one file cannot name another; put all settings into one")
    return content


def _with_underscores(values: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """Return nested ``values`` with underscores in their keys; raise ``ValueError`` for a key that has both forms."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in found:
            raise ValueError(f"{source}: {key} is there twice, with dashes and with underscores; drop one")
        found[name] = _with_underscores(value, f"{source}: {key}") if isinstance(value, Mapping) else value
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raise ``ValueError`` naming --config if it cannot be read or is none.

    A key that is there twice is an error too: YAML itself would take the last one.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_repeated_keys(yaml.compose(text, yaml.SafeLoader), str(path))
        content = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is not text in UTF-8") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}{_yaml_problem(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected groups of settings, found {type(content).__name__}")
    return content


def _refuse_repeated_keys(node: yaml.Node | None, path: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen and isinstance(key, yaml.ScalarNode):
            raise ValueError(f"--config {path}, line {key.start_mark.line + 1}: {key.value} is there twice; drop one")
        seen.add(str(key.value))
        _refuse_repeated_keys(value, path)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Return line and problem of an error as one line, as the end of a message about the file."""
    mark = getattr(error, "problem_mark", None)
    where = f", line {mark.line + 1}" if mark is not None else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
    return f"{where} is not YAML: {problem}"


def from_dict(cls: type[Config], values: Mapping[str, Any], source: str, base: Config | None = None) -> Config:
    """Return ``base`` (default ``cls()``) updated with nested ``values``.

    Raise ``ValueError`` for an unknown key, naming the nearest valid one, for a value of the wrong type, and for an
    empty list where the default has values; ``source`` says where the values come from.
    """
    base = cls() if base is None else base
    hints = typing.get_type_hints(cls)
    defaults = {field.name: field.default for field in dataclasses.fields(typing.cast(Any, cls))}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ValueError(f"{source}: unknown key {key!r}{nearest(name, hints)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{source}: {key} is a group of settings, not {value!r}")
            changes[name] = from_dict(typing.cast(Any, hints[name]), value, f"{source}: {key}", getattr(base, name))
        else:
            changes[name] = _coerce(value, hints[name], f"{source}: {key}")
            if changes[name] == () != defaults[name]:
                raise ValueError(f"{source}: {key}: is empty; name at least one, or drop it")
    return dataclasses.replace(typing.cast(Any, base), **changes)


def to_dict(config: Any) -> dict[str, Any]:
    """Return nested plain values for YAML and JSON; ``from_dict`` reads them back."""
    return {
        key: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for key, value in ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    }


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Convert ``value`` to the field's type, or raise ``ValueError`` naming the type that was expected."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _coerce(value, next(option for option in options if option is not type(None)), where)
    if origin is typing.Literal:
        if value not in options:
            raise ValueError(f"{where}: {value!r} is not one of {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]  # a path may contain spaces: never split it
        return tuple(_coerce(item, options[0], where) for item in items)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-4 as text
        except (ValueError, OverflowError):
            pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if hint is Path and isinstance(value, str):
        if not value:
            raise ValueError(f"{where}: is empty; name a path")
        return Path(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}")
    return value
