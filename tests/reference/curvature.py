r"""Naive dense float64 curvature of a model with LoRA: every Hessian, Jacobian and projector formed.

By ``torch.func``, reverse over reverse (reverse over forward is wrong through LayerNorm in torch 2.13), attention
"eager". Two flat orders: factors, ``A`` then ``B`` of each pair; weights, the ``m x n`` matrix of each pair by rows.
Batches are averaged with the number of their labels, or equally with a loss of one's own.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tangora.adapters.discover import discover
from tests.reference.dense import projectors, truncated_svd


class _Call(nn.Module):
    """A function of a model as a module, so that ``functional_call`` reaches the model inside."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.model, batch)


class DenseCurvature:
    """The curvature of the mean loss over all batches at the model's factors."""

    def __init__(
        self, model: nn.Module, batches: list[Any], loss_fn: Callable[[Any, Any], Tensor] | None = None
    ):
        self.model = copy.deepcopy(model).eval()
        inner: Any = self.model.get_base_model()  # pyright: ignore
        if hasattr(inner, "set_attn_implementation"):
            inner.set_attn_implementation("eager")
        self.pairs = discover(self.model).pairs
        self.batches = batches
        self.loss_fn = loss_fn or _own_loss
        counts = [1.0 if loss_fn else _count_labels(inner, batch) for batch in batches]
        self.shares = [count / sum(counts) for count in counts]
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}

    @cached_property
    def factors(self) -> Tensor:
        """The flat factors at which everything is taken."""
        return torch.cat([f.detach().flatten() for pair in self.pairs for f in (pair.A, pair.B)])

    @cached_property
    def weights(self) -> Tensor:
        """The flat displacement of the weights: zeros."""
        return self.factors.new_zeros(sum(m * n for m, n, _ in self.shapes))

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        return [pair.shape for pair in self.pairs]

    def factor_slices(self) -> dict[str, tuple[slice, slice]]:
        """Where A and B of each layer lie in the flat factors."""
        slices, start = {}, 0
        for pair in self.pairs:
            middle, end = start + pair.A.numel(), start + pair.A.numel() + pair.B.numel()
            slices[pair.name] = slice(start, middle), slice(middle, end)
            start = end
        return slices

    def weight_slices(self) -> dict[str, slice]:
        """Where the matrix of each layer lies in the flat weights."""
        slices, start = {}, 0
        for pair, (m, n, _) in zip(self.pairs, self.shapes, strict=True):
            slices[pair.name] = slice(start, start := start + m * n)
        return slices

    # functions of flat vectors

    def at_factors(self, function: Callable[[nn.Module, Any], Tensor], batch: Any, flat: Tensor) -> Tensor:
        """A function of the model with these factors."""
        overrides = {}
        for pair, (where_A, where_B) in zip(self.pairs, self.factor_slices().values(), strict=True):
            overrides[self._name(pair.A)] = flat[where_A].view(pair.A.shape)
            overrides[self._name(pair.B)] = flat[where_B].view(pair.B.shape)
        return functional_call(_Call(self.model, function), overrides, (batch,))

    def at_weights(self, function: Callable[[nn.Module, Any], Tensor], batch: Any, flat: Tensor) -> Tensor:
        """A function of the model whose weights are displaced by these, beside the factors as they are."""
        overrides = {}
        for pair, (m, n, _), where in zip(
            self.pairs, self.shapes, self.weight_slices().values(), strict=True
        ):
            base: Any = pair.layer.get_base_layer()  # pyright: ignore
            change = flat[where].view(m, n)
            change = (change.T if pair.transposed else change).reshape(base.weight.shape)
            overrides[self._name(base.weight)] = base.weight.detach() + change
        return functional_call(_Call(self.model, function), overrides, (batch,))

    def loss(self, over: str, flat: Tensor) -> Tensor:
        """The mean loss over all batches at flat factors or weights."""
        at = self._at(over)
        losses = [at(self.loss_fn, batch, flat) for batch in self.batches]
        return sum(
            (share * loss for share, loss in zip(self.shares, losses, strict=True)),
            start=losses[0].new_zeros(()),
        )

    # Hessians and gradients

    @cached_property
    def factor_gradient(self) -> Tensor:
        return jacrev(lambda flat: self.loss("factors", flat))(self.factors).detach()

    @cached_property
    def weight_gradient(self) -> Tensor:
        return jacrev(lambda flat: self.loss("weights", flat))(self.weights).detach()

    @cached_property
    def G(self) -> list[Tensor]:
        """The gradient of each weight, m x n."""
        return self._matrices(self.weight_gradient)

    @cached_property
    def factor_hessian(self) -> Tensor:
        return jacrev(jacrev(lambda flat: self.loss("factors", flat)))(self.factors).detach()

    @cached_property
    def weight_hessian(self) -> Tensor:
        return jacrev(jacrev(lambda flat: self.loss("weights", flat)))(self.weights).detach()

    @cached_property
    def jacobian(self) -> Tensor:
        """J of (A, B) -> W, weights x factors, by automatic differentiation of s B A."""

        def products(flat: Tensor) -> Tensor:
            rows = []
            for pair, (where_A, where_B) in zip(self.pairs, self.factor_slices().values(), strict=True):
                m, n, r = pair.shape
                rows.append((pair.scaling * flat[where_B].view(m, r) @ flat[where_A].view(r, n)).flatten())
            return torch.cat(rows)

        return jacrev(products)(self.factors).detach()

    @cached_property
    def coupling(self) -> Tensor:
        """Γ, the matrix of the form 2 s <G, dB dA>, entry by entry: d²/dB_ia dA_aj = s G_ij."""
        result = self.factors.new_zeros(len(self.factors), len(self.factors))
        for pair, G, (where_A, where_B) in zip(
            self.pairs, self.G, self.factor_slices().values(), strict=True
        ):
            m, n, r = pair.shape
            block = torch.einsum("ij,ab->iabj", pair.scaling * G, torch.eye(r, dtype=G.dtype)).reshape(
                m * r, r * n
            )
            result[where_B, where_A] = block
            result[where_A, where_B] = block.T
        return result

    # the tangent space

    @cached_property
    def projector(self) -> Tensor:
        """P_T on the flat weights, block-diagonal."""
        blocks = []
        for pair in self.pairs:
            A, B = pair.factors()
            P_A, P_B = projectors(A, B)
            eye_m, eye_n = torch.eye(len(P_B), dtype=A.dtype), torch.eye(len(P_A), dtype=A.dtype)
            # by rows: vec(X Z Y) = (X kron Y^T) vec(Z)
            blocks.append(torch.kron(P_B, eye_n) + torch.kron(eye_m, P_A) - torch.kron(P_B, P_A))
        return torch.block_diag(*blocks)

    @property
    def tangent_hessian(self) -> Tensor:
        """P_T H_W P_T on the flat weights."""
        return self.projector @ self.weight_hessian @ self.projector

    @cached_property
    def riemannian_hessian(self) -> Tensor:
        r"""P_T H_W P_T + the curvature term on the flat weights.

        The form xi -> 2 <G, U_p S^-1 V_p^T> with U_p = (I - P_B) xi V and V_p = (I - P_A) xi^T U is
        2 <G, (I - P_B) xi Y^+ xi (I - P_A)> for Y = s B A, whatever its bases.
        """
        blocks = []
        for pair, G in zip(self.pairs, self.G, strict=True):
            A, B = pair.factors()
            P_A, P_B = projectors(A, B)
            Q_A, Q_B = torch.eye(len(P_A), dtype=A.dtype) - P_A, torch.eye(len(P_B), dtype=A.dtype) - P_B
            pseudo = torch.linalg.pinv(pair.delta_weight(), rtol=1e-11)
            m, n, _ = pair.shape
            # <Q_B G Q_A, xi Y^+ xi>: d/dxi_ij d/dxi_kl = N_il Y^+_jk, made symmetric
            form = torch.einsum("il,jk->ijkl", Q_B @ G @ Q_A, pseudo).reshape(m * n, m * n)
            blocks.append(form + form.T)
        curvature = torch.block_diag(*blocks)
        return self.tangent_hessian + self.projector @ curvature @ self.projector

    def along_retraction(self, xi: Tensor, t: float) -> float:
        """The loss at the rank-r matrices nearest to Y + t xi, Y = s B A of each pair."""
        moved = []
        for pair, matrix in zip(self.pairs, self._matrices(xi), strict=True):
            Y = pair.delta_weight()
            moved.append((truncated_svd(Y + t * matrix, pair.shape[2]) - Y).flatten())
        return float(self.loss("weights", torch.cat(moved)).detach())

    def retraction_second_derivative(self, xi: Tensor, h: float = 1e-2) -> float:
        """d²/dt² of the loss along the metric projection at t = 0, which is <xi, Hess xi> of the manifold.

        The projection agrees with the geodesic to second order. Central differences of eighth order.
        """
        stencil = {0: -205 / 72, 1: 8 / 5, 2: -1 / 5, 3: 8 / 315, 4: -1 / 560}
        total = stencil[0] * self.along_retraction(xi, 0.0)
        for step in range(1, 5):
            both = self.along_retraction(xi, step * h) + self.along_retraction(xi, -step * h)
            total += stencil[step] * both
        return total / h**2

    # Gauss-Newton and Fisher

    def gauss_newton(
        self,
        over: str,
        outputs_of: Callable[[nn.Module, Any], Tensor],
        loss_of_outputs: Callable[[Tensor, Any], Tensor],
    ) -> Tensor:
        """Σ_b share_b J_b^T H_b J_b with the Jacobian of the outputs and the loss's Hessian in them."""
        at, point = self._at(over), self._point(over)
        total = point.new_zeros(len(point), len(point))
        for share, batch in zip(self.shares, self.batches, strict=True):
            outputs = at(outputs_of, batch, point).detach()
            J = jacrev(lambda flat, batch=batch: at(outputs_of, batch, flat).flatten())(point).detach()

            def loss(flat: Tensor, batch: Any = batch, shape: torch.Size = outputs.shape) -> Tensor:
                return loss_of_outputs(flat.view(shape), batch)

            total += share * J.T @ jacrev(jacrev(loss))(outputs.flatten()).detach() @ J
        return total

    def fisher(self, over: str, label_logits: Callable[[nn.Module, Any], Tensor]) -> Tensor:
        """The Fisher matrix of softmax labels: Σ_c p_c g_c g_c^T with g_c the gradient of log p_c, mean over labels.

        ``label_logits`` gives the logits of a batch's counted labels, labels x classes. No sampling.
        """
        at, point = self._at(over), self._point(over)
        total = point.new_zeros(len(point), len(point))
        for share, batch in zip(self.shares, self.batches, strict=True):

            def log_probabilities(flat: Tensor, batch: Any = batch) -> Tensor:
                return at(label_logits, batch, flat).log_softmax(-1)

            p = log_probabilities(point).detach().exp()
            g = jacrev(log_probabilities)(point).detach()  # labels x classes x coordinates
            total += share / len(p) * torch.einsum("ic,icd,ice->de", p, g, g)
        return total

    def empirical_fisher(self, over: str, losses_of: Callable[[nn.Module, Any], Tensor]) -> Tensor:
        """Σ_b share_b (1/N_b) Σ_i g_i g_i^T with the gradient of each of the N_b losses that ``losses_of`` gives."""
        at, point = self._at(over), self._point(over)
        total = point.new_zeros(len(point), len(point))
        for share, batch in zip(self.shares, self.batches, strict=True):
            g = jacrev(lambda flat, batch=batch: at(losses_of, batch, flat))(point).detach()
            total += share / len(g) * g.T @ g
        return total

    def _at(self, over: str) -> Callable[[Callable[[nn.Module, Any], Tensor], Any, Tensor], Tensor]:
        return {"factors": self.at_factors, "weights": self.at_weights}[over]

    def _point(self, over: str) -> Tensor:
        return {"factors": self.factors, "weights": self.weights}[over]

    def _matrices(self, flat: Tensor) -> list[Tensor]:
        return [
            flat[where].view(m, n)
            for (m, n, _), where in zip(self.shapes, self.weight_slices().values(), strict=True)
        ]

    def _name(self, parameter: Tensor) -> str:
        return f"model.{self._names[id(parameter)]}"


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def _count_labels(model: nn.Module, batch: Any) -> float:
    labels = batch["labels"]
    if labels.dim() > 1:  # a causal model: the first token is not predicted
        labels = labels[:, 1:]
    return float((labels != -100).sum())
