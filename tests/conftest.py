import huggingface_hub.constants
import pytest


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    """Switch the hub off, also where it was imported before this folder's tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
