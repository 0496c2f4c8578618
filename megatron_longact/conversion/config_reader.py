"""Values of a config.json, read with their names: a wrong one is refused in one line."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn


class ConfigReader:
    """where: the file, for messages."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        """Raise `ValueError` for a value that makes another model than the one that Megatron builds."""
        raise ValueError(f"{self.where}: {name} is {json.dumps(value)}, which is not mapped to Megatron; {wanted}")

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number, 1 or more; else `ValueError`."""
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.where}: {name} is {json.dumps(value)}; it must be a whole number, 1 or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number, 0 or more; else `ValueError`."""
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{self.where}: {name} is {json.dumps(value)}; it must be a number, 0 or more")
        return float(value)
