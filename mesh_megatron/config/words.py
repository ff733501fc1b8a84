"""Check the words of a command line against the settings' types, so that a mistake is told in one line."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from mesh_megatron.config.bounds import flag
from mesh_megatron.config.megatron_flags import flags_with_values

_POSITIONAL = typing.get_args(Positional[int])[1]


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the end of a message about ``name``: the most similar of ``valid``, or all if none is similar."""
    valid = list(valid)
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f"; did you mean {match[0]!r}?" if match else f"; one of {', '.join(valid)}"


def check_words(cls: Any, words: Sequence[str]) -> None:
    """Raise ``ValueError`` for an unknown flag, a missing one, or a value that is missing or of another type.

    ``cls`` is a dataclass, with groups as nested dataclasses, or a union of one dataclass for each subcommand. What
    words without a flag mean is left to the parser.
    """
    if commands := {option.__name__.lower(): option for option in typing.get_args(cls)}:
        if not words or words[0] not in commands:
            return
        cls, words = commands[words[0]], words[1:]
    if "--help" in words or "-h" in words:
        return
    fields = dict(_fields(cls))
    positional = any(_is_positional(hint) for hint in fields.values())
    settings = {name: hint for name, hint in fields.items() if not _is_positional(hint)}
    switches = {f"--no-{name[2:]}" for name, hint in settings.items() if hint is bool} | settings.keys()
    if positional and "" in words:  # Path("") is the current folder, which nobody means by an unset shell variable
        raise ValueError("an argument is empty: name a path")
    given = [(name.replace("_", "-"), values) for name, values in flags_with_values(words) if name.startswith("--")]
    never_empty = set(_lists_that_are_never_empty(cls))
    for name, values in given:
        if name not in switches:
            match = difflib.get_close_matches(name, switches, n=1)
            raise ValueError(f"{name}: no such flag" + (f"; did you mean {match[0]}?" if match else "; see --help"))
        if name in never_empty and not values:
            raise ValueError(f"{name}: needs a value")
        _check_values(name, values, settings.get(name, bool), positional)
    required = [flag(field.name) for field in dataclasses.fields(cls) if _has_no_default(field)]
    names = {name for name, _ in given}
    missing = [name for name in required if name in settings and not {name, *_aliases(settings[name])} & names]
    if missing:
        raise ValueError(f"{', '.join(missing)}: not given; see --help")


def _fields(cls: Any) -> Iterator[tuple[str, Any]]:
    """Yield (flag, type) of every setting, also under other names that it has."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint)
        else:
            yield from ((known, hint) for known in (flag(name), *_aliases(hint)))


def _aliases(hint: Any) -> tuple[str, ...]:
    return tuple(name for extra in _extras(hint) for name in getattr(extra, "aliases", None) or ())


def _is_positional(hint: Any) -> bool:
    return _POSITIONAL in _extras(hint)


def _extras(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ()


def _lists_that_are_never_empty(cls: Any) -> Iterator[str]:
    """Yield the flags of lists that are required or have values by default: a command needs at least one."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if field.default not in ((), None) and tuple in _kinds(hints[field.name]):
            yield from (flag(field.name), *_aliases(hints[field.name]))


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_values(name: str, values: list[str], hint: Any, positional: bool) -> None:
    """Check the words after a flag; if the command has positional values, those that are left may be such."""
    kinds = list(_kinds(hint))
    if tuple in kinds:
        for value in () if positional else values:
            _check_value(name, value, kinds)
        return
    takes = 0 if hint is bool else 1
    if len(values) < takes:
        raise ValueError(f"{name}: needs a value")
    if len(values) > takes and not positional:
        raise ValueError(f"{name} takes {'one' if takes else 'no'} value: drop {' '.join(values[takes:])!r}")
    for value in values[:takes]:
        _check_value(name, value, kinds)


def _kinds(hint: Any) -> Iterator[Any]:
    """Yield the types that a value may have: names of choices as text, and ``tuple`` for a list of the others."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        yield from map(str, parts)
    elif origin is tuple:
        yield tuple
        for part in parts:
            yield from _kinds(part)
    elif origin is typing.Annotated:
        yield from _kinds(parts[0])
    elif origin in (typing.Union, types.UnionType):
        for part in parts:
            yield from _kinds(part)
    elif hint is not ...:
        yield "None" if hint is type(None) else hint


def _check_value(name: str, value: str, kinds: list[Any]) -> None:
    if not value and Path in kinds:
        raise ValueError(f"{name} '': is empty; name a path, or drop the flag")
    choices = [kind for kind in kinds if isinstance(kind, str)]
    numbers = [kind for kind in kinds if kind in (int, float)]
    if value in choices or set(kinds) - {*choices, *numbers, tuple} or any(_reads(kind, value) for kind in numbers):
        return
    if not numbers:
        raise ValueError(f"{name} {value}: no such value{nearest(value, [c for c in choices if c != 'None'])}")
    if float in numbers:
        raise ValueError(f"{name} {value}: must be a number")
    whole = _reads(float, value) and float(value).is_integer()
    raise ValueError(f"{name} {value}: must be a whole number" + (f": write {int(float(value))}" if whole else ""))


def _reads(kind: type, value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True
