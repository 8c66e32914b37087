r"""Write and read adapters as plain LoRA that loads on the untouched base model with nothing but PEFT.

A start may need $W_0 - s B_0 A_0$ as its base. The trained model is then $W_0 + s (B A - B_0 A_0)$: an ordinary adapter
of rank $2r$ with $A' = [A; A_0]$ and $B' = [B, -B_0]$, written by its singular values (`resolve`). That holds for an
offset (`attach_offset`), whose layers say so themselves, and for PEFT's PiSSA and its like, which change the base
weight.
"""

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.error import NoMatchingPeftModuleError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tangora._checks import InputError, check_choice, check_whole
from tangora.adapters.card import model_card
from tangora.adapters.compress import compress, layers_of, ranks_of, resolve, trim
from tangora.adapters.config import OffsetConfig, doubled_rank, with_ranks
from tangora.adapters.discover import Discovery, active_adapter, discover
from tangora.adapters.folder import check_replaceable, replace_folder, scratch_beside
from tangora.adapters.merge import with_parameters
from tangora.adapters.offset import has_offset, mutates_base
from tangora.adapters.once import on_first_rank
from tangora.adapters.pair import LoraPair
from tangora.adapters.switch import peft_model
from tangora.adapters.uniform import uniform as uniform_factors

_WEIGHTS, _CONFIG, _CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
# what PEFT and this module write; a folder with anything else in it is never replaced
_FILES = {_WEIGHTS, _CONFIG, _CARD, "adapter_model.bin"}
_FACTOR = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")


@dataclass(frozen=True)
class SavedAdapter(os.PathLike[str]):
    """An adapter on disk; it can be given wherever a path can."""

    path: Path
    """Its folder."""
    rank: int
    """Largest rank of a layer; 0 for an adapter without plain pairs."""
    relative_error: float = 0.0
    """Frobenius norm of what compression cut off all updates, relative to that of the updates."""
    worst_layer: str | None = None
    """The layer that lost the largest share of its own update."""
    worst_error: float = 0.0
    """That share."""

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)


def initial_factors(model: PeftModel) -> dict[str, Tensor]:
    """Copy the adapter's factors, to be taken before training where PEFT's start changed the base weights.

    Args:
        model: PEFT model as `get_peft_model` returned it.

    Returns:
        Copies of the factors by their saved names, on the CPU; empty where the base is untouched.

    Raises:
        InputError: If not exactly one adapter is active.
    """
    if not mutates_base(model.peft_config[active_adapter(model)]):
        return {}
    state = get_peft_model_state_dict(model, adapter_name=active_adapter(model), save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if _FACTOR.search(name)}


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    trim_ranks: bool = True,
    uniform: bool = False,
    initial: dict[str, Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
) -> SavedAdapter:
    r"""Write the active adapter as one plain LoRA adapter.

    ``PeftModel.from_pretrained(original_base, path)`` then gives the logits of ``model``. Everything else that the
    adapter holds (``modules_to_save``, magnitudes, embeddings) is kept. The folder appears whole or not at all.

    With ``torch.distributed`` running, rank 0 writes; other ranks that call it wait and return the same.

    Args:
        model: PEFT model with one active adapter, also inside DistributedDataParallel or ``torch.compile``.
        path: Folder to write; an existing adapter there is replaced.
        rank: Cut every layer's update $s (B A - B_0 A_0)$ to this rank, by its singular values; the result says what
            was lost. DoRA's magnitudes stay, so that there the cut changes the direction only. Default: exact, which
            is twice the rank for an adapter that carries an offset.
        trim_ranks: Leave out ranks that are exactly zero in both factors, as rank-adaptive training leaves them; a
            fresh adapter has none. Each layer gets the rank that was found, at its old scaling, and every update stays
            as it is. A loaded adapter cannot grow those ranks again.
        uniform: Give all layers one rank and one alpha, for readers that know no ``rank_pattern``, ``alpha_pattern`` or
            rsLoRA (GGUF, vLLM): scalings go into B, which rounds it, and lower ranks are filled up with zeros. The
            rank, in the result, must not exceed what the reader allows (vLLM's ``max_lora_rank``); ``rank`` cuts it.
        initial: What `initial_factors` returned before training, for PEFT's starts that change the base weights
            (PiSSA).
        card: What is known of the training (recipe, seed, data, learning rate, steps, …), for the README.

    Returns:
        The folder, usable as a path, with its rank and the error of the compression.

    Raises:
        InputError: If ``model`` is no PEFT model with one active adapter, if its start changed the base weights and
            ``initial`` is missing or another adapter's, if a scaling was changed at run time, if ``rank`` or
            ``uniform`` is given and a layer is no plain pair, if the factors are sharded, or if ``path`` holds anything
            but an adapter.
    """
    if rank is not None:
        check_whole("rank", rank, low=1)
    check_choice("uniform", uniform, (True, False))
    model = peft_model(model, "save_adapter")
    found = _check_model(model, initial)
    for option, given in (("rank", rank), ("uniform", uniform)):
        if given and found.skipped:
            name, reason = next(iter(found.skipped.items()))
            raise InputError(f"{option} cannot be {given}, because {name} is no plain pair: {reason}")
    target = Path(path).resolve()

    def write() -> SavedAdapter:
        return _write_adapter(model, target, Path(path), found, rank, trim_ranks, uniform, initial, card)

    return on_first_rank(write, target, "save_adapter")


def _write_adapter(
    model: PeftModel,
    target: Path,
    path: Path,
    found: Discovery,
    rank: int | None,
    trim_ranks: bool,
    uniform: bool,
    initial: dict[str, Tensor] | None,
    card: Mapping[str, Any] | None,
) -> SavedAdapter:
    check_replaceable(target, what="adapter", marker=_CONFIG, known=_FILES.__contains__)
    with scratch_beside(target) as scratch:
        front = _write(model, scratch)
        written = scratch if active_adapter(model) == "default" else scratch / active_adapter(model)
        files, scalings = _read(written), _scalings(model)
        final = files if not initial else _with_initial(files, initial)
        if initial or has_offset(model, active_adapter(model)):  # then every adapted layer is a plain pair
            final = final._replace(tensors=resolve(final.tensors))
        if trim_ranks and not found.skipped:
            final = _trimmed(final, scalings)
        final, saved = _cut(final, scalings if found.pairs else {}, rank, path)
        if uniform and found.pairs:
            final, saved = _made_uniform(final, scalings, saved)
        if final.config.get("ensure_weight_tying"):
            final = _untied(final, model)
        if final is not files:
            _rewrite(written, final)
        classes = getattr(getattr(model, "config", None), "num_labels", None)
        images = getattr(model.get_base_model(), "main_input_name", "") == "pixel_values"
        text = model_card(
            front, final.config, _of_rank(model, saved, rank), card or {}, classes, images=images
        )
        (written / _CARD).write_text(text, encoding="utf-8")
        replace_folder(written, target)
    return saved


def load_adapter(base: nn.Module, path: str | os.PathLike[str], **options: Any) -> PeftModel:
    """Load a saved adapter on its base model.

    Args:
        base: The original base model, without adapters.
        path: Folder that `save_adapter` (or PEFT) wrote.
        **options: Passed on to ``PeftModel.from_pretrained`` (``is_trainable``, ``adapter_name``, …). With
            ``is_trainable`` the whole pair is trained, offset or not: a saved adapter has none.

    Returns:
        The PEFT model.

    Raises:
        InputError: If ``path`` holds no adapter, or one with tensors that no layer of ``base`` takes.
    """
    if not (Path(path) / _CONFIG).is_file():
        raise InputError(f"{path} holds no adapter ({_CONFIG} is missing)")
    model = PeftModel.from_pretrained(base, os.fspath(path), **options)
    name = options.get("adapter_name", "default")
    taken = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    with (
        safe_open(Path(path) / _WEIGHTS, "pt") if (Path(path) / _WEIGHTS).is_file() else nullcontext() as file
    ):
        held = file.keys() if file is not None else ()
    left = [key for key in held if "lora_" in key and key not in taken]  # which PEFT drops without a word
    if left:
        raise InputError(
            f"{path} holds {len(left)} tensors that no layer of the model takes, such as {left[0]}: it was saved for "
            "another base model, or by a tool that ties layers; save it again with tangora.save_adapter"
        )
    return model


def _check_model(model: PeftModel, initial: dict[str, Tensor] | None) -> Discovery:
    _check_start(model, initial)
    if not any(hasattr(module, "lora_A") for module in model.modules()):
        return Discovery([], {})
    name = active_adapter(model)
    if isinstance(model.peft_config[name], OffsetConfig) and not has_offset(model, name):
        raise InputError(
            f"adapter {name!r} was made from the config of an adapter with an offset; give it a LoraConfig of its own"
        )
    found = discover(model, name)
    for pair in found.pairs:
        _check_scaling(pair)
        if pair.sharded:
            raise InputError(
                f"the factors of {pair.name} are sharded (FSDP2 or tensor parallel), and this process holds a part of "
                "them: gather them by get_model_state_dict of torch.distributed.checkpoint, or shard the base only"
            )
    return found


def _check_start(model: PeftModel, initial: dict[str, Tensor] | None) -> None:
    config = model.peft_config[active_adapter(model)]
    start = getattr(config, "init_lora_weights", None)
    if not mutates_base(config):
        if initial:
            raise InputError(
                f"initial must be empty, because the start {start!r} left the base weights alone"
            )
        return
    if not initial:
        raise InputError(
            f"the start {start!r} changed the base weights: pass initial=initial_factors(model), "
            "taken before training, so that the adapter loads on the untouched base"
        )
    if getattr(config, "target_parameters", None):
        raise InputError(
            f"the start {start!r} cannot be saved together with target_parameters: their factors hold "
            "several matrices; train those in an adapter of their own"
        )


def _check_scaling(pair: LoraPair) -> None:
    layer: Any = pair.layer
    rank, alpha = layer.r[pair.adapter], layer.lora_alpha[pair.adapter]
    expected = alpha / (math.sqrt(rank) if layer.use_rslora.get(pair.adapter) else rank)
    if not math.isclose(pair.scaling, expected, rel_tol=1e-9):
        raise InputError(
            f"the scaling of {pair.name} must be {expected:g}, as its rank and alpha say, because the files of an "
            f"adapter hold no other; got {pair.scaling:g}: undo set_scale or scale_layer first"
        )


def _write(model: PeftModel, folder: Path) -> dict[str, Any]:
    # returns the front matter of PEFT's card
    model.save_pretrained(str(folder), safe_serialization=True, selected_adapters=[active_adapter(model)])
    card = folder / _CARD  # other adapters than "default" get a folder of their own; the card stays outside
    return ModelCard.load(card).data.to_dict() if card.exists() else {}


class _Files(NamedTuple):
    # what PEFT wrote, or what will take its place
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def _read(folder: Path) -> _Files:
    return _Files(load_file(folder / _WEIGHTS), json.loads((folder / _CONFIG).read_text(encoding="utf-8")))


def _rewrite(folder: Path, files: _Files) -> None:
    save_file(files.tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(files.config, indent=2, sort_keys=True), encoding="utf-8")


def _with_initial(files: _Files, initial: dict[str, Tensor]) -> _Files:
    tensors = dict(files.tensors)
    # Embeddings and convolutions, whose base PEFT leaves alone, start from a zero factor: appending changes nothing.
    for name, trained in files.tensors.items():
        if (factor := _FACTOR.search(name)) is None:
            continue
        if name not in initial or initial[name].shape != trained.shape:
            raise InputError(f"initial holds no start of {name}: take initial_factors(model) from this model")
        first = initial[name].to(trained.dtype)
        is_A = factor[1] == "A"
        tensors[name] = torch.cat([trained, first if is_A else -first], dim=0 if is_A else 1)
    return _Files(tensors, doubled_rank(files.config))


def _scalings(model: PeftModel) -> dict[str, float]:
    # tied layers are one pair, but saved each under its own name
    name = active_adapter(model)
    held = ((key, getattr(module, "scaling", None)) for key, module in model.named_modules())
    return {
        key: float(scaling[name]) for key, scaling in held if isinstance(scaling, dict) and name in scaling
    }


def _trimmed(files: _Files, scalings: dict[str, float]) -> _Files:
    shorter, ranks = trim(files.tensors)
    if ranks == ranks_of(files.tensors):
        return files
    return _Files(shorter, with_ranks(files.config, ranks, scalings))


def _cut(
    files: _Files, scalings: dict[str, float], rank: int | None, path: Path
) -> tuple[_Files, SavedAdapter]:
    if not scalings:
        return files, SavedAdapter(path, 0)
    largest = max(ranks_of(files.tensors).values())
    if rank is None or rank >= largest:
        return files, SavedAdapter(path, largest)
    smaller = compress(files.tensors, rank, scalings)
    worst = max(smaller.errors, key=smaller.errors.__getitem__)
    largest = max(smaller.ranks.values())
    saved = SavedAdapter(path, largest, smaller.relative_error, worst, smaller.errors[worst])
    return _Files(smaller.tensors, with_ranks(files.config, smaller.ranks, scalings)), saved


def _made_uniform(
    files: _Files, scalings: dict[str, float], saved: SavedAdapter
) -> tuple[_Files, SavedAdapter]:
    tensors, rank, alpha = uniform_factors(files.tensors, scalings)
    plain = {"r": rank, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return _Files(tensors, files.config | plain), replace(saved, rank=rank)


def _untied(files: _Files, model: PeftModel) -> _Files:
    # every layer of the file is named in its config, unless PEFT finds again by itself which ones are tied
    layers = [name.removeprefix("base_model.model.") for name in layers_of(files.tensors)]
    found: set[str] = set()
    # in some models PEFT finds nothing at all
    with warnings.catch_warnings(), torch.device("meta"), contextlib.suppress(NoMatchingPeftModuleError):
        warnings.simplefilter("ignore")
        base: Any = with_parameters(model, lambda tensor: tensor.to("meta")).unload()
        again = get_peft_model(base, PeftConfig.from_peft_type(**files.config))
        found = {name for name, module in again.named_modules() if hasattr(module, "lora_A")}
    if found == {f"base_model.model.{layer}" for layer in layers}:
        return files
    return files._replace(config=files.config | {"ensure_weight_tying": False, "target_modules": layers})


def _of_rank(model: PeftModel, saved: SavedAdapter, rank: int | None) -> str:
    if saved.worst_layer is not None:
        return (
            f"Cut to rank {rank} by singular values: the update differs from the trained one by "
            f"{saved.relative_error:.2e} of its Frobenius norm, in the worst layer by {saved.worst_error:.2e}."
        )
    if has_offset(model, active_adapter(model)) or mutates_base(model.peft_config[active_adapter(model)]):
        return "Exact: twice the rank holds what was trained less the start, by its singular values."
    return "Exact: the factors are those that were trained, without ranks that are zero."
