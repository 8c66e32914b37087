"""Where a run of a comparison ended: how flat the loss is there, and how far the test loss lies above it."""

import time
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from tangora._checks import InputError
from tangora.curvature import Eigenpairs, Hessian
from tangora.curvature.adapted import chosen
from tangora.experiments.run.batches import encoded, encoded_batches
from tangora.experiments.run.trajectory import target_layers
from tangora.experiments.settings import RunSettings
from tangora.report.run_records import Flatness, SpaceFlatness
from tangora.training.data import Task
from tangora.training.metrics import evaluate
from tangora.training.models import LoadedModel

NUM_EXAMPLES = 32
RADIUS = 0.05
"""Of the ball, the radius that Foret et al. (2021, arXiv:2010.01412) use."""

_TOLERANCE = 1e-2
_TOP_PRODUCTS, _TRACE_PRODUCTS = 20, 12
_ASCENT, _KRYLOV = 3, 4


def measure_flatness(
    settings: RunSettings,
    task: Task,
    loaded: LoadedModel,
    model: nn.Module,
    test_loss: float,
) -> Flatness:
    """Measure the end point of a run.

    The examples are the first of the task, so that all methods and seeds are measured on the same.
    """
    began = time.perf_counter()
    examples = task.train[: settings.curvature_examples or NUM_EXAMPLES]
    seen = encoded(task.train[: len(task.test)], loaded, settings)
    train = evaluate(model, *seen, kind=task.kind, batch_size=2 * settings.batch_size)
    values: dict[str, Any] = {
        "train_loss": train["loss"],
        "test_loss": test_loss,
        "num_examples": len(examples),
        "spaces": {},
        "products": 0,
    }
    try:
        values |= _curvature(settings, task, loaded, model, encoded_batches(examples, loaded, settings))
    except InputError as problem:  # a method without second derivatives must not end the comparison
        values["missing"] = f"{settings.recipe}: {problem}"
    return Flatness(**values, seconds=time.perf_counter() - began)


def _curvature(
    settings: RunSettings, task: Task, loaded: LoadedModel, model: nn.Module, batches: list[dict[str, Tensor]]
) -> dict[str, Any]:
    adapted = isinstance(model, PeftModel)
    layers = settings.curvature_layers
    if not adapted:  # looked at in the layers that an adapter would have
        layers = chosen(target_layers(loaded, task, settings), layers)
    weights = Hessian(model, batches, over="weights", layers=layers, cache_graph=True)
    found, pairs = _space(weights)
    ball = weights.sharpness(RADIUS, steps=_ASCENT, random_starts=0, krylov=_KRYLOV, pairs=pairs)
    weights.release()
    spaces = {"weights": found}
    for space in ("tangent", "factors") if adapted else ():
        spaces[space], _ = _space(Hessian(model, batches, over=space, cache_graph=True))
    return {
        "spaces": spaces,
        "weight_layers": settings.curvature_layers,
        "radius": RADIUS,
        "rise": ball.rise,
        "products": sum(found.products for found in spaces.values()) + ball.products,
    }


def _space(operator: Hessian) -> tuple[SpaceFlatness, Eigenpairs]:
    pairs = operator.top_eigenpairs(1, tol=_TOLERANCE, max_products=_TOP_PRODUCTS)
    trace = operator.trace(products=_TRACE_PRODUCTS)
    flatness = SpaceFlatness(
        size=operator.size,
        largest=float(pairs.values[0]),
        residual=float(pairs.residuals[0]),
        trace=trace.value,
        trace_error=trace.standard_error,
        products=operator.num_products,
    )
    return flatness, pairs
