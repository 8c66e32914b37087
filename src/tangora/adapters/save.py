r"""Write adapters as plain LoRA that PEFT alone loads on the original base model.

An initialization may need $W_0 - s B_0 A_0$ as its base. The trained model is then $W_0 + s (B A - B_0 A_0)$: an
ordinary adapter of rank $2r$ with $A' = [A; A_0]$ and $B' = [B, -B_0]$, written by its singular values (`resolved`).
That holds for an offset (`attach_offset`), whose layers say so themselves, and for PEFT's PiSSA and its like, which
change the base weight.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from tangora._checks import InputError, check_kind, check_path, check_whole
from tangora.adapters.card import classes_of, is_served_by, model_card, write_config, write_tokenizer
from tangora.adapters.discover import Discovery, discover
from tangora.adapters.folder import check_replaceable, first_rank_writes, replace_folder, scratch_beside
from tangora.adapters.load import CONFIG_FILE
from tangora.adapters.offset import OffsetConfig, has_offset, mutates_base
from tangora.adapters.pair import LoraPair
from tangora.adapters.peft_models import (
    active_adapter,
    bare_model,
    check_gathered,
    named_adapter_parameters,
    unwrapped,
)
from tangora.adapters.saved_factors import (
    WEIGHTS,
    AdapterFiles,
    cut,
    is_factor,
    is_uniform,
    of_plain_base,
    resolved,
    trimmed,
    uncompiled,
    with_initial,
    with_tied_layers,
)
from tangora.adapters.saved_factors import uniform as made_uniform
from tangora.adapters.sharded import is_sharded, whole

_CARD = "README.md"
# what PEFT and this module write; a folder with anything else in it is never replaced
_FILES = {WEIGHTS, CONFIG_FILE, _CARD, "adapter_model.bin"}


@dataclass(frozen=True)
class SavedAdapter(os.PathLike[str]):
    """A saved adapter; it is accepted wherever a path is."""

    path: Path
    """Its folder."""
    rank: int
    """Largest rank of a layer; 0 for an adapter without plain pairs."""
    relative_error: float = 0.0
    """Frobenius norm of the parts that compression cut off, relative to that of all updates."""
    worst_layer: str | None = None
    """Layer that lost the largest share of its own update."""
    worst_error: float = 0.0
    """Share of its own update that this layer lost."""

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)


def initial_factors(model: nn.Module) -> dict[str, Tensor]:
    """Copy the adapter's factors; call it before training if PEFT's initialization changed the base weights.

    Args:
        model: PEFT model as `get_peft_model` returned it, possibly wrapped (DDP, torch.compile).

    Returns:
        Copies of the factors by their saved names, on the CPU; empty where the base is untouched.

    Raises:
        InputError: If not exactly one adapter is active.
    """
    bare = bare_model(model)
    if not mutates_base(bare.peft_config[active_adapter(bare)]):
        return {}
    state = get_peft_model_state_dict(bare, adapter_name=active_adapter(bare), save_embedding_layers=False)
    return {
        uncompiled(name): tensor.detach().cpu().clone() for name, tensor in state.items() if is_factor(name)
    }


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    trim_ranks: bool = True,
    uniform: bool = False,
    initial: dict[str, Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> SavedAdapter:
    r"""Write the active adapter as one plain LoRA adapter.

    ``PeftModel.from_pretrained(original_base, path)`` then gives the logits of ``model``. Everything else that the
    adapter holds (``modules_to_save``, magnitudes, embeddings) is kept. Beside a classifier's adapter stands the
    config of its model, ``base_config/config.json``, with the names of its classes (``id2label``). The folder appears
    whole or not at all. With ``torch.distributed`` running, rank 0 writes, and other ranks that call this wait for it
    and return the same. Sharded factors (FSDP2, tensor parallel) are gathered first: call it on every rank then.

    Args:
        model: PEFT model with one active adapter, possibly wrapped (DDP, torch.compile).
        path: Folder to write; an existing adapter there is replaced.
        rank: Cut every layer's update $s (B A - B_0 A_0)$ to this rank, by its singular values; the result says what
            was lost. DoRA's magnitudes stay, so that there the cut changes the direction only. Default: exact, which
            is twice the rank for an adapter that carries an offset. Servers set a limit (vLLM's ``max_lora_rank``,
            16 by default) that the exact rank may exceed.
        trim_ranks: Leave out ranks that are exactly zero in both factors, as rank-adaptive training leaves them; a
            fresh adapter has none. Each layer gets the rank that was found, at its old scaling, and every update stays
            as it is. A loaded adapter cannot grow those ranks again.
        uniform: Write one rank, one alpha and the scaling alpha / rank for all layers, as readers without patterns
            need it (GGUF, some servers). Every update stays as it is, up to the rounding of the factors: other scalings
            go into $B$, smaller ranks are padded with zeros. Without patterns and rsLoRA nothing changes.
        initial: Result of `initial_factors` before training, for PEFT's initializations that change the base
            weights (PiSSA).
        card: Facts of the training (recipe, seed, data, learning rate, steps, …), for the README.
        tokenizer: Tokenizer or image processor to save beside the adapter, so that the folder serves it.

    Returns:
        The folder, usable as a path, with its rank and the error of the compression.

    Raises:
        InputError: If ``model`` is no PEFT model with one active adapter, is flattened (FSDP1, ZeRO-3) or lies on other
            adapters, if its initialization changed the base weights and ``initial`` is missing or another adapter's, if
            a scaling was changed at run time, if ``rank`` or ``uniform`` is given and a layer is not a plain
            pair, or if
            ``path`` holds anything but an adapter.
    """
    if rank is not None:
        check_whole("rank", rank, low=1)
    target = check_path("path", path)
    check_kind(
        "initial",
        initial,
        (Mapping, type(None)),
        "the return value of initial_factors(model), from before training",
    )
    check_kind("card", card, (Mapping, type(None)), "a dict of facts")

    gathered = _gathered(model)

    def write() -> SavedAdapter:
        bare = bare_model(model)
        return _save(bare, target, rank, trim_ranks, uniform, initial, card or {}, tokenizer, gathered)

    return first_rank_writes(target, write)


def _gathered(model: nn.Module) -> dict[str, Tensor] | None:
    # Of sharded factors, the state to be written: without the base's parts, which would fill the memory. Hooks of the
    # state (offsets) communicate, too, so that all processes ask for it.
    bare = unwrapped(model)
    sharded = [
        name
        for name, factor in (named_adapter_parameters(bare) if isinstance(bare, PeftModel) else ())
        if is_sharded(factor)
    ]
    if not sharded:
        return None
    state = bare.state_dict()
    with torch.no_grad():
        made = dict(zip(sharded, whole([state[name] for name in sharded]), strict=True))
    return _not_sharded(state) | made


def _not_sharded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not is_sharded(value)}


def _save(
    model: PeftModel,
    path: Path,
    rank: int | None,
    trim_ranks: bool,
    uniform: bool,
    initial: dict[str, Tensor] | None,
    card: Mapping[str, Any],
    tokenizer: Any,
    gathered: dict[str, Tensor] | None,
) -> SavedAdapter:
    found = _check_model(model, initial)
    check_gathered(model, "save_adapter", adapters_only=True, gathered=gathered or ())
    if rank is not None:
        _check_plain(found, "rank", rank)
        if not found.pairs:
            kind = str(getattr(model.peft_config[active_adapter(model)].peft_type, "value", "other"))
            raise InputError(
                f"rank must be omitted, because this adapter ({kind}) has no LoRA pair; got {rank}"
            )
    target = path.resolve()
    classifier = classes_of(model) is not None
    check_replaceable(
        target,
        what="adapter",
        marker=CONFIG_FILE,
        known=lambda name: name in _FILES or is_served_by(name, classifier=classifier, tokenizer=tokenizer),
    )
    with scratch_beside(target) as scratch:
        front = _write(model, scratch, gathered)
        written = scratch if active_adapter(model) == "default" else scratch / active_adapter(model)
        files, scalings = AdapterFiles.read(written), _scalings(model)
        final = of_plain_base(files)
        if initial:
            final = with_initial(final, initial)
        if initial or has_offset(model, active_adapter(model)):  # then every adapted layer is a plain pair
            final = resolved(final)
        if trim_ranks and not found.skipped:
            final = trimmed(final, scalings)
        final, saved = _cut(final, scalings if found.pairs else {}, rank, path)
        if uniform and not is_uniform(final.config):
            _check_plain(found, "uniform", uniform)
            final = made_uniform(final, scalings)
        final = with_tied_layers(final, model.peft_config[active_adapter(model)])
        if final.tensors is not files.tensors or final.config != files.config:
            final.write(written)
        (written / _CARD).write_text(
            _card(model, front, final, _of_rank(model, saved, rank), card), encoding="utf-8"
        )
        if classifier:
            write_config(model, written)
        if tokenizer is not None:
            write_tokenizer(tokenizer, written)
        replace_folder(written, target)
    return saved


def _card(
    model: PeftModel, front: dict[str, Any], files: AdapterFiles, about_rank: str, facts: Mapping[str, Any]
) -> str:
    base = model.get_base_model()
    return model_card(
        front,
        files.config,
        about_rank,
        facts,
        classes_of(model),
        images=getattr(base, "main_input_name", "") == "pixel_values",
        prompted=hasattr(getattr(base, "config", None), "class_words"),
        architecture=type(unwrapped(base)).__name__,
    )


def _check_model(model: PeftModel, initial: dict[str, Tensor] | None) -> Discovery:
    _check_start(model, initial)
    if not any(hasattr(module, "lora_A") for module in model.modules()):
        return Discovery([], {})
    name = active_adapter(model)
    if isinstance(model.peft_config[name], OffsetConfig) and not has_offset(model, name):
        raise InputError(
            f"adapter {name!r} was created from the config of an adapter with an initial product; use a "
            "separate LoraConfig"
        )
    found = discover(model, name)
    for pair in found.pairs:
        _check_scaling(pair)
    return found


def _check_plain(found: Discovery, option: str, value: Any) -> None:
    for name, reason in found.skipped.items():
        raise InputError(
            f"{option} must be omitted, because {name} is not a plain pair (A, B): {reason}; got {value}"
        )


def _check_start(model: PeftModel, initial: dict[str, Tensor] | None) -> None:
    config = model.peft_config[active_adapter(model)]
    start = getattr(config, "init_lora_weights", None)
    if not mutates_base(config):
        if initial:
            raise InputError(
                f"initial must be empty, because the initialization {start!r} did not change the base weights"
            )
        return
    if not initial:
        raise InputError(
            f"the initialization {start!r} changed the base weights: pass "
            "initial=initial_factors(model), computed before training, so that the adapter loads on "
            "the original base"
        )
    if getattr(config, "target_parameters", None):
        raise InputError(
            f"the initialization {start!r} cannot be saved together with target_parameters: their "
            "factors contain several matrices; train them in a separate adapter"
        )


def _check_scaling(pair: LoraPair) -> None:
    layer: Any = pair.layer
    rank, alpha = layer.r[pair.adapter], layer.lora_alpha[pair.adapter]
    expected = alpha / (math.sqrt(rank) if layer.use_rslora.get(pair.adapter) else rank)
    if not math.isclose(pair.scaling, expected, rel_tol=1e-9):
        raise InputError(
            f"the scaling of {pair.name} must be {expected:g}, as given by its rank and alpha, because "
            f"an adapter file cannot store another scaling; got {pair.scaling:g}: undo set_scale or "
            "scale_layer first"
        )


def _write(model: PeftModel, folder: Path, gathered: dict[str, Tensor] | None) -> dict[str, Any]:
    # Returns the front matter of PEFT's card. What is left out are sharded weights of the base, which PEFT would have
    # all processes gather.
    state = _not_sharded(model.state_dict()) if gathered is None else gathered
    model.save_pretrained(str(folder), selected_adapters=[active_adapter(model)], state_dict=state)
    card = folder / _CARD  # other adapters than "default" get a folder of their own; the card stays outside
    return ModelCard.load(card).data.to_dict() if card.exists() else {}


def _scalings(model: PeftModel) -> dict[str, float]:
    # tied layers are one pair, but saved each under its own name
    name = active_adapter(model)
    held = ((key, getattr(module, "scaling", None)) for key, module in model.named_modules())
    return {
        uncompiled(key): float(scaling[name])
        for key, scaling in held
        if isinstance(scaling, dict) and name in scaling
    }


def _cut(
    files: AdapterFiles, scalings: dict[str, float], rank: int | None, path: Path
) -> tuple[AdapterFiles, SavedAdapter]:
    largest = max(files.ranks().values()) if scalings else 0
    if rank is None or rank >= largest:
        return files, SavedAdapter(path, largest)
    files, loss = cut(files, rank, scalings)
    worst = max(loss.errors, key=loss.errors.__getitem__)
    return files, SavedAdapter(
        path, max(files.ranks().values()), loss.relative_error, worst, loss.errors[worst]
    )


def _of_rank(model: PeftModel, saved: SavedAdapter, rank: int | None) -> str:
    if saved.worst_layer is not None:
        return (
            f"Truncated to rank {rank} by singular values: the update differs from the trained one by "
            f"{saved.relative_error:.2e} of its Frobenius norm, in the worst layer by {saved.worst_error:.2e}."
        )
    if has_offset(model, active_adapter(model)) or mutates_base(model.peft_config[active_adapter(model)]):
        return (
            "Exact: the trained product minus the initial one, by singular values, at twice the rank. "
            f"A server must allow rank {saved.rank} (vLLM: max_lora_rank); save_adapter(rank=...) "
            "writes a smaller rank."
        )
    return "Exact: the trained factors, without zero ranks."
