"""One HTML page of a run, running or finished, or of several runs: it can be sent, and loads nothing from outside.

    longact report runs/demo
    longact report runs/smollm2-rl --output smollm2.html     # an ablation's folder: its runs side by side

RUN_DIR is a --run-dir of `longact train`, with LongAct or dense, or a folder with several of them below it. The page is
RUN_DIR/report.html unless --output names another file; it is made anew by each call.
"""

import argparse
import sys
from pathlib import Path

from megatron_longact.megatron.tool_command import check_file, end_in_one_line


def main(argv: list[str]) -> int:
    """Write the page; the exit status: 2 for unknown choices, 1 for what else is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="Folder of a run, or of several.")
    parser.add_argument("--output", "--html", type=Path, metavar="FILE", help="Where. Default: RUN_DIR/report.html.")
    parser.add_argument(
        "--load", type=Path, metavar="DIR", help="Its checkpoints. Default: RUN_DIR/checkpoints, or where it saves."
    )
    args = parser.parse_args(argv)

    def action() -> None:
        from megatron_longact.reporting.page import write
        from megatron_longact.rl.run_files import RunFiles, runs_below
        from megatron_longact.rl.run_page import page_of_run, page_of_runs

        run, below = RunFiles(args.run_dir, args.load), []
        if not run.is_run:
            below = runs_below(args.run_dir)
        if not run.is_run and not below:
            raise ValueError(f"{args.run_dir} holds no run, nor does a folder in it: metrics.jsonl is not there")
        if below and args.load:
            raise ValueError(f"--load is of one run, and {args.run_dir} holds {len(below)}: give the folder of one")
        output = args.output or args.run_dir / "report.html"
        check_file(output, flag="--output")
        page = page_of_run(run) if run.is_run else page_of_runs(args.run_dir, [RunFiles(path) for path in below])
        write(page, output)
        print(f"{output}: {output.stat().st_size / 1000:.0f} kB", file=sys.stdout)

    return end_in_one_line("report", action)
