"""The ranks of single layers that `tangora diagnose` proposes, as `tangora train --rank-plan` takes them."""

import json
import math
from pathlib import Path
from typing import Any


def read_rank_plan(path: str) -> dict[str, Any]:
    """Read the rank plan of a diagnosis."""
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"rank_plan cannot be read: {error}") from None
    return checked_rank_plan(plan)


def checked_rank_plan(plan: Any) -> dict[str, Any]:
    """Check a rank plan, and keep what adapters are made from."""
    keys = ("rank_pattern", "alpha_pattern")
    if not isinstance(plan, dict) or any(not isinstance(plan.get(key), dict) for key in keys):
        raise ValueError(f"rank_plan must hold {' and '.join(keys)}")
    for key, number, what in (
        ("rank_pattern", int, "whole numbers"),
        ("alpha_pattern", (int, float), "numbers"),
    ):
        for name, value in plan[key].items():
            if not isinstance(value, number) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"rank_plan: {key} must hold {what} above 0; got {value!r} for {name}")
    return {key: plan[key] for key in (*keys, "r", "lora_alpha", "use_rslora") if key in plan}
