r"""Write and read adapters as plain LoRA that loads on the untouched base model with nothing but PEFT.

PEFT's PiSSA changes the base weight to $W_0 - s B_0 A_0$. The trained model is then $W_0 + s (B A - B_0 A_0)$: an
ordinary adapter of rank $2r$ with $A' = [A; A_0]$ and $B' = [B, -B_0]$.
"""

import json
import math
import os
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
# starts for which PEFT overwrites the base weights
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def initial_factors(model: PeftModel) -> dict[str, Tensor]:
    """Copy the adapter's factors, to be taken before training where the start changed the base weights.

    Args:
        model: PEFT model as `get_peft_model` returned it.

    Returns:
        Copies of ``lora_A`` and ``lora_B`` by their saved names, on the CPU; empty where the base is untouched.
    """
    if not _mutates_base(model):
        return {}
    state = get_peft_model_state_dict(model)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if _is_factor(name)}


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
        InputError: If ``model`` is no PEFT model, if its start changed the base weights and ``initial`` is missing,
            or if ``path`` holds something that is no adapter.
    """
    if not isinstance(model, PeftModel):
        raise InputError(f"save_adapter needs a PeftModel; got {type(model).__name__}")
    if _mutates_base(model) and not initial:
        raise InputError(
            f"the start {_start(model)!r} changed the base weights: pass initial=initial_factors(model), "
            "taken before training, so that the adapter loads on the untouched base"
        )
    target = Path(path)
    if target.exists() and not (target / _CONFIG).exists() and (target.is_file() or any(target.iterdir())):
        raise InputError(f"{target} exists and is no adapter folder; choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        written = _write(model, scratch)
        if initial:
            _append_initial(written, initial)
        _replace_folder(written, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


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


def _start(model: PeftModel) -> object:
    return getattr(model.peft_config[model.active_adapter], "init_lora_weights", True)


def _mutates_base(model: PeftModel) -> bool:
    return str(_start(model)).startswith(_MUTATING)


def _is_factor(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _write(model: PeftModel, scratch: Path) -> Path:
    name = model.active_adapter
    model.save_pretrained(str(scratch), safe_serialization=True, selected_adapters=[name])
    return scratch if name == "default" else scratch / name  # PEFT gives other adapters a folder of their own


def _append_initial(folder: Path, initial: dict[str, Tensor]) -> None:
    tensors = load_file(folder / _WEIGHTS)
    for name in filter(_is_factor, list(tensors)):
        first = initial[name].to(tensors[name].dtype)
        parts = [tensors[name], first] if ".lora_A." in name else [tensors[name], -first]
        tensors[name] = torch.cat(parts, dim=0 if ".lora_A." in name else 1).contiguous()
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
    source.rename(target)
    shutil.rmtree(old)
