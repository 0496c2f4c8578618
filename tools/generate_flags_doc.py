"""Write docs/flags.md and docs/program-flags.md from the code that has the flags, or check that they are up to date."""

import argparse
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from megatron_longact import LongActConfig
from megatron_longact.arguments import field_docs
from megatron_longact.config import flag
from megatron_longact.evaluation.arguments import add_evaluation_args
from megatron_longact.megatron import telemetry
from megatron_longact.rl import arguments as rl_arguments

DOCS = Path(__file__).resolve().parent.parent / "docs"

HEAD = """# Flags

Generated from `LongActConfig` by `tools/generate_flags_doc.py`; change the docstrings there, then run it again.

`--longact` switches LongAct on; the others need it. In code the same names, with underscores and without the prefix,
are the fields of `LongActConfig`.

| flag | default | values | meaning |
|---|---|---|---|
"""


def flags_doc() -> str:
    """The text of docs/flags.md."""
    hints, docs = get_type_hints(LongActConfig), field_docs()
    rows = []
    for field in fields(LongActConfig):
        hint = hints[field.name]
        values = ", ".join(get_args(hint)) if get_origin(hint) is Literal else hint.__name__
        rows.append(f"| `{flag(field.name)}` | {field.default} | {values} | {docs[field.name]} |\n")
    return HEAD + "".join(rows)


PROGRAM_HEAD = """# Flags of the RL program and of the evaluation

Generated from the parsers by `tools/generate_flags_doc.py`; change the help texts there, then run it again. Those of
LongAct itself, which the RL program takes as well, are in [flags.md](flags.md). Megatron's own go with all of them.
"""


def program_flags_doc() -> str:
    """The text of docs/program-flags.md."""
    intro = inspect.getdoc(rl_arguments) or ""
    parts = [
        PROGRAM_HEAD,
        "## The RL program, `examples/train_grpo.py`\n\n" + intro.split("\n\n", 1)[1] + "\n",
        *_tables(rl_arguments.add_rl_args),
        "## GPU telemetry, in every program that is launched\n",
        *_tables(telemetry.add_telemetry_args),
        "## The evaluation, `tools/evaluate.py`\n\n"
        "Beside `--load` or `--predictions`, one of which it needs, and `--cpu`.\n",
        *_tables(add_evaluation_args),
    ]
    return "\n".join(parts)


def _tables(add_args: Callable[[argparse.ArgumentParser], object]) -> Iterator[str]:
    """A table for each group of the flags that a function adds to a parser."""
    parser = argparse.ArgumentParser(add_help=False)
    add_args(parser)
    for group in parser._action_groups:
        rows = [_row(action) for action in group._group_actions]
        if rows:
            head = f"### {group.title}\n\n| flag | default | values | meaning |\n|---|---|---|---|\n"
            yield head + "".join(rows)


def _row(action: argparse.Action) -> str:
    values = ", ".join(map(str, action.choices or ())) or getattr(action.type, "__name__", "str")
    default = "" if action.default in (None, []) else str(action.default)
    if action.nargs == 0:
        values, default = "", "off"
    values += " ..." if action.nargs in ("+", "*") else ""
    default = "needed" if action.required else default
    help_text = " ".join((action.help or "").replace("%%", "%").split()).replace("|", "\\|")
    cells = (f"`{action.option_strings[-1]}`", default.replace("|", "\\|"), values, help_text)
    return f"| {' | '.join(cells)} |\n"


PAGES = {DOCS / "flags.md": flags_doc, DOCS / "program-flags.md": program_flags_doc}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a file is out of date")
    if parser.parse_args().check:
        raise SystemExit(any(page.read_text() != text() for page, text in PAGES.items()))
    for page, text in PAGES.items():
        page.write_text(text())
