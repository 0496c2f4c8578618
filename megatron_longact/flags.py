"""Fields of a dataclass as command-line flags, and back: a new flag is one field with a docstring, which is its help.

    seq_length: int                              --seq-length, needed
    chunk_size: int = 1024                       --chunk-size
    offload: bool = False                        --offload, a switch; one that is on by default needs a name: --no-x
    share: bool | None = None                    --share and --no-share; the program decides where neither is given
    kind: Literal["k1", "k3"] = "k3"             --kind, one of the two
    lengths: tuple[int, ...] = ()                --lengths, one or more
    data: DataConfig                             no flag: the dataclass in it has its own

What a type cannot say, `Annotated[type, Flag(...)]` does, or `MegatronFlag`, for a flag that Megatron's parser has
already. A default is written once, in the dataclass.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Flag:
    """What the type of a field does not say about its flag."""

    name: str = ""
    """As it is typed; "": `--` and the field's name."""
    also: tuple[str, ...] = ()
    """Other spellings."""
    choices: Collection[str] | None = None
    metavar: str | None = None
    nargs: str | None = None
    parse: Callable[[Any], Any] | None = None
    """Makes the field's value of a given one, when the dataclass is made; may raise `ValueError`."""
    needed: bool = True
    """Of a field without a default; False: the program has one, and sets it before the dataclass is made."""

    @property
    def dest(self) -> str:
        """Its name in the namespace."""
        return self.name.removeprefix("--").replace("-", "_")


class MegatronFlag(Flag):
    """One that Megatron adds to the parser; None there is the field's default."""


@dataclass(frozen=True)
class FlagField:
    """A field with a flag. default: `MISSING` if there is none, None also for one that a function makes."""

    field: str
    flag: Flag
    kind: Any
    """Converts one word."""
    choices: Collection[str] | None
    nargs: str | None
    default: Any
    doc: str

    @property
    def needed(self) -> bool:
        """Whether the flag has to be given."""
        return self.default is MISSING and self.flag.needed

    @property
    def goes_both_ways(self) -> bool:
        """A switch that the program sets where neither its flag nor `--no-` it is given."""
        return self.kind is bool and self.default is None

    @property
    def switches_off(self) -> bool:
        """A switch that is on without its flag."""
        return self.default is True

    @property
    def shown_default(self) -> str:
        """As it would be typed; "" where there is nothing to type."""
        if self.default in (MISSING, None) or isinstance(self.default, bool):
            return ""
        values = self.default if isinstance(self.default, tuple) else (self.default,)
        return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)

    @property
    def help(self) -> str:
        """The docstring, and the default if it does not speak of one."""
        default = self.shown_default
        return self.doc if not default or "Default:" in self.doc else f"{self.doc} Default: {default}."


def field_docs(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, and of those that it extends, by field name."""
    docs: dict[str, str] = {}
    for each in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                docs[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(doc.value)).split())
    return docs


def flag_fields(config: type, *, prefix: str = "--") -> Iterator[FlagField]:
    """The fields that flags set, Megatron's included; prefix: of the flags that have no name of their own."""
    docs = field_docs(config)
    for field, hint, flag in _fields(config):
        if _has_flags_of_its_own(hint, flag):
            continue
        flag = flag if flag.name else replace(flag, name=prefix + field.name.replace("_", "-"))
        kind, choices, nargs = _of_type(hint)
        yield FlagField(
            field=field.name,
            flag=flag,
            kind=kind,
            choices=flag.choices or choices,
            nargs=flag.nargs or nargs,
            default=field.default if field.default_factory is MISSING else None,
            doc=docs.get(field.name, ""),
        )


def _fields(config: type) -> Iterator[tuple[Field[Any], Any, Flag]]:
    """Each field with its bare type and what is said about its flag; those of a dataclass that it extends come last."""
    hints, own = get_type_hints(config, include_extras=True), inspect.get_annotations(config)
    for field in sorted(fields(config), key=lambda field: field.name not in own):
        hint = hints[field.name]
        bare, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        yield field, bare, next((extra for extra in extras if isinstance(extra, Flag)), Flag())


def _has_flags_of_its_own(hint: Any, flag: Flag) -> bool:
    return is_dataclass(hint) and flag.parse is None


def _of_type(hint: Any) -> tuple[Any, Collection[str] | None, str | None]:
    """Converter, choices and nargs."""
    hint = _without_none(hint)
    several = get_origin(hint) is tuple
    hint = _without_none(get_args(hint)[0]) if several else hint
    choices = get_args(hint) if get_origin(hint) is Literal else None
    return hint if hint in (bool, int, float, Path) else str, choices, "+" if several else None


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (UnionType, Union):
        return hint
    [bare] = [each for each in get_args(hint) if each is not NoneType]
    return bare


def each_once(given: Iterable[Any]) -> tuple[Any, ...]:
    """For `Flag.parse`: values in the order in which they were given."""
    return tuple(dict.fromkeys(given))


def ascending(given: Iterable[Any]) -> tuple[Any, ...]:
    """For `Flag.parse`: values in their own order, each once."""
    return tuple(sorted(set(given)))


def add_groups(parser: ArgumentParser, groups: dict[str, type]) -> ArgumentParser:
    """Add the flags of dataclasses, each in a group of its own, by title; returns the parser."""
    for title, config in groups.items():
        add_flags(parser.add_argument_group(title=title), config)
    return parser


def add_flags(parser: ArgumentParser | Any, config: type, *, prefix: str = "--", judged_later: bool = False) -> None:
    """Add a dataclass's flags, but for Megatron's, to a parser or a group of one.

    judged_later: a value that the parser cannot take is left to the dataclass, which says so in one line, and the
    namespace has None for what was not given.
    """
    for each in flag_fields(config, prefix=prefix):
        if isinstance(each.flag, MegatronFlag):
            continue
        names = (each.flag.name, *each.flag.also)
        about: dict[str, Any] = {"dest": each.flag.dest, "help": each.help.replace("%", "%%")}
        if each.goes_both_ways:
            parser.add_argument(*names, action=BooleanOptionalAction, default=None, **about)
            continue
        if each.kind is bool:
            parser.add_argument(*names, action="store_true", default=None if judged_later else False, **about)
            continue
        about |= {"nargs": each.nargs, "metavar": each.flag.metavar, "type": each.kind}
        if judged_later:
            metavar = each.kind.__name__.upper() if each.choices is None else "{" + ",".join(each.choices) + "}"
            about |= {"metavar": metavar, "type": partial(_if_it_can_be, each.kind)}
        else:
            default = None if each.default is MISSING else each.default
            about |= {"choices": each.choices, "default": default, "required": each.needed}
        parser.add_argument(*names, **about)


def _if_it_can_be(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


def given_values(config: type, args: Namespace, *, prefix: str = "--") -> dict[str, Any]:
    """What the namespace has for the fields of a dataclass, by field name; nothing for what is None there."""
    values = {}
    for each in flag_fields(config, prefix=prefix):
        value = getattr(args, each.flag.dest, None)
        if value is None:
            continue
        if isinstance(value, list):
            value = tuple(value)
        if each.switches_off and not isinstance(each.flag, MegatronFlag):
            value = not value
        values[each.field] = value if each.flag.parse is None else each.flag.parse(value)
    return values


def config_from_flags(config: type, args: Namespace, **settled: Any) -> Any:
    """The dataclass that the flags ask for, with the dataclasses in it; settled: fields that flags alone do not say."""
    inner = {
        field.name: config_from_flags(hint, args)
        for field, hint, flag in _fields(config)
        if _has_flags_of_its_own(hint, flag) and field.name not in settled
    }
    return config(**inner | given_values(config, args) | settled)
