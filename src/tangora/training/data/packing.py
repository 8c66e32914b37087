"""Micro-batches without padding: their examples in one row, which a model must not mix."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from tangora._checks import InputError
from tangora.training.data.encoding import IGNORED, Collator, Encoding

_FEW = 32
_LEAK = 1e-3
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-9}
_HALF = 0.1


def packing_collator() -> Collator:
    """Return what writes encodings one after another into one row, and lets the positions of each begin at 0.

    From these positions transformers reads which tokens attend to each other, if there is no cache and no other mask.
    """
    flatten = DataCollatorWithFlattening(separator_id=IGNORED)

    def collate(encodings: Sequence[Encoding]) -> Mapping[str, Any]:
        return flatten(encodings) | {"use_cache": False}

    return collate


def check_packing(model: nn.Module, encodings: Sequence[Encoding], name: str) -> None:
    """Raise unless a model computes of an example in a packed batch what it computes of it alone."""
    own, other = ({"input_ids": each["input_ids"][:_FEW]} for each in (encodings[0], encodings[-1]))
    vocabulary: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    changed = {"input_ids": [(token + 1) % vocabulary.num_embeddings for token in other["input_ids"]]}
    try:
        alone, packed, beside_another = (_last(model, rows) for rows in ([own], [other, own], [changed, own]))
    except (TypeError, ValueError) as error:  # it takes no positions
        raise _refused(model, name) from error
    scale = alone.abs().max()
    rounding = _ROUNDING.get(next(model.parameters()).dtype, _HALF)
    # rounding depends on the length of a row, but not on what else stands in it
    if not (
        (packed - beside_another).abs().max() <= _LEAK * scale
        and (packed - alone).abs().max() <= rounding * scale
    ):
        raise _refused(model, name)


def _last(model: nn.Module, encodings: Sequence[Encoding]) -> Float[Tensor, "t v"]:
    """Return the logits of the last one of some packed examples."""
    batch = dict(packing_collator()(encodings))
    del batch["labels"]
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return model(**moved).logits[0, -len(encodings[-1]["input_ids"]) :].float()


def _refused(model: nn.Module, name: str) -> InputError:
    return InputError(
        f"packing cannot be used with model {name!r}: {type(model).__name__} mixes the examples of a packed batch; "
        "leave it out"
    )
