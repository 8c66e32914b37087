"""Asks the Hugging Face hub about a name quickly, before anything slow is tried with it."""

import contextlib
import threading
from collections.abc import Iterator

import huggingface_hub
from datasets import config
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

TIMEOUT = 4.0  # seconds; a name server that does not answer would take far longer


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let ``huggingface_hub``, and the loaders that ask it, use only their caches."""
    # both read the environment only once, when they are imported
    holders = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in holders]
    for module, name in holders:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(holders, before, strict=True):
            setattr(module, name, value)


def hub_problem(name: str, repo_type: str) -> tuple[str | None, bool]:
    """Ask the hub whether it has a repository, and wait at most `TIMEOUT` seconds for its answer.

    The loaders themselves retry an unreachable hub for half a minute, also for a mistyped name.
    """
    found: list[tuple[str | None, bool]] = []
    # looking up the address has no limit of its own
    asking = threading.Thread(target=lambda: found.append(_ask(name, repo_type)), daemon=True)
    asking.start()
    asking.join(TIMEOUT)
    late = f"the hub cannot be reached (no answer in {TIMEOUT:g} s), and the name is not in its cache"
    return found[0] if found else (late, True)


def _ask(name: str, repo_type: str) -> tuple[str | None, bool]:
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=repo_type, timeout=TIMEOUT)
    except HFValidationError:
        return "it is not a valid hub name", False
    except OfflineModeIsEnabled:
        return "hub access is disabled (HF_HUB_OFFLINE), and the name is not in the cache", True
    except GatedRepoError:
        return f"you must first request access to this {repo_type} on the hub", True
    except RepositoryNotFoundError:
        return f"the hub has no such {repo_type} (or it is private)", False
    # which library carries the requests, and with it the type of its errors, changed twice
    except Exception as error:
        return f"the hub cannot be reached ({type(error).__name__}), and the name is not in its cache", True
    return None, False
