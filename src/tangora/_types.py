"""Names for the tensors and values that travel through the whole library.

Shape letters: ``m`` out features, ``n`` in features, ``r`` rank. ``*b`` stands for any number of leading batch
dimensions; layers of equal shape are stacked along them. The annotations are checked in the second test pass.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

FactorA: TypeAlias = Float[Tensor, "*b r n"]
"""The LoRA factor A, or anything of its shape: rows span the row space of the update."""

FactorB: TypeAlias = Float[Tensor, "*b m r"]
"""The LoRA factor B, or anything of its shape: columns span the column space of the update."""

Core: TypeAlias = Float[Tensor, "*b r r"]
"""A small square matrix: Gram matrices, gauges, changes of basis."""

Weight: TypeAlias = Float[Tensor, "*b m n"]
"""A matrix of the size of the adapted weight, ``out_features x in_features``."""

LossFn: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss_fn(model, batch)`` -> scalar loss."""

Progress: TypeAlias = Callable[[str, int, int], object]
"""``progress(what, done, total)``, called as work goes on: a few words, units done, all units (0: unknown)."""
