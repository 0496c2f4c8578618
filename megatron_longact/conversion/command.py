"""How the conversion tools end: what they did on stdout, or one line on stderr."""

import sys
from collections.abc import Callable
from pathlib import Path


def run(action: Callable[[], str]) -> int:
    """Print what `action` returns; exit status 0, 1 with one line for a `ValueError`, 130 when interrupted."""
    tool = Path(sys.argv[0]).name
    try:
        print(action())
    except ValueError as error:
        print(f"{tool}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{tool}: stopped; the same command goes on where this one was", file=sys.stderr)
        return 130
    return 0
