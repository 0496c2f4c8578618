"""Fields of a dataclass as flags, and back."""

import re
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from megatron_longact.flags import Flag, MegatronFlag, add_flags, config_from_flags, flag_fields


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What several programs take."""

    ids: tuple[int, ...] = ()
    """Token ids."""


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Part of a program."""

    weight: Annotated[float, MegatronFlag("--megatrons-weight")] = 2.0
    """Megatron's."""


@dataclass(frozen=True, kw_only=True)
class Program(Shared):
    """A field of each kind."""

    output: Path
    """Where to, 100% needed."""
    settled: Annotated[int, Flag(needed=False)]
    """Set by the program."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    scale: Annotated[bool, Flag("--no-scale")] = True
    """On without its flag."""
    loud: bool = False
    """Off without its flag."""
    rate: float | None = None
    """Default: none."""
    scopes: tuple[Literal["layer", "head"], ...] = ("layer",)
    """Some of these."""
    lengths: Annotated[tuple[int, ...], Flag(nargs="*", parse=lambda given: tuple(sorted(given)))] = (4096,)
    """In order."""
    inner: Inner = field(default_factory=Inner)


def made(*flags: str, **others: object) -> Program:
    parser = ArgumentParser(allow_abbrev=False)
    add_flags(parser, Program)
    args = parser.parse_args(["--output", "runs/x", *flags], Namespace(**{"settled": 1, **others}))
    program: Program = config_from_flags(Program, args)
    return program


def test_what_is_not_given_is_the_dataclass_s() -> None:
    assert made() == Program(output=Path("runs/x"), settled=1)
    assert made(megatrons_weight=None) == made()


def test_each_type_has_its_flag() -> None:
    given = "--kind b --no-scale --loud --rate 3 --scopes head layer --lengths 16 8 --ids 2 3 --settled 7"
    assert made(*given.split(), megatrons_weight=0.5) == Program(
        ids=(2, 3),
        output=Path("runs/x"),
        settled=7,
        kind="b",
        scale=False,
        loud=True,
        rate=3.0,
        scopes=("head", "layer"),
        lengths=(8, 16),
        inner=Inner(weight=0.5),
    )


@pytest.mark.parametrize("flags", ["--kind c", "--scopes model", "--rate much", "--megatrons-weight 1", "--inner x"])
def test_what_is_no_value_or_no_flag_ends_the_parser(flags: str) -> None:
    with pytest.raises(SystemExit):
        made(*flags.split())


def test_the_help_is_the_docstring_with_the_default_said_once() -> None:
    parser = ArgumentParser()
    add_flags(parser, Program)
    text = re.sub(r"\s+", " ", parser.format_help())
    for said in (
        "100% needed. ",
        "Which. Default: a.",
        "Default: none. ",
        "In order. Default: 4096.",
        "Some of these.",
    ):
        assert said in text
    assert text.count("Default: none") == 1
    assert [each.flag.name for each in flag_fields(Inner)] == ["--megatrons-weight"]
