"""Command lines of Megatron-LM: its flags in our words, and refusals of those that do not exist here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mesh_megatron.config.megatron_table import ACCEPTED, ANY, FASTER_THERE, REFUSED, REFUSED_VALUES, RENAMED

_DELAYED_SCALING = ("--fp8-margin", "--fp8-amax-history-len", "--fp8-amax-compute-algo")


def translate(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without flags of Megatron-LM that are no settings here.

    Raises ``ValueError`` with a line for each flag that is refused.
    """
    kept: list[str] = []
    refusals: list[str] = []
    for flag, values in flags_with_values(words):
        name = _name(flag)
        if name in _FILES:
            kept += _FILES[name](name, values)
        elif name in RENAMED:
            kept += [*RENAMED[name], *values]
        elif name in ACCEPTED and _accepts(name, values):
            continue
        elif (why := refusal(name, values) or _refused_value(name, values)) is not None:
            refusals.append(why)
        else:
            kept += [flag, *values]
    if refusals:
        raise ValueError("\n".join(refusals))
    return kept


def ignored_for_speed(words: Sequence[str]) -> list[str]:
    """Return the flags among ``words`` that make Megatron-LM faster or leaner and have no effect here."""
    flags = dict.fromkeys(flag for flag, _ in flags_with_values(words))
    return [flag for flag in flags if ACCEPTED.get(_name(flag), ("", ""))[1].startswith(FASTER_THERE)]


def refusal(flag: str, values: Sequence[str] = ()) -> str | None:
    """Return why ``flag`` with ``values`` is refused and what to use instead; None if it is not in the tables."""
    row = refused_row(flag)
    text = " ".join([flag, *values])
    if flag in ACCEPTED:
        only = " or ".join(ACCEPTED[flag][0].split()) or "no value"
        return f"{text}: {row[1] if row else ACCEPTED[flag][1]}; it takes {only}"
    return f"{text}: {row[1]}; use {row[2]}" if row else None


def _refused_value(flag: str, values: Sequence[str]) -> str | None:
    """Return why a value of a setting is refused and what to use instead; None if all of them may be right."""
    refused = REFUSED_VALUES.get(flag, {})
    named = [value for value in values if value in refused]
    return f"{flag} {named[0]}: {refused[named[0]][0]}; use {refused[named[0]][1]}" if named else None


def refused_row(flag: str) -> tuple[str, str, str] | None:
    """Return the row of ``REFUSED`` that ``flag`` is in, or None."""
    return next((row for row in REFUSED if any(fnmatchcase(flag, pattern) for pattern in row[0].split())), None)


def with_defaults(words: Sequence[str], content: Mapping[str, Any], preset: Mapping[str, Any]) -> list[str]:
    """Return ``words`` with the settings that follow from others in Megatron-LM, unless something else gives them.

    ``--num-layers`` alone is a plain model, GPT-2's two files name their tokenizer, flags of delayed scaling mean its
    recipe, and sequence parallelism of one rank is none. ``content`` is the YAML of --config with underscores in its
    keys, ``preset`` the model of --preset.
    """
    model = {**preset, **content.get("model", {})}
    names = {_name(flag): values for flag, values in flags_with_values(words)}
    extra: list[str] = []
    in_file = [] if model.get("num_layers") is None else [str(model["num_layers"])]
    layers = names.get("--num-layers", in_file)
    if len(layers) == 1 and layers != ["None"] and "--layout" not in names and "layout" not in model:
        extra += ["--layout", *layers]
        if "--recurrence" not in names and "recurrence" not in model:
            extra += ["--recurrence", "vanilla"]
    typed = "--tokenizer-type" in names or "tokenizer_type" in content.get("data", {})
    if not typed and "--vocab-file" in names and "--merge-file" in names:
        extra += ["--tokenizer-type", "GPT2BPETokenizer"]
    recipe = "--fp8-recipe" in names or "fp8_recipe" in content.get("fp8", {})
    if not recipe and "--fp8-format" in names and any(flag in names for flag in _DELAYED_SCALING):
        extra += ["--fp8-recipe", "delayed"]
    in_file = [str(content.get("parallel", {}).get("tensor_model_parallel_size", 1))]
    if names.get("--tensor-model-parallel-size", in_file) == ["1"]:
        words = [word for word in words if word.replace("_", "-") != "--sequence-parallel"]
    return [*words, *extra]


def flags_with_values(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Cut a command line into flags with the words that follow them; ``--flag=value`` counts as two words."""
    groups: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append((word, []))
    return groups


def _name(flag: str) -> str:
    """Return the name under which the tables have ``flag``, which may have underscores, or --disable- for --no-."""
    name = flag.replace("_", "-") if flag.startswith("--") else flag
    positive = name.removeprefix("--disable-")
    return f"--no-{positive}" if positive != name and f"--no-{positive}" in ACCEPTED else name


def _blend_in_file(flag: str, values: Sequence[str]) -> list[str]:
    """Return --data-path with the words in a text file."""
    return ["--data-path", *_text_of(flag, values).split()]


def _blends_in_file(flag: str, values: Sequence[str]) -> list[str]:
    """Return --train-, --valid- and --test-data-path with the lists of a JSON file."""
    text = _text_of(flag, values)
    try:
        blends = json.loads(text)
        lists = {name: [str(item) for item in blends[name] or ()] for name in ("train", "valid", "test")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{flag} {values[0]}: must be JSON with the lists train, valid and test, as tools of Megatron-LM write it: "
            f"{error}"
        ) from error
    return [word for name, items in lists.items() if items for word in (f"--{name}-data-path", *items)]


def _text_of(flag: str, values: Sequence[str]) -> str:
    if len(values) != 1:
        raise ValueError(f"{' '.join([flag, *values])}: name one file")
    try:
        return Path(values[0]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {values[0]} cannot be read: {error}") from error


_FILES: dict[str, Callable[[str, Sequence[str]], list[str]]] = {
    "--data-args-path": _blend_in_file,
    "--per-split-data-args-path": _blends_in_file,
}
"""Flags that name a file with the values of other flags."""


def _accepts(flag: str, values: Sequence[str]) -> bool:
    permitted = ACCEPTED[flag][0]
    if permitted == ANY:
        return bool(values)
    if not permitted:
        return not values
    return bool(values) and all(any(_same(value, other) for other in permitted.split()) for value in values)


def _same(value: str, other: str) -> bool:
    """Return whether both are the same word or number."""
    try:
        return float(value) == float(other)
    except ValueError:
        return value == other
