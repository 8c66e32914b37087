"""The functional AdamW that stands behind everything that is no pair."""

import pytest
import torch

from tangora.optim.adamw import adamw_update, step_counters

GROUP = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def strided(tensor):
    """The same numbers, laid out column by column."""
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("which", ["none", "tensor", "gradient", "moment", "all"])
def test_memory_layout_does_not_matter(which):
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 6), [torch.randn(4, 6) for _ in range(3)]
    wanted = torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([wanted], foreach=False, fused=False, **GROUP)
    layout = {
        name: strided if which in {name, "all"} else torch.clone for name in ("tensor", "gradient", "moment")
    }
    tensor = layout["tensor"](start)
    moments = [layout["moment"](torch.zeros(4, 6)) for _ in range(2)]
    for step, gradient in enumerate(gradients, start=1):
        wanted.grad = gradient.clone()
        reference.step()
        given = [layout["gradient"](gradient)]
        adamw_update([tensor], given, moments[:1], moments[1:], step_counters([tensor], step), GROUP)
    torch.testing.assert_close(tensor, wanted.detach())
