"""Read saved adapters, every tensor of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from tangora._checks import InputError, check_kind, check_path, no_such_path, on_one_line
from tangora.adapters.peft_models import named_adapter_parameters, unwrapped

CONFIG_FILE = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def load_adapter(base: nn.Module, path: str | os.PathLike[str], **options: Any) -> PeftModel:
    """Load a saved adapter on its base model.

    Args:
        base: The original base model, without adapters; of a wrapped one (DDP, torch.compile) the module inside.
        path: Folder that `save_adapter` (or PEFT) wrote.
        **options: Passed on to ``PeftModel.from_pretrained`` (``is_trainable``, ``adapter_name``, …). With
            ``is_trainable`` the whole pair is trained, offset or not: a saved adapter has none.

    Raises:
        InputError: If ``path`` holds no adapter or a damaged one, ``base`` is no model or holds an adapter already, a
            tensor of the file has no place in the model, or the file lacks one.
    """
    folder = check_path("path", path) / (options.get("subfolder") or "")
    if not (folder / CONFIG_FILE).is_file():
        missing = f"{CONFIG_FILE} is missing" if folder.exists() else no_such_path(folder)
        raise InputError(f"{folder} contains no adapter ({missing})")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise InputError(f"{folder} contains no weights ({_WEIGHTS[0]} is missing)")
    bare = unwrapped(base)
    check_kind(
        "base", bare, nn.Module, "a loaded base model, such as AutoModelForCausalLM.from_pretrained(name)"
    )
    for name, module in bare.named_modules():
        if isinstance(module, (BaseTunerLayer, PeftModel)):
            raise InputError(
                f"base already has an adapter ({name or type(module).__name__}): load the original "
                "model, or call "
                "load_adapter of the PEFT model"
            )
    mapping = options.get("key_mapping") or getattr(bare, "_checkpoint_conversion_mapping", {})
    with _one_line_errors(folder):
        model = PeftModel.from_pretrained(bare, os.fspath(path), **options)
    _check_taken(model, folder, mapping, options)
    return model


@contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyError as error:  # PEFT looks a module to save up before it asks whether the file has it
        raise InputError(f"{folder} lacks {error.args[0]}, which its config mentions") from error
    except InputError:
        raise
    except NoMatchingPeftModuleError as error:
        raise InputError(
            f"{folder} belongs to another base: this model has none of the layers in its {CONFIG_FILE}"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a damaged config or file ends in any of them
        if "size mismatch" in str(error):
            raise InputError(f"{folder} belongs to another base: {on_one_line(error, 300)}") from error
        raise InputError(f"{folder} cannot be read: {on_one_line(error, 300)}") from error


def _check_taken(model: PeftModel, folder: Path, mapping: dict[str, str], options: dict[str, Any]) -> None:
    name = options.get("adapter_name", "default")
    config: Any = model.peft_config[name]
    if config.is_prompt_learning:
        return
    ranks = getattr(config, "rank_pattern", None)
    if isinstance(config, AdaLoraConfig):
        config.rank_pattern = None  # its layers have their ranks by now, and would be cut a second time
    # PEFT keeps this answer for itself; loading the same tensors once more changes nothing
    answer: Any = set_peft_model_state_dict(
        model,
        load_peft_weights(os.fspath(folder), device="cpu", key_mapping=mapping),
        adapter_name=name,
        ignore_mismatched_sizes=options.get("ignore_mismatched_sizes", False),
    )
    if isinstance(config, AdaLoraConfig):
        config.rank_pattern = ranks
    if answer.unexpected_keys:
        raise InputError(
            f"{folder} holds {answer.unexpected_keys[0]}, which does not exist in the model: the "
            "adapter belongs to another base, or its config does not name that layer"
        )
    state, absent = model.state_dict(keep_vars=True), set(answer.missing_keys)
    loaded = {tensor.data_ptr() for key, tensor in state.items() if key not in absent}
    for key, parameter in named_adapter_parameters(model, name):
        if key in absent and parameter.data_ptr() not in loaded:  # several methods share one bank of vectors
            raise InputError(
                f"{folder} lacks {key}: the adapter belongs to another base, or its file is incomplete"
            )
        if key not in absent and not parameter.isfinite().all():
            raise InputError(f"{folder} holds values in {key} that are not finite: its training diverged")
