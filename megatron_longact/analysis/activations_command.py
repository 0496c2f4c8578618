"""How the analysis tools end: their exit status, and one line for what is refused."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable


def run(tool: str, action: Callable[[], None]) -> int:
    """0; or 1 with one line on stderr, from rank 0, for a `ValueError` of this package."""
    try:
        action()
    except ValueError as error:
        if not _is_refusal(error):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"{tool}:", " ".join(str(error).split()), file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # torchrun ends all ranks when the first one ends
        return 1
    return 0


def _is_refusal(error: ValueError) -> bool:
    """Whether this package raised it; one from anywhere else is a crash."""
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("megatron_longact.")
