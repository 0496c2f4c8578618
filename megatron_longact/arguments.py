"""`LongActConfig` as `--longact-*` flags, and back."""

import argparse
import ast
import inspect
import textwrap
from dataclasses import fields
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_longact.config import LongActConfig, flag


def field_docs(config: type = LongActConfig) -> dict[str, str]:
    """The docstring under each field of `LongActConfig`, or of another dataclass, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            docs[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(doc.value)).split())
    return docs


def add_longact_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--longact` and one flag a field of `LongActConfig`; returns the parser.

    A flag that was not given is None in the namespace: the default stands in the dataclass alone. Values
    are judged by `longact_config_from_args`, in one line, without the parser's long usage text.
    """
    group = parser.add_argument_group(title="longact")
    group.add_argument("--longact", action="store_true", help="Update only the salient rows of Q and K.")
    hints, docs = get_type_hints(LongActConfig), field_docs()
    for field in fields(LongActConfig):
        hint: Any = hints[field.name]
        choice = get_origin(hint) is Literal
        group.add_argument(
            flag(field.name),
            default=None,
            type=str if choice else partial(_converted, hint),
            metavar="{" + ",".join(get_args(hint)) + "}" if choice else hint.__name__.upper(),
            help=f"{docs[field.name]} Default: {field.default}.".replace("%", "%%"),
        )
    return parser


def _converted(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text  # for LongActConfig to name


def longact_config_from_args(args: argparse.Namespace) -> LongActConfig | None:
    """The configuration that the flags ask for; None without `--longact`.

    Raises `ValueError` for a value out of range, and for `--longact-*` without `--longact`.
    """
    names = [field.name for field in fields(LongActConfig)]
    values = {name: getattr(args, f"longact_{name}", None) for name in names}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if getattr(args, "longact", False):
        return LongActConfig(**given)
    if given:
        flags = ", ".join(flag(name) for name in given)
        raise ValueError(f"{flags} given without --longact; add --longact, or leave these flags out")
    return None
