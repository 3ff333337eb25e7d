"""JSON knows no infinity, and nothing that is not a number: a model that broke has both."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """What goes into a JSON document, None in place of NaN and of infinities, at any depth."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
