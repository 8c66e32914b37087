"""Named comparisons, one YAML file each, as `tangora compare` takes them."""

from importlib.resources import files
from typing import Any

import yaml

from tangora._checks import check_choice

_FILES = {
    path.name.removesuffix(".yaml"): path for path in files(__name__).iterdir() if path.name.endswith(".yaml")
}

PRESETS = tuple(sorted(_FILES))
"""Their names."""


def preset(name: str) -> dict[str, Any]:
    """Return the settings of a named comparison."""
    check_choice("preset", name, PRESETS)
    return yaml.safe_load(_FILES[name].read_text(encoding="utf-8"))
