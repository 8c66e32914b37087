"""The starts whose view of the gradient is compared, as pure factors; no model is changed."""

import math

import torch
from torch import Tensor, nn

from tangora._types import FactorA, FactorB
from tangora.adapters import module_weight
from tangora.diagnostics.sites import Site
from tangora.geometry.sketch import LowRankSVD
from tangora.init import lora_ga, lora_one, orthogonal, pissa
from tangora.probes.stillness import preserved_randomness

GRADIENT_STARTS = ("lora-ga", "lora-one")
"""Those that are made from the gradient, and fit the examples it was read on."""

# above this smaller side the weight's principal directions come from randomized iteration
_EXACT_SIDE = 256
_PISSA_ITERATIONS = 16  # as PEFT users take it, "pissa_niter_16"


def start_factors(start: str, site: Site, gradient: LowRankSVD, seed: int) -> tuple[FactorA, FactorB] | None:
    """Make the factors of a start, up to their size, which does not matter to what they capture."""
    m, n, r = site.layer.m, site.layer.n, site.rank
    generator = torch.Generator().manual_seed(seed)
    match start:
        case "lora":
            return _lora(site, generator)
        case "orthogonal":
            return orthogonal(m, n, r, generator=generator)
        case "pissa":
            return _pissa(site, seed)
        case _ if not gradient.S[0] > 0:
            return None
        case "lora-ga":
            return lora_ga(gradient, r, 1.0)
        case _:
            return lora_one(gradient, r)


def _lora(site: Site, generator: torch.Generator) -> tuple[FactorA, FactorB]:
    A, B = torch.zeros(site.rank, site.layer.n), torch.zeros(site.layer.m, site.rank)
    if isinstance(site.layer.base, nn.Embedding):  # PEFT starts embeddings the other way round
        return A, torch.randn(B.shape, generator=generator)
    return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator), B


def _pissa(site: Site, seed: int) -> tuple[FactorA, FactorB]:
    weight: Tensor = module_weight(site.layer.base)
    if min(weight.shape) <= _EXACT_SIDE:
        return pissa(weight, site.rank, 1.0)
    with preserved_randomness():
        torch.manual_seed(seed)
        return pissa(weight, site.rank, 1.0, niter=_PISSA_ITERATIONS)
