"""The page that can be sent: what is on it, that text stays text, and that a real browser shows it, on a phone too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_longact.analysis.pages import section, text_table
from megatron_longact.commands.report import main
from megatron_longact.conversion.torch_dist import COMMON, TRACKER, TorchDistWriter
from megatron_longact.reporting.charts import MOST_POINTS, Curve, curve, line_chart, number
from megatron_longact.reporting.page import MOST_BYTES, Answer, Page, Picture, Section, Table, render
from megatron_longact.rl.run_files import RunFiles, write_versions
from megatron_longact.rl.run_page import _by_layer

pytestmark = pytest.mark.timeout(120)

EVIL = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)>"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def rows_of(count: int, *, dense: bool = False) -> list[dict[str, Any]]:
    """As metrics.jsonl has them."""
    return [
        {
            "iteration": i,
            "reward_mean": 0.3 + 0.01 * i,
            "accuracy": 0.2 + 0.01 * i,
            "entropy": 2.0 / i,
            "step_time_s": 1.5,
            "rollout_time_s": 3.0,
            "longact/refreshes": None if dense else i,
            "longact/mask_jaccard": None if dense or i == 1 else 0.9,
            "longact/mask_jaccard_first": None if dense else 0.8,
            "longact/ever_active_fraction": None if dense else 0.3 + 0.001 * i,
            "bf16/changed_qk_since_start": 0.001 * i,
        }
        for i in range(1, count + 1)
    ]


def write_run(folder: Path, *, dense: bool = False, steps: int = 6) -> Path:
    """A run that is going: no report.md yet, and a last line that is not there in full."""
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows_of(steps, dense=dense))
    (folder / "metrics.jsonl").write_text(lines + '{"iteration": 7, "rew')
    by_length = [{"128": 0.25, "1024": 0.5}, {"128": 0.5, "1024": 0.75}]
    evaluations = [
        {"iteration": 5 * i, "accuracy": 0.4 + 0.2 * i, "accuracy_by_length": by_length[i], "prompts": 8}
        | {"accuracy_interval": [0.1, 0.9], "accuracy_interval_by_length": {"128": [0.1, 0.6], "1024": [0.2, 0.9]}}
        for i in range(2)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    answer = {"iteration": 5, "prompt": 3, "task": "niah", "correct": False, "reward": 0.0, "prompt_tokens": 90}
    answer |= {
        "response": EVIL,
        "response_tokens": 9,
        "prompt_end": f"What? {'x' * 300}",
        "ended": "length",
        "reference": "7",
    }
    (folder / "heldout.jsonl").write_text(json.dumps(answer) + "\n")
    (folder / "megatron.log").write_text(f"  train_iters ..... 9\n  lr .............. 1e-05\n  load ........ {EVIL}\n")
    write_versions(folder)
    return folder


def with_checkpoint(folder: Path, *, ratio: float = 0.3) -> Path:
    """The state of LongAct and of the RL program as a checkpoint holds them."""
    saliency = {"q": torch.rand(3, 16) + 1, "k": torch.rand(3, 8) + 1}
    masks = {part: values > 1.7 for part, values in saliency.items()}
    state = {"longact": {"saliency": saliency, "masks": masks, "layer_numbers": [1, 2, 4], "config": {"ratio": ratio}},
             "rl": {"rows": {"since": 0, "active": masks, "moved": masks}}}  # fmt: skip
    checkpoints = folder / "checkpoints"
    (checkpoints / "iter_0000005").mkdir(parents=True)
    writer = TorchDistWriter(checkpoints / "iter_0000005")
    writer.write_file("__0_0", iter(()), objects={COMMON: {"opt_param_scheduler": state}})
    writer.finish()
    (checkpoints / TRACKER).write_text("5")
    return folder


def test_a_run_that_is_going_has_a_page(tmp_path: Path, capsys: Any) -> None:
    run = with_checkpoint(write_run(tmp_path / "first"))
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert f"{run / 'report.html'}" in capsys.readouterr().out
    assert "The run has not ended: iteration 6 of 9." in text
    assert "60.0% (10–90)" in text  # overall, with its interval
    assert re.findall(r'<th scope="row">(\d+ tokens)</th>', text) == ["128 tokens", "1024 tokens"]
    assert "<td>25.0% (10–60)</td><td>50.0% (10–60)</td><td>+25.0</td>" in text
    for title in ("Overlap of the mask (Jaccard)", "Saliency of Q channels", "By layer, up to the newest checkpoint"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "<td>1e-05</td>" in text
    assert re.search(r'<th scope="row">torch</th><td>\d', text)
    assert len(re.findall("<svg", text)) == len(re.findall('role="img" aria-label="[^"]{20,}"', text)) > 8


def test_nothing_that_was_said_is_markup_and_nothing_is_loaded(tmp_path: Path) -> None:
    run = write_run(tmp_path / EVIL.replace("/", " "))
    assert main([str(run), "--html", str(tmp_path / "out" / "page.html")]) == 0
    text = (tmp_path / "out" / "page.html").read_text()
    assert "&lt;script&gt;" in text
    assert re.findall(r"<(?:script|iframe|link|object|embed)[^>]*>", text) == ['<link rel="icon" href="data:,">']
    assert all(place.startswith("data:") for place in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert not re.search(r"url\(|@import|https?://", text)
    evil = line_chart(EVIL, [Curve(EVIL, [(0, 1), (1, 2)])], along=EVIL)
    assert evil is not None
    assert "<script" not in render(Page(EVIL, [EVIL], [Section(EVIL, [evil, Table(EVIL, (EVIL,), [(EVIL,)])])]))


def test_a_dense_run_and_several_runs_and_none(tmp_path: Path, capsys: Any) -> None:
    for arm in ("dense", "high"):
        write_run(tmp_path / "grpo" / arm / "seed-1", dense=arm == "dense")
    assert main([str(tmp_path / "grpo/dense/seed-1"), "--output", str(tmp_path / "dense.html")]) == 0
    dense = (tmp_path / "dense.html").read_text()
    assert "LongAct was off in this run" in dense
    assert "No checkpoint of this run holds a saliency" in dense
    assert main([str(tmp_path), "--output", str(tmp_path / "both.html")]) == 0
    both = (tmp_path / "both.html").read_text()
    assert re.findall(r'<th scope="row">([^<]+)</th>', both) == ["grpo/dense/seed-1", "grpo/high/seed-1"]
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"report: {tmp_path / 'empty'} holds no run")
    assert told.count("\n") == 1
    for flags, said in {
        ("--output", str(tmp_path)): "is a folder; give the name of a file as --output",
        ("--output", str(tmp_path / "both.html" / "page.html")): "both.html is a file: --output needs a folder there",
        ("--output", str(tmp_path / ("x" * 300) / "page.html")): "File name too long",
        ("--output", "/dev/full"): "report: No space left on device",
        ("--load", str(tmp_path)): "--load is of one run, and ",
    }.items():
        assert main([str(tmp_path), *flags]) == 1
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1


def test_checkpoints_that_are_named_are_there(tmp_path: Path, capsys: Any) -> None:
    run = with_checkpoint(write_run(tmp_path / "run"))
    assert main([str(run), "--load", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == (
        f"report: --load {tmp_path / 'nowhere'} holds no checkpoint: latest_checkpointed_iteration.txt is not there\n"
    )
    assert main([str(run), "--load", str(run / "checkpoints")]) == 0


def test_what_is_cut_off_or_no_number_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "versions.json").write_text('{"python": "3.')
    (run / "report.md").write_text("# Report of the")
    steps = "".join(json.dumps(row | {"reward_mean": None}) + "\n" for row in rows_of(3))
    (run / "metrics.jsonl").write_text(steps + '{"itera')
    answers = run / "heldout.jsonl"
    answers.write_text(json.dumps(json.loads(answers.read_text()) | {"reward": None}) + "\n")
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "report.md was cut off: iteration 3 of 9." in text
    assert "reward NaN, 90 tokens" in text
    assert "Made with" not in text
    assert main([str(tmp_path), "--output", str(tmp_path / "all.html")]) == 0
    assert "<td>NaN</td>" in (tmp_path / "all.html").read_text()


def test_a_run_that_goes_on_with_other_lengths_has_all_of_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    other = {"iteration": 9, "accuracy": 0.5, "accuracy_by_length": {"1024": 1.0, "4096": 0.0}, "prompts": 8}
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(other) + "\n")
    assert main([str(run)]) == 0
    text = (run / "report.html").read_text()
    rows = re.findall(r'<th scope="row">((?:\d+|all \d) \w+)</th><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>', text)
    assert [(name, after, points) for name, _, after, points in rows] == [
        ("128 tokens", "–", "–"),
        ("1024 tokens", "100.0%", "+50.0"),
        ("4096 tokens", "0.0%", "–"),
        ("all 8 prompts", "50.0%", "–"),
    ]
    assert "4096 tokens from 0% to 0%" in text


def test_the_share_of_a_saliency_is_that_of_the_run(tmp_path: Path) -> None:
    run = with_checkpoint(write_run(tmp_path / "run"), ratio=0.125)
    assert main([str(run)]) == 0
    assert "where the upper 12.5 % begin" in (run / "report.html").read_text()
    chart = _by_layer("Q", [0], torch.arange(16.0).view(1, 16), ratio=0.125)
    assert chart is not None
    assert "where the upper 12.5 % begin from 14 to 14" in chart.alt


def test_a_report_is_read_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "report.md").write_text(
        "# Report of the run\n\nHeld-out accuracy rose by 3.0 points.\n\n| counted at the end | |\n|---|---|\n"
        "| Q/K rows that moved | 5 of 9 |\n\n## Settings\n\n| setting | value |\n|---|---|\n| loss | `a \\| b` |\n"
    )
    files = RunFiles(run)
    assert files.verdict == "Held-out accuracy rose by 3.0 points."
    assert files.table("counted at the end") == [("Q/K rows that moved", "5 of 9")]
    assert files.table("setting") == [("loss", "a | b")]


def test_charts_leave_out_what_is_no_number_and_what_nobody_would_see() -> None:
    assert line_chart("nothing", [curve("a", [1, 2], [None, None])], along="x") is None
    many = Curve("a", [(i, i % 7) for i in range(5000)])
    assert len(many.drawn()) <= MOST_POINTS + 1
    assert many.drawn()[-1][0] == (4999, 4999 % 7)
    holes = line_chart("a", [Curve("b", [(1, 2.0), (2, float("nan")), (3, 4.0)])], along="x")
    assert holes is not None
    assert "nan" not in holes.svg
    assert holes.alt == "a by x: b from 2 to 4, between 2 and 4"
    one = line_chart("a", [Curve("b", [(1, 0.5)], [(0.25, 0.75)])], along="x", percent=True)
    assert one is not None
    assert one.svg.count("<circle") == 1
    assert 'class="line bar c0"' in one.svg
    assert line_chart("log", [Curve("b", [(0, 0.01), (1, 900.0)])], along="x", log=True) is not None
    assert [number(v) for v in (3.0, 0.12345, 1e-5)] == ["3", "0.123", "1e-05"]


def test_results_of_the_analysis_tools_are_a_section(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(PNG)
    printed = "layer, from 0  max/median\n0 Q                  3.10"
    pictures = {"there.png": "what it shows", "missing.png": "nothing"}
    shown = section("a model", tmp_path, words="one\ntwo", tables={"spread": printed}, pictures=pictures, legend="x")
    assert [part.kind for part in shown.parts] == ["text", "text", "table", "text", "picture"]
    assert text_table("t", printed) == Table("t", ["layer, from 0", "max/median"], [["0 Q", "3.10"]])
    assert isinstance(text_table("t", "a  b\n1"), Answer)
    large = Picture("large", PNG + bytes(MOST_BYTES), "too much")
    text = render(Page("t", [], [Section("s", [*shown.parts, large])]))
    assert 'alt="what it shows"' in text
    assert "large: left out, for it would make this page too large." in text


PHONE = """<body style="margin:0"><iframe style="width:390px;height:844px;border:0" srcdoc="{page}"></iframe><script>
document.querySelector("iframe").onload = event => {{
  const {{contentDocument: page, contentWindow: shown}} = event.target;
  const {{scrollWidth: width, clientWidth: room}} = page.documentElement, figures = page.querySelectorAll("svg").length;
  const loaded = shown.performance.getEntriesByType("resource").map(entry => entry.name);
  const found = {{width, room, window: shown.innerWidth, loaded, title: page.title, figures}};
  document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
}}</script>"""
"""The page in a frame as wide as a phone, which no window can be, measured from outside."""


def browser(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Without a network: every name is unknown."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", f"--user-data-dir={folder}"]
    command = [chromium, *quiet, *offline, "--window-size=800,844", *flags, f"file://{page}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def test_a_browser_shows_it_on_a_phone_without_a_network(tmp_path: Path) -> None:
    run = with_checkpoint(write_run(tmp_path / "run"))
    assert main([str(run)]) == 0
    phone = tmp_path / "phone.html"
    phone.write_text(PHONE.format(page=escape((run / "report.html").read_text())))
    done = browser(phone, tmp_path / "profile", "--dump-dom")
    found = json.loads(done.stdout.partition("<pre>")[2].partition("</pre>")[0])
    assert found["window"] == 390
    assert found["width"] == found["room"]  # nothing to scroll sideways
    assert found["title"] == "Run run"
    assert found["figures"] > 8
    assert found["loaded"] == []
    assert "CONSOLE" not in done.stderr
