"""Write the tables of docs/megatron.md: python tests/unit/config/update_megatron_page.py --write.

They have every name of ``megatron_flags.txt``, the flags of Megatron-LM's ``arguments.py``. Without --write the exit
code says whether the page is up to date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mesh_megatron.config.megatron_flags import refused_row
from mesh_megatron.config.megatron_table import ACCEPTED, ANY, REFUSED, REFUSED_VALUES, RENAMED

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs/megatron.md"
MARK = "<!-- tables: written by tests/unit/config/update_megatron_page.py -->\n"
THEIRS = (HERE / "megatron_flags.txt").read_text().split()
OURS = set((HERE / "flags.txt").read_text().split())
FILES = {
    "--data-args-path": "`--data-path`",
    "--per-split-data-args-path": "`--train-data-path`, `--valid-data-path`, `--test-data-path`",
}


def is_setting(flag: str) -> bool:
    """Return whether a flag, or what its --no- switches off, is a setting here."""
    return flag in OURS or flag.replace("--no-", "--", 1) in OURS


def canonical(flag: str) -> str:
    """The name under which the tables have a flag of theirs."""
    flag = flag.replace("_", "-")
    switched_off = flag.replace("--disable-", "--no-", 1)
    return switched_off if switched_off in ACCEPTED else flag


def kind(flag: str) -> str:
    """The one of the four tables that a flag belongs to, or "unknown"."""
    name = canonical(flag)
    if is_setting(name):
        return "same"
    if name in RENAMED or name in FILES:
        return "renamed"
    if name in ACCEPTED:
        return "accepted"
    return "refused" if refused_row(name) is not None else "unknown"


def tables() -> str:
    """The Markdown text after MARK."""
    same = [flag for flag in THEIRS if kind(flag) == "same"]
    lines = ["", "### The same here", "", ", ".join(f"`{flag}`" for flag in same) + ".", ""]
    lines += ["### Under another name", "", "| there | here |", "|---|---|"]
    lines += [f"| `{flag}` | `{' '.join(words)}` |" for flag, words in RENAMED.items()]
    lines += [f"| `{flag} FILE` | {words}, as the file lists them |" for flag, words in FILES.items()]
    lines += ["", "### Accepted, and without effect", "", "| flag | why |", "|---|---|"]
    for flag, (values, why) in ACCEPTED.items():
        shown = ["VALUE"] if values == ANY else values.split()
        lines.append(f"| {' or '.join(f'`{flag} {value}`' for value in shown) or f'`{flag}`'} | {why} |")
    lines += ["", "### Refused by name", "", "| flags | why | use |", "|---|---|---|"]
    rows = {flag: refused_row(canonical(flag)) for flag in THEIRS if kind(flag) == "refused"}
    for row in REFUSED:
        flags = [flag for flag, found in rows.items() if found is row]
        partly = [flag for flag in row[0].split() if flag in ACCEPTED]
        flags = flags or row[0].split()  # flags of the examples only
        names = [f"`{flag}`" for flag in flags if flag not in ACCEPTED] + [
            f"`{flag}` with other values" for flag in partly
        ]
        lines.append(f"| {', '.join(names)} | {row[1]} | {row[2]} |")
    lines += ["", "### Settings with other values", "", "| value | why | use |", "|---|---|---|"]
    for flag, values in REFUSED_VALUES.items():
        lines += [f"| `{flag} {value}` | {why} | {instead} |" for value, (why, instead) in values.items()]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page as it should be."""
    return PAGE.read_text().partition(MARK)[0] + MARK + tables()


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"{PAGE.name} is out of date: add --write")
