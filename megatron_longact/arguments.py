"""`LongActConfig` as `--longact-*` flags, and back."""

import argparse

from megatron_longact.config import PREFIX, LongActConfig, flag
from megatron_longact.flags import add_flags, given_values


def add_longact_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--longact` and one flag a field of `LongActConfig`; returns the parser.

    A flag that was not given is None in the namespace: the default stands in the dataclass alone. Values
    are judged by `longact_config_from_args`, in one line, without the parser's long usage text.
    """
    group = parser.add_argument_group(title="longact")
    group.add_argument("--longact", action="store_true", help="Update only the salient rows of Q and K.")
    add_flags(group, LongActConfig, prefix=PREFIX, judged_later=True)
    return parser


def longact_config_from_args(args: argparse.Namespace) -> LongActConfig | None:
    """The configuration that the flags ask for; None without `--longact`.

    Raises `ValueError` for a value out of range, and for `--longact-*` without `--longact`.
    """
    given = given_values(LongActConfig, args, prefix=PREFIX)
    if getattr(args, "longact", False):
        return LongActConfig(**given)
    if given:
        flags = ", ".join(flag(name) for name in given)
        raise ValueError(f"{flags} given without --longact; add --longact, or leave these flags out")
    return None
