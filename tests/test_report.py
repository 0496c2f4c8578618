"""The report of a run: what the table says, and that the pictures show what they were given."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from megatron_longact.reporting.figures import plot_reward, plot_saliency, reward_figure, saliency_figure
from megatron_longact.rl.report import HeldOutAccuracy, RunOutcome, render_table, write_report

HEADS = {"q": 4, "k": 2}
CHANNELS = 32

BEFORE = {"iteration": 0, "accuracy": 0.60, "accuracy_by_length": {"512": 0.3, "64": 0.9}, "prompts": 128}
AFTER = {"iteration": 60, "accuracy": 0.75, "accuracy_by_length": {"512": 0.55, "64": 0.95}, "prompts": 128}

SUMMARY = RunOutcome(
    before=HeldOutAccuracy.from_row(BEFORE),
    after=HeldOutAccuracy.from_row(AFTER),
    iterations=60,
    rows=576,
    moved=200,
    frozen=376,
    frozen_changed=0,
    longact_time_share=0.0123,
)


def channel_values(num_layers: int = 3) -> tuple[dict[int, dict[str, Tensor]], dict[int, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    saliency = {
        n: {part: torch.rand(heads * CHANNELS, generator=generator).exp() for part, heads in HEADS.items()}
        for n in range(1, num_layers + 1)
    }
    masks = {
        n: {part: values > values.quantile(0.7) for part, values in layer.items()} for n, layer in saliency.items()
    }
    return saliency, masks


def panels(figure: Figure) -> dict[str, object]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def lines_of(table: str) -> dict[str, list[str]]:
    """Words of each line behind its first column's worth of text."""
    return {line[:20].strip(): line[20:].split() for line in table.splitlines()}


def test_a_gain_of_nothing_is_no_rise() -> None:
    assert replace(SUMMARY, after=SUMMARY.before).verdict() == "Held-out accuracy did not change in 60 iterations."
    assert "rose by 15.0 points" in SUMMARY.verdict()


def test_a_run_without_held_out_data_has_a_report(tmp_path: Path) -> None:
    summary = replace(SUMMARY, before=None, after=None)
    table = render_table(summary)
    assert "nothing was measured" in table
    assert "held-out accuracy" not in table
    write_report(tmp_path / "report.md", summary, settings={}, pictures={})
    assert "| held-out accuracy" not in (tmp_path / "report.md").read_text()
    plot_reward([{"iteration": 1, "reward_mean": 0.5, "accuracy": 0.5}], [], path=tmp_path / "reward.png")
    assert (tmp_path / "reward.png").stat().st_size > 500


def test_table_has_each_length_in_order_and_all() -> None:
    table = render_table(SUMMARY)
    lines = lines_of(table)
    assert lines["64 tokens"] == ["90.0%", "95.0%", "+5.0"]  # of a run from before it wrote which were right
    assert lines["512 tokens"] == ["30.0%", "55.0%", "+25.0"]
    assert lines["all 128 tasks"] == ["60.0%", "(51-68)", "75.0%", "(67-82)", "+15.0"]
    assert table.index("64 tokens") < table.index("512 tokens") < table.index("all 128")


def test_accuracy_and_gain_have_intervals_by_prompt() -> None:
    """Two prompts of three got right at 64 tokens, and one of them was right before."""
    rows = [
        {"iteration": i, "accuracy": sum(right) / 5, "accuracy_by_length": {"64": sum(right[:3]) / 3, "512": 0.5}}
        | {"prompts": 5, "prompts_by_length": {"64": 3, "512": 2}, "correct": right}
        for i, right in enumerate(([True, False, False, True, False], [True, True, False, False, True]))
    ]
    before, after = map(HeldOutAccuracy.from_row, rows)
    lines = lines_of(table := render_table(replace(SUMMARY, before=before, after=after)))
    assert lines["64 tokens"] == ["33.3%", "(6-79)", "66.7%", "(21-94)", "+33.3", "(-32", "to", "+72)"]
    assert lines["all 5 tasks"] == ["40.0%", "(12-77)", "60.0%", "(23-88)", "+20.0", "(-36", "to", "+63)"]
    assert "Wilson's score interval" in table


def test_a_run_that_went_on_with_other_lengths_claims_no_gain(tmp_path: Path) -> None:
    other = {**AFTER, "accuracy_by_length": {"64": 0.95, "2048": 0.55}}
    table = render_table(replace(SUMMARY, after=HeldOutAccuracy.from_row(other)))
    lines = lines_of(table)
    assert lines["64 tokens"] == ["90.0%", "95.0%", "+5.0"]
    assert lines["512 tokens"] == ["30.0%", "-", "-"]
    assert lines["2048 tokens"] == ["-", "55.0%", "-"]
    assert lines["all 128 tasks"][-1] == "-"
    assert table.endswith("the held-out prompts have not the context lengths that they began with.")
    heldout = panels(reward_figure([], [BEFORE, other]))["held-out accuracy by context length"]
    drawn = {line.get_label(): line.get_ydata() for line in heldout.lines}  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.array(drawn["2048 tokens"], dtype=float), [np.nan, 0.55])


def test_table_has_the_counts() -> None:
    table = render_table(SUMMARY)
    assert "200 of 576 (34.7%)" in table
    assert "0 of 376, against the start weights" in table
    assert "1.2%" in table
    assert "3 of 376" in render_table(replace(SUMMARY, frozen_changed=3))


def test_table_has_pass_at_k_where_it_was_measured() -> None:
    assert "pass@" not in render_table(SUMMARY)
    assert "held-out pass@4" in render_table(replace(SUMMARY, pass_at={"4": (0.25, 0.5)}))
    assert "25.0% (18-33) before, 50.0% (41-59) after" in render_table(replace(SUMMARY, pass_at={"4": (0.25, 0.5)}))


def test_table_without_longact_claims_no_frozen_rows() -> None:
    table = render_table(replace(SUMMARY, longact_time_share=None, moved=576, frozen=0))
    assert "off" in table
    assert "576 of 576" in table
    assert "frozen" not in table


@pytest.mark.parametrize(
    ("after", "said", "enough"),
    [(0.75, "rose by 15.0", True), (0.70, "rose by 10.0", True), (0.64, "rose by 4.0", False), (0.5, "fell by", False)],
)
def test_verdict_is_honest(after: float, said: str, enough: bool) -> None:
    summary = replace(SUMMARY, after=replace(SUMMARY.after, overall=after), expected_gain=10.0)
    assert said in summary.verdict()
    assert ("LESS than the 10 points" in summary.verdict()) is not enough
    assert "LESS" not in replace(summary, expected_gain=None).verdict()
    assert render_table(summary).endswith(summary.verdict())


def test_report_holds_numbers_settings_and_the_pictures_that_exist(tmp_path: Path) -> None:
    (tmp_path / "saliency.png").touch()
    path = tmp_path / "report.md"
    pictures = {"saliency.png": "Saliency", "reward.png": "Reward"}
    write_report(path, SUMMARY, settings={"--longact-ratio": 0.3}, pictures=pictures)
    text = path.read_text(encoding="utf-8")
    assert "| 512 tokens | 30.0% | 55.0% | +25.0 |" in text
    assert "| `0.3` |" in text
    assert SUMMARY.verdict() in text
    assert "(saliency.png)" in text
    assert "reward.png" not in text


def test_saliency_panels_show_values_and_mark_the_chosen_channels() -> None:
    saliency, masks = channel_values()
    shown = panels(saliency_figure(saliency, masks, heads=HEADS))
    assert list(shown) == [f"layer {n} · {part}" for n in (1, 2, 3) for part in "QK"]
    for number in saliency:
        for part, heads in HEADS.items():
            axes = shown[f"layer {number} · {part.upper()}"]
            images = {image.get_label(): image for image in axes.images}
            chosen = masks[number][part].reshape(heads, CHANNELS).numpy()
            values = saliency[number][part].reshape(heads, CHANNELS).numpy()
            for label, where in (("longact-oranges", chosen), ("longact-blues", ~chosen)):
                drawn = images[label].get_array()
                np.testing.assert_array_equal(~np.ma.getmaskarray(drawn), where)
                np.testing.assert_array_equal(drawn.data[where], values[where])


def test_saliency_panels_share_one_scale_and_name_their_axes() -> None:
    saliency, masks = channel_values()
    saliency[2]["k"][5] = 1000.0
    figure = saliency_figure(saliency, masks, heads=HEADS)
    norms = {id(image.norm) for axes in panels(figure).values() for image in axes.images}
    assert len(norms) == 1
    assert max(image.norm.vmax for axes in figure.axes for image in axes.images) == 1000.0
    assert all(axes.get_ylabel() == "head" for axes in panels(figure).values())
    assert [axes.get_xlabel() for axes in panels(figure).values()][-2:] == ["channel", "channel"]


def test_chosen_and_frozen_channels_differ_in_colour_at_both_ends_of_the_scale() -> None:
    saliency, masks = channel_values(1)
    axes = panels(saliency_figure(saliency, masks, heads=HEADS))["layer 1 · Q"]
    colours = {image.get_label(): image.get_cmap() for image in axes.images}
    for end in (0.0, 0.5, 1.0):
        red, _, blue, _ = colours["longact-oranges"](end)
        assert red > blue
        red, _, blue, _ = colours["longact-blues"](end)
        assert blue > red


def test_saliency_of_a_deep_model_holds_all_layers_on_one_page() -> None:
    saliency, masks = channel_values(64)
    figure = saliency_figure(saliency, masks, heads={"q": 4, "k": 2})
    assert figure.get_figheight() <= 14
    drawn = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert {axes.get_title(loc="left") for axes in drawn if "all" not in axes.get_title(loc="left")} == {
        f"layer {n} · {part}" for n in (1, 33, 64) for part in "QK"
    }
    values, share = (axes.images[0].get_array() for axes in drawn if axes.get_title(loc="left") == "all layers · Q")
    of = [torch.stack([each[n]["q"].view(4, CHANNELS).float() for n in range(1, 65)]) for each in (saliency, masks)]
    np.testing.assert_array_equal(values, of[0].amax(1))
    np.testing.assert_array_equal(share, of[1].mean(1))
    wide = {n: {"q": torch.rand(64 * CHANNELS), "k": torch.rand(8 * CHANNELS)} for n in range(8)}
    figure = saliency_figure(wide, wide, heads={"q": 64, "k": 8})
    assert figure.get_figheight() <= 14


def test_a_run_shows_its_layers_from_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`LongAct.saliency` counts them from 1, as Megatron does."""
    shown: list[str] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: shown.extend(panels(self)))
    plot_saliency(*channel_values(), heads=HEADS, path=tmp_path / "saliency.png")
    assert shown == [f"layer {n} · {part}" for n in (0, 1, 2) for part in "QK"]


def test_saliency_with_unusable_values(tmp_path: Path) -> None:
    saliency, masks = channel_values()
    saliency[1]["q"][:3] = torch.tensor([float("nan"), 0.0, float("inf")])
    plot_saliency(saliency, masks, heads=HEADS, path=tmp_path / "saliency.png")
    assert (tmp_path / "saliency.png").read_bytes().startswith(b"\x89PNG")
    nothing = {1: {part: torch.zeros(heads * CHANNELS) for part, heads in HEADS.items()}}
    with pytest.raises(ValueError, match="no saliency to draw"):
        plot_saliency(nothing, masks, heads=HEADS, path=tmp_path / "none.png")


def test_curves_that_are_equal_are_all_seen_and_no_tick_is_above_100_percent() -> None:
    rows = [{"iteration": i, "reward_mean": 1.0, "accuracy": 1.0} for i in range(1, 4)]
    full = {"accuracy": 1.0, "accuracy_by_length": {"64": 1.0, "128": 1.0, "512": 1.0}}
    figure = reward_figure(rows, [{"iteration": i, **full} for i in (0, 3)])
    for axes in figure.axes:
        widths = [line.get_linewidth() for line in axes.lines]
        assert len(widths) > 1
        assert widths == sorted(set(widths), reverse=True)  # drawn in this order: the widest lies behind
    assert max(figure.axes[1].get_yticks()) == 1.0


def test_reward_panels(tmp_path: Path) -> None:
    rows = [{"iteration": i, "reward_mean": i / 10, "accuracy": i / 20} for i in range(1, 6)]
    figure = reward_figure(rows, [BEFORE, AFTER])
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert list(lines) == ["mean reward", "accuracy", "64 tokens", "512 tokens", "all"]
    assert list(lines["mean reward"].get_ydata()) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert list(lines["512 tokens"].get_ydata()) == [0.3, 0.55]
    assert list(lines["all"].get_xdata()) == [0, 60]
    plot_reward(rows, [BEFORE, AFTER], path=tmp_path / "reward.png")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
