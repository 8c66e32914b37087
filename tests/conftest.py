import huggingface_hub.constants
import pytest
import torch

# the tests run in one process per core: more threads would only wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    """Switch the hub off, also where it was imported before this folder's tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
