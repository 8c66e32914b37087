r"""ODELoRA: LoRA training as the gradient flow of full fine-tuning on the rank-r matrices, integrated in time.

The flow $\dot W = -P_T(g)$ moves the factors so that $B^\top B - A A^\top$ stays as it is; an optimizer step is one
step of an ODE solver, whose stages each evaluate the gradient of the same batch. Derivation:
``docs/theory/ode_lora.md``.

Source: Gao & Tan (2026), ODELoRA: Training Low-Rank Adaptation by Solving Ordinary Differential Equations,
arXiv:2602.07479. Only its abstract could be had: the gauge, the initialization, the guard and everything but Euler and
Runge-Kutta in the factors are this project's.
"""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from tangora._checks import InputError, check_choice, check_number, check_whole
from tangora._types import FactorA, FactorB
from tangora.adapters import LoraPair
from tangora.geometry.gauge import GAUGES, Gauge
from tangora.geometry.precision import full_precision
from tangora.geometry.retraction import Factors, rebalance
from tangora.optim.base import CommonOptions, PairOptimizer
from tangora.optim.gathering import Gathered
from tangora.optim.groups import Params
from tangora.optim.ode_steps import ONE_GRADIENT, SCHEMES, Descent, Scheme, descent, ode_step
from tangora.optim.stack import Loaded


class ODELoRA(PairOptimizer):
    r"""Gradient flow on the rank-r matrices, one step of an ODE solver at a time.

    Without moments: a step of size ``lr`` moves $W$ by $-\mathtt{lr}\, P_T(g)$ to first order whatever alpha is, so the
    learning rate is that of **full fine-tuning by plain gradient descent**. Schemes with several stages evaluate the
    gradient several times on the same batch, and so need a closure, as ``torch.optim.LBFGS`` does. Parameters outside
    pairs take one step of AdamW with the first stage's gradient. Gradients are left as that first evaluation gave them.

    The velocities of the factors grow like $1/\sigma_r(BA)$. While a step is larger than the smallest singular value
    (always at PEFT's $B = 0$), all stages are taken in $W$ and retracted to rank r instead: the same flow at the same
    order, with balanced factors, and for ``euler`` exactly ``bug``.

    Meant for PEFT's own initialization, $B = 0$, which needs no singular values to begin with.

    ==================== ========= ===== ==========================================================================
    scheme               gradients order step
    ==================== ========= ===== ==========================================================================
    euler                1         1     in the factors
    heun, midpoint       2         2     in the factors
    bogacki_shampine     3         3     in the factors
    rk4                  4         4     in the factors
    implicit_midpoint    several   2     in the factors; keeps $B^\top B - A A^\top$ to rounding
    projected_rk2, _rk4  2, 4      2, 4  stages retracted to rank r by SVD; no trouble with small singular values
    ksl                  3         1     projector splitting: column space, core, row space; likewise
    bug                  1         1     $\mathrm{SVD}_r(Y - h P_T g)$; likewise; finds ranks with ``tolerance``
    ==================== ========= ===== ==========================================================================

    Args:
        lr: Learning rate: step in units of full fine-tuning's.
        scheme: How the flow is integrated, one for all groups.
        gauge: How the factors share a step, for the schemes in the factors; ``lyapunov`` and ``sylvester`` keep the
            balance.
        balance_start: Whether to balance the factors, $B^\top B = A A^\top$ at unchanged $B A$, before the first step.
        rebalance_every: Steps between exact rebalancings; ``None``: never, the drift is of the scheme's order.
        tolerance: For ``bug``: share of the Frobenius norm of each update that a step may cut off to lower its rank,
            in [0, 1). Ranks that are cut are zero in both factors, may come back, and are left out by
            ``tangora.save_adapter``.
        guard: Largest step, in units of the smallest singular value of $s B A$, that is taken in the factors; 0 takes
            all of them there.
        adamw_lr: AdamW's learning rate for the parameters outside pairs of a model, such as a new head: steps of
            descent are often a hundred times larger than what AdamW stands. Default ``lr``.
        **common: ``betas``, ``eps``, ``weight_decay``, ``maximize``, ``foreach`` and ``on_nonfinite``, see
            `tangora.optim.PairOptimizer`; the decay is that of $B A$, and a step that fails in any of its stages
            leaves the parameters as they were.

    Attributes:
        replay: Evaluates loss and gradients again when `step` gets no closure; set by `tangora.Trainer`.

    Examples:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from tangora import ODELoRA
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        >>> optimizer, inputs = ODELoRA(model, lr=0.1, scheme="heun"), torch.randn(5, 4)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(inputs).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
        >>> optimizer.evaluations
        2
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        *,
        scheme: Scheme = "rk4",
        gauge: Gauge = "lyapunov",
        balance_start: bool = True,
        rebalance_every: int | None = None,
        tolerance: float = 0.0,
        guard: float = 1.0,
        adamw_lr: float | None = None,
        **common: Unpack[CommonOptions],
    ):
        check_choice("scheme", scheme, SCHEMES)
        if common.get("shard_state"):
            raise InputError("shard_state must be False for ODELoRA, which has no state to shard")
        self.scheme: Scheme = scheme
        self.replay: Callable[[], Any] | None = None
        own = {
            "gauge": gauge,
            "balance_start": balance_start,
            "rebalance_every": rebalance_every,
            "tolerance": tolerance,
            "guard": guard,
            "evaluations": 0,
        }
        super().__init__(params, lr, own, adamw_lr, **common)

    @property
    def evaluations(self) -> int:
        """Gradient evaluations so far, failed steps included; kept in the state dictionary."""
        return self.param_groups[0]["evaluations"]

    @property
    def multistage(self) -> bool:
        """Whether a step evaluates the gradient more than once, and so needs a closure."""
        return self.scheme not in ONE_GRADIENT

    def _step_pairs(self, gathered: Sequence[Gathered], closure: Callable[[], Any] | None) -> None:
        evaluate = closure or self.replay
        if evaluate is None and self.multistage:
            raise InputError(
                f"step needs a closure, because scheme {self.scheme!r} evaluates the gradient more than "
                "once: call optimizer.step(closure); tangora.Trainer does this for you"
            )
        loaded = [each.load() for each in gathered]
        field = _ModelField(gathered, evaluate, self._check_finite)
        try:
            new = self._flow(field, gathered, loaded)
        finally:
            for group in self.param_groups:
                group["evaluations"] += field.evaluations
        for each, here, factors in zip(gathered, loaded, new, strict=True):
            every = each.options["rebalance_every"]
            each.stack.write(*(rebalance(*factors) if every and here.step % every == 0 else factors))
            each.stack.count()

    def _flow(
        self, field: "_ModelField", gathered: Sequence[Gathered], loaded: Sequence[Loaded]
    ) -> list[Factors]:
        """Return the new factors; parameters and gradients end as the first stage left them, whatever happens."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [p.grad.clone() if self.multistage and p.grad is not None else None for p in parameters]
        balance = [
            here.step == 1 and each.options["balance_start"]
            for each, here in zip(gathered, loaded, strict=True)
        ]
        try:
            self._check_finite(gathered)
            with full_precision(field.device):
                start, options = field.descents(gathered, loaded), [each.options for each in gathered]
                new = ode_step(self.scheme, start, field, options, balance=balance)
            if not all(factor.isfinite().all() for factors in new for factor in factors):
                raise FloatingPointError("the new factors are not finite; no step was taken")  # noqa: TRY301
        except (FloatingPointError, torch.linalg.LinAlgError) as error:
            where = f"gradient evaluation {field.evaluations} of a step of {self.scheme}"
            raise FloatingPointError(f"{where}: {error}") from error
        finally:
            if field.evaluations > 1:
                for each, here in zip(gathered, loaded, strict=True):
                    each.stack.place(here.A, here.B)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
        return new

    def _check_group(self, group: dict[str, Any]) -> None:
        check_choice("gauge", group["gauge"], GAUGES)
        check_choice("balance_start", group["balance_start"], (True, False))
        check_number("guard", group["guard"], low=0)
        check_number("tolerance", group["tolerance"], low=0, high=1, open_high=True)
        if group["tolerance"] and self.scheme != "bug":
            raise InputError(
                f"tolerance must be 0 with scheme {self.scheme!r}: only scheme 'bug' reduces ranks; got "
                f"{group['tolerance']!r}"
            )
        if group["rebalance_every"] is not None:
            check_whole("rebalance_every", group["rebalance_every"], low=1)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "scheme": self.scheme}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.replay = None


class _ModelField:
    """The descents of all pairs at other factors: places these in the model's parameters and evaluates there."""

    def __init__(
        self,
        gathered: Sequence[Gathered],
        evaluate: Callable[[], Any] | None,
        check: Callable[[Sequence[Gathered]], None],
    ):
        self.evaluations = 1  # that of the start included
        self.device = gathered[0].stack.pairs[0].A.device if gathered else torch.device("cpu")
        self._gathered, self._evaluate, self._check = gathered, evaluate, check
        kind = self.device.type
        self._autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}

    def __call__(self, points: Sequence[Factors]) -> list[Descent]:
        assert self._evaluate is not None
        for each, point in zip(self._gathered, points, strict=True):
            each.stack.place(*point)
        self.evaluations += 1
        with torch.enable_grad(), torch.autocast(self.device.type, **self._autocast):
            self._evaluate()
        stage = [
            each._replace(gradients=[_gradients(pair) for pair in each.stack.pairs])
            for each in self._gathered
        ]
        self._check(stage)
        return self.descents(stage, [each.load() for each in stage])

    @staticmethod
    def descents(gathered: Sequence[Gathered], loaded: Sequence[Loaded]) -> list[Descent]:
        return [
            descent(here.A, here.B, here.gradient, here.scaling, each.options["weight_decay"])
            for each, here in zip(gathered, loaded, strict=True)
        ]


def _gradients(pair: LoraPair) -> tuple[FactorA, FactorB]:
    # a layer that this stage did not use (an expert that was not chosen) stays where it is
    A, B = pair.factors()
    return pair.gradients() or (torch.zeros_like(A), torch.zeros_like(B))
