r"""Write and read adapters as plain LoRA that loads on the untouched base model with nothing but PEFT.

PEFT's PiSSA changes the base weight to $W_0 - s B_0 A_0$. The trained model is then $W_0 + s (B A - B_0 A_0)$: an
ordinary adapter of rank $2r$ with $A' = [A; A_0]$ and $B' = [B, -B_0]$.
"""

import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tangora._checks import InputError

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# what PEFT and this module write; a folder with anything else in it is never replaced
_FILES = {_WEIGHTS, _CONFIG, "README.md", "adapter_model.bin"}
# starts for which PEFT overwrites the base weights
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")


def initial_factors(model: PeftModel) -> dict[str, Tensor]:
    """Copy the adapter's factors, to be taken before training where the start changed the base weights.

    Args:
        model: PEFT model as `get_peft_model` returned it.

    Returns:
        Copies of the factors by their saved names, on the CPU; empty where the base is untouched.

    Raises:
        InputError: If not exactly one adapter is active.
    """
    if not _mutates_base(model):
        return {}
    state = get_peft_model_state_dict(model, adapter_name=_active(model), save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if _FACTOR.search(name)}


def save_adapter(
    model: PeftModel, path: str | os.PathLike[str], *, initial: dict[str, Tensor] | None = None
) -> Path:
    """Write the active adapter as one plain LoRA adapter.

    ``PeftModel.from_pretrained(original_base, path)`` then gives the logits of ``model``. Everything else that the
    adapter holds (``modules_to_save``, magnitudes, embeddings) is kept. The folder appears whole or not at all.

    Args:
        model: PEFT model with one active adapter.
        path: Folder to write; an existing adapter there is replaced.
        initial: What `initial_factors` returned before training, for starts that change the base weights (PiSSA).

    Returns:
        The folder.

    Raises:
        InputError: If ``model`` is no PEFT model with one active adapter, if its start changed the base weights and
            ``initial`` is missing or another adapter's, or if ``path`` holds anything but an adapter.
    """
    _check_model(model, initial)
    target = Path(path).resolve()
    _check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        written = _write(model, scratch / "adapter")  # mkdtemp's own folder is readable by its owner only
        if initial:
            _append_initial(written, initial)
        _replace_folder(written, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Path(path)


def load_adapter(base: nn.Module, path: str | os.PathLike[str], **options: Any) -> PeftModel:
    """Load a saved adapter on its base model.

    Args:
        base: The original base model, without adapters.
        path: Folder that `save_adapter` (or PEFT) wrote.
        **options: Passed on to ``PeftModel.from_pretrained`` (``is_trainable``, ``adapter_name``, …).

    Returns:
        The PEFT model.

    Raises:
        InputError: If ``path`` holds no adapter.
    """
    if not (Path(path) / _CONFIG).is_file():
        raise InputError(f"{path} holds no adapter ({_CONFIG} is missing)")
    return PeftModel.from_pretrained(base, os.fspath(path), **options)


def _active(model: PeftModel) -> str:
    if len(model.active_adapters) != 1:
        raise InputError(
            f"model must have one active adapter; got {', '.join(model.active_adapters) or 'none'}"
        )
    return model.active_adapters[0]


def _start(model: PeftModel) -> object:
    return getattr(model.peft_config[_active(model)], "init_lora_weights", True)


def _mutates_base(model: PeftModel) -> bool:
    return str(_start(model)).lower().startswith(_MUTATING)


def _check_model(model: PeftModel, initial: dict[str, Tensor] | None) -> None:
    if not isinstance(model, PeftModel):
        raise InputError(f"save_adapter needs a PeftModel; got {type(model).__name__}")
    if not _mutates_base(model):
        return
    if not initial:
        raise InputError(
            f"the start {_start(model)!r} changed the base weights: pass initial=initial_factors(model), "
            "taken before training, so that the adapter loads on the untouched base"
        )
    if getattr(model.peft_config[_active(model)], "target_parameters", None):
        raise InputError(
            f"the start {_start(model)!r} cannot be saved together with target_parameters: their factors hold "
            "several matrices; train those in an adapter of their own"
        )


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    held = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if not target.is_dir() or (held and _CONFIG not in held):
        raise InputError(f"{target} exists and is no adapter folder; choose another path")
    if strangers := sorted(held - _FILES):
        raise InputError(
            f"{target} holds {strangers[0]} beside an adapter, which would be lost; choose another path"
        )


def _write(model: PeftModel, folder: Path) -> Path:
    name = _active(model)
    model.save_pretrained(str(folder), safe_serialization=True, selected_adapters=[name])
    return folder if name == "default" else folder / name  # PEFT gives other adapters a folder of their own


def _append_initial(folder: Path, initial: dict[str, Tensor]) -> None:
    tensors = load_file(folder / _WEIGHTS)
    # Embeddings and convolutions, whose base PEFT leaves alone, start from a zero factor: appending changes nothing.
    for name, trained in tensors.items():
        if (factor := _FACTOR.search(name)) is None:
            continue
        if name not in initial or initial[name].shape != trained.shape:
            raise InputError(f"initial holds no start of {name}: take initial_factors(model) from this model")
        first = initial[name].to(trained.dtype)
        is_A = factor[1] == "A"
        tensors[name] = torch.cat([trained, first if is_A else -first], dim=0 if is_A else 1)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    (folder / _CONFIG).write_text(json.dumps(_doubled_rank(config), indent=2), encoding="utf-8")


def _doubled_rank(config: dict[str, Any]) -> dict[str, Any]:
    # the scaling must not change: alpha / r, or alpha / sqrt(r) with rsLoRA. A rank pattern without its own alpha
    # still works, because every rank doubles.
    growth = math.sqrt(2) if config.get("use_rslora") else 2
    return config | {
        "r": 2 * config["r"],
        "lora_alpha": growth * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: growth * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
        "init_lora_weights": True,
    }


def _replace_folder(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)
