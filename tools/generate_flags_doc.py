"""Write docs/flags.md from the fields of `LongActConfig`, or check that it is up to date."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from megatron_longact import LongActConfig
from megatron_longact.arguments import field_docs
from megatron_longact.config import flag

FLAGS_DOC = Path(__file__).resolve().parent.parent / "docs" / "flags.md"

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if the file is out of date")
    if parser.parse_args().check:
        raise SystemExit(FLAGS_DOC.read_text() != flags_doc())
    FLAGS_DOC.write_text(flags_doc())
