r"""Products with the empirical Fisher matrix, the mean outer product of single gradients."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tangora._checks import InputError, check_choice
from tangora.curvature.operators import CurvatureOperator, Over
from tangora.curvature.sample_losses import label_losses, num_sequences, per_label, per_sequence
from tangora.curvature.sandwich import Recorder, Sandwich, SandwichOperator, loss_with_parts
from tangora.curvature.spaces import Space

Per = Literal["label", "sequence"]

_AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-4}  # causal models sum their loss in float32
_ROUGH_AGREEMENT = 3e-2


class EmpiricalFisher(SandwichOperator):
    r"""The empirical Fisher matrix $\frac1N \sum_i g_i g_i^\top$, with the gradient $g_i$ of each single loss.

    ``per="label"``: $i$ runs over all $N$ labels that count (tokens of a language model, samples of a classifier), and
    $g_i$ is the gradient of one label's loss; the $g_i$ have the gradient of the mean loss as their mean.
    ``per="sequence"``: $i$ runs over the sequences with at least one label, and $g_i$ is the gradient of the mean loss
    over a sequence's labels; every sequence counts alike, however long. The two differ by the correlations within a
    sequence, and agree for a classifier.

    Its labels are the data's, those of the Fisher matrix the model's predictions (`GaussNewton`): they are different
    matrices wherever the model does not fit. It is no approximation of the Hessian; it is the second moment of
    the gradients' noise, uncentred. No eigenvalue is negative.

    The single losses are held, their gradients are not: $J v$ and $J^\top u$ come from backward passes.

    Args:
        loss_fn: ``loss_fn(model, batch)`` -> (loss, losses), the single losses and their mean; batches weigh alike, and
            what is single is the user's choice. Default the model's own loss.
        per: ``label`` or ``sequence``; with ``loss_fn`` only ``label``.

    Raises:
        InputError: If the loss is not the mean over single labels' losses.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        over: Over | Space = "factors",
        loss_fn: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None,
        per: Per = "label",
        layers: Iterable[str] | None = None,
        adapter_name: str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_choice("per", per, ("label", "sequence"))
        if loss_fn is not None and per == "sequence":
            raise InputError(
                'per="sequence" is for a model\'s own loss: let loss_fn return one loss per sequence'
            )
        self.per: Per = per
        super().__init__(
            model,
            batches,
            over=over,
            loss_fn=None if loss_fn is None else Recorder(loss_fn, "losses"),
            layers=layers,
            adapter_name=adapter_name,
            dtype=dtype,
        )

    @property
    def batch_weights(self) -> list[float]:
        """Weight of each (of this rank's) batches in the mean: its number of labels or sequences, or 1."""
        if self.per == "label":
            return super().batch_weights
        return [num_sequences(self.model, batch) for batch in self.batches]

    def per_batch(self) -> Iterator[tuple[float, CurvatureOperator]]:
        """Go through the (this rank's) batches.

        Yields:
            Weight of each batch, and the operator of that batch alone.
        """
        for weight, alone in super().per_batch():
            (batch,) = alone.batches
            yield (weight if self.per == "label" else num_sequences(self.model, batch)), alone

    def _sandwich(self, batch: Any) -> Sandwich:
        weight, loss, parts = loss_with_parts(self, batch)
        if not weight:
            return Sandwich(0.0, parts, torch.zeros_like)
        if self.evaluation.loss_fn is not None:
            losses = parts.reshape(-1)
            _check_mean(losses, loss)
        else:
            table = label_losses(self.model, batch, parts)
            losses = per_label(table)
            _check_mean(losses, loss)
            if self.per == "sequence":
                losses = per_sequence(table)
                weight = float(len(losses))
        return Sandwich(weight, losses, lambda u: u / len(losses))


def _check_mean(losses: Tensor, loss: Tensor) -> None:
    mean, expected = float(losses.detach().double().mean()), float(loss.detach())
    tolerance = _AGREEMENT.get(loss.dtype, _ROUGH_AGREEMENT)
    if not abs(mean - expected) <= tolerance * max(abs(expected), 1e-3):
        raise InputError(
            f"the loss ({expected:.6g}) must be the mean over labels of their single losses ({mean:.6g}): give loss_fn "
            "that returns (loss, losses)"
        )
