"""What may stand in a published JSON file: plain JSON, which every reader takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def check_json(value: Any, where: str) -> None:
    """Raise ValueError naming the key of a value that JSON does not have (NaN, tensors, sets, …).

    Tuples count as lists; keys are text or integers.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str) and type(key) is not int:
                raise ValueError(f"{where}: a key is a {type(key).__name__}, expected text")
            check_json(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for position, inner in enumerate(value):
            check_json(inner, f"{where}[{position}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which JSON does not have; take it out, or set None")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"{where} is a {type(value).__name__}, expected text, a number, true, false, null, a "
            "list or an object"
        )
