"""Lines of JSON from elsewhere: whatever `json` and tokenizers would raise becomes a `ValueError` of one line."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError that says what is wrong with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"not JSON: {error.msg} at {place}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error
    except ValueError as error:  # more digits than Python turns into a number
        raise ValueError(f"not JSON that can be read: {error}") from error


def check_text(text: str) -> str:
    """The text itself; ValueError if it holds half of a surrogate pair, which no tokenizer and no file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"no text: character {error.start + 1} is half of a surrogate pair") from error
    return text
