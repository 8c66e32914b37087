"""Asks the Hugging Face hub about a name quickly, before anything slow is tried with it."""

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

TIMEOUT = 10.0  # seconds


def hub_problem(name: str, repo_type: str) -> tuple[str | None, bool]:
    """Ask the hub whether it has a repository.

    The loaders themselves retry an unreachable hub for half a minute, also for a mistyped name.

    Args:
        name: ``organization/name`` or an old name without a slash.
        repo_type: ``model`` or ``dataset``.

    Returns:
        What is wrong, in words, or ``None``; and whether a cached copy may still serve.
    """
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=repo_type, timeout=TIMEOUT)
    except HFValidationError:
        return "it is no valid hub name", False
    except OfflineModeIsEnabled:
        return "the hub is switched off (HF_HUB_OFFLINE) and the name is not in its cache", True
    except GatedRepoError:
        return f"the hub wants you to ask for access to this {repo_type} first", True
    except RepositoryNotFoundError:
        return f"the hub has no such {repo_type} (or it is private)", False
    # which library carries the requests, and with it the type of its errors, changed twice
    except Exception as error:
        return f"the hub cannot be reached ({type(error).__name__}) and the name is not in its cache", True
    return None, False
