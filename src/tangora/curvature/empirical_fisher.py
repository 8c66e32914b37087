r"""Products with the empirical Fisher matrix, the mean outer product of single gradients."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tangora._checks import InputError, check_choice
from tangora.curvature.displaced_loss import DisplacedLoss
from tangora.curvature.gauss_newton import Recorder, Sandwich, SandwichOperator, loss_with_parts
from tangora.curvature.operators import HessianArguments
from tangora.probes.losses import IGNORED, predicts_next_token

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
        model: See `tangora.curvature.Hessian`, as for everything not listed here.
        batches: As there.
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
        loss_fn: Callable[[Any, Any], tuple[Tensor, Tensor]] | None = None,
        per: Per = "label",
        **options: Unpack[HessianArguments],
    ):
        check_choice("per", per, ("label", "sequence"))
        if loss_fn is not None and per == "sequence":
            raise InputError(
                'per="sequence" is for a model\'s own loss: let loss_fn return one loss per sequence'
            )
        self.per: Per = per
        recorder = None if loss_fn is None else Recorder(loss_fn, "losses")
        super().__init__(DisplacedLoss.of(model, batches, loss_fn=recorder, **options))

    def _weight(self, batch: Any) -> float:
        return super()._weight(batch) if self.per == "label" else _num_sequences(self.model, batch)

    def _sandwich(self, batch: Any) -> Sandwich:
        weight, loss, parts = loss_with_parts(self.evaluation, batch)
        if not weight:
            return Sandwich(0.0, parts, torch.zeros_like)
        if self.evaluation.loss_fn is not None:
            losses = parts.reshape(-1)
            _check_mean(losses, loss)
        else:
            table = _label_losses(self.model, batch, parts)
            counted = ~table.isnan()
            losses = table[counted]
            _check_mean(losses, loss)
            if self.per == "sequence":
                rows = counted.any(1)
                losses = table.where(counted, 0.0).sum(1)[rows] / counted.sum(1)[rows]
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


def _label_losses(
    model: nn.Module, batch: Mapping[str, Any], logits: Tensor
) -> Float[Tensor, "sequences labels"]:
    """Return the loss of every label of a batch as ``transformers`` computes it, NaN where no label counts.

    Cross-entropy for whole-number labels; squared error or binary cross-entropy, averaged over a sample's outputs, for
    others.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise InputError("batches must have labels, or give loss_fn that returns (loss, losses)")
    labels = labels.to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        problem = getattr(getattr(model, "config", None), "problem_type", None)
        several = problem == "multi_label_classification"
        errors = F.binary_cross_entropy_with_logits if several else F.mse_loss
        each = errors(logits.view_as(labels), labels, reduction="none")
        return each.reshape(len(labels), -1).mean(1, keepdim=True)
    if labels.dim() > 1 and predicts_next_token(model):
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    losses = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return losses.where(labels.reshape(-1) != IGNORED, torch.nan).reshape(len(labels), -1)


def _num_sequences(model: nn.Module, batch: Mapping[str, Any]) -> float:
    # those with at least one label
    labels = batch["labels"]
    if labels.is_floating_point():
        return float(len(labels))
    if labels.dim() > 1 and predicts_next_token(model):
        labels = labels[..., 1:]
    return float((labels.reshape(len(labels), -1) != IGNORED).any(1).sum())
