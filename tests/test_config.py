"""LongActConfig and its flags."""

import argparse
from dataclasses import fields
from typing import Any

import pytest

from megatron_longact import LongActConfig, add_longact_args, longact_config_from_args
from megatron_longact.flags import field_docs
from tests.launch import ROOT
from tests.ranks import run_program


def parse(*flags: str) -> argparse.Namespace:
    return add_longact_args(argparse.ArgumentParser(allow_abbrev=False)).parse_args(flags)


def test_no_flag_is_no_longact() -> None:
    assert longact_config_from_args(parse()) is None


def test_defaults_stand_in_the_dataclass() -> None:
    assert longact_config_from_args(parse("--longact")) == LongActConfig()


def test_every_field_has_a_flag_and_a_docstring() -> None:
    names = {field.name for field in fields(LongActConfig)}
    assert set(field_docs(LongActConfig)) == names
    assert {name for name in vars(parse()) if name.startswith("longact_")} == {f"longact_{name}" for name in names}


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--longact-ratio", "0.1"], "ratio", 0.1),
        (["--longact-select", "weight-norm"], "select", "weight-norm"),
        (["--longact-statistic", "max-abs"], "statistic", "max-abs"),
        (["--longact-tap", "norm"], "tap", "norm"),
        (["--longact-scope", "model"], "scope", "model"),
        (["--longact-targets", "q"], "targets", "q"),
        (["--longact-refresh-interval", "0"], "refresh_interval", 0),
        (["--longact-ema", "0.9"], "ema", 0.9),
        (["--longact-warmup-steps", "3"], "warmup_steps", 3),
        (["--longact-min-context", "64"], "min_context", 64),
        (["--longact-skip-first-tokens", "4"], "skip_first_tokens", 4),
        (["--longact-freeze", "grad-only"], "freeze", "grad-only"),
        (["--longact-seed", "7"], "seed", 7),
        (["--longact-moments", "hold"], "moments", "hold"),
        (["--longact-on-mismatch", "use-flags"], "on_mismatch", "use-flags"),
    ],
)
def test_flag_sets_its_field(flags: list[str], field: str, value: Any) -> None:
    config = longact_config_from_args(parse("--longact", *flags))
    assert getattr(config, field) == value
    assert getattr(LongActConfig(), field) != value


def test_option_without_longact_is_refused() -> None:
    with pytest.raises(ValueError, match="--longact-ratio given without --longact"):
        longact_config_from_args(parse("--longact-ratio", "0.5"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", 0.0),
        ("ratio", 1.5),
        ("ratio", -0.1),
        ("ratio", float("nan")),
        ("ratio", "0.3"),
        ("select", "best"),
        ("statistic", "mean"),
        ("tap", "rope"),
        ("scope", "rank"),
        ("targets", "v"),
        ("refresh_interval", -1),
        ("refresh_interval", 1.5),
        ("ema", 1.0),
        ("warmup_steps", -1),
        ("min_context", -1),
        ("skip_first_tokens", -1),
        ("freeze", "soft"),
        ("seed", -1),
        ("moments", "keep"),
        ("on_mismatch", "ignore"),
    ],
)
def test_bad_value_is_one_line_with_the_flag_and_the_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="--longact-" + field.replace("_", "-")) as error:
        LongActConfig(**{field: value})
    assert repr(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags", [("--longact-ratio", "a third"), ("--longact-select", "best"), ("--longact-seed", "1.5")]
)
def test_bad_flag_value_reaches_the_one_line_message(flags: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{flags[0]} is '{flags[1]}'; it must be"):
        longact_config_from_args(parse("--longact", *flags))


def test_flags_doc_is_up_to_date() -> None:
    done = run_program(str(ROOT / "tools/generate_flags_doc.py"), "--check", launcher=False, cpu=False)
    assert done.returncode == 0, "a page of flags is not what the dataclasses make of it: make docs"
