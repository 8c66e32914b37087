"""The documentation site: everything exported has a place on it."""

import re
from pathlib import Path

import tangora
from tangora import curvature

API = Path(__file__).parent.parent / "docs" / "api"


def test_everything_exported_is_on_a_page_of_the_reference_once():
    placed = re.findall(
        r"^::: (\S+)$", "\n".join(page.read_text() for page in API.glob("*.md")), re.MULTILINE
    )
    assert len(placed) == len(set(placed))
    exported = {f"tangora.{name}" for name in tangora.__all__ if name != "curvature"}
    exported |= {f"tangora.curvature.{name}" for name in curvature.__all__}
    assert exported - set(placed) == set()
