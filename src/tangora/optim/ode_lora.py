r"""ODELoRA: LoRA training as the gradient flow of full fine-tuning on the rank-r matrices, integrated in time.

The flow $\dot W = -P_T(g)$ moves the factors so that $B^\top B - A A^\top$ stays as it is; an optimizer step is one
step of an ODE solver, whose stages each evaluate the gradient of the same batch. Derivation:
``docs/theory/ode_lora.md``.

Source: Gao & Tan (2026), ODELoRA: Training Low-Rank Adaptation by Solving Ordinary Differential Equations,
arXiv:2602.07479. Only its abstract could be had: the gauge, the start, the guard and everything but Euler and
Runge-Kutta in the factors are this project's.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tangora._checks import InputError, check_choice, check_number, check_whole
from tangora.geometry.gauge import GAUGES, Gauge
from tangora.geometry.retraction import rebalance
from tangora.optim.base import OnNonfinite, PairOptimizer, Stacks
from tangora.optim.groups import Params
from tangora.optim.ode_flow import ONE_GRADIENT, SCHEMES, Flow, Scheme
from tangora.optim.stack import Gathered


class ODELoRA(PairOptimizer):
    r"""Gradient flow on the rank-r matrices, one step of an ODE solver at a time.

    Without moments: a step of size ``lr`` moves $W$ by $-\mathtt{lr}\, P_T(g)$ to first order whatever alpha is, so the
    learning rate is that of **full fine-tuning by plain gradient descent**. Schemes with several stages evaluate the
    gradient several times on the same batch, and so need a closure, as ``torch.optim.LBFGS`` does. Parameters outside
    pairs take one step of AdamW with the first stage's gradient. Gradients are left as that first evaluation gave them.

    The velocities of the factors grow like $1/\sigma_r(BA)$. While a step is larger than the smallest singular value
    (always at PEFT's $B = 0$), all stages are taken in $W$ and retracted to rank r instead: the same flow at the same
    order, with balanced factors, and for ``euler`` exactly ``bug``.

    Meant for PEFT's own start, $B = 0$, which needs no singular values to begin with.

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
        params: PEFT model, pairs, or parameter groups.
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
        betas: AdamW's, for parameters outside pairs.
        weight_decay: Decoupled decay, of $B A$ and of parameters outside pairs, per unit of ``lr``.
        maximize: Whether to climb instead of descend.
        foreach: ``None`` or ``True``: layers of equal shape take their step together as one stack, this library's
            counterpart of torch's ``foreach``; ``False``: one layer at a time.
        on_nonfinite: ``"raise"`` or ``"skip"`` a step that fails in any of its stages; the parameters are then as
            they were before it.

    Raises:
        InputError: For an option outside its range.

    Attributes:
        replay: Evaluates loss and gradients again when `step` gets no closure; set by `tangora.Trainer`.

    Example:
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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        on_nonfinite: OnNonfinite = "raise",
    ):
        check_choice("scheme", scheme, SCHEMES)
        self.scheme: Scheme = scheme
        self.replay: Callable[[], Any] | None = None
        defaults = {
            "lr": lr,
            "gauge": gauge,
            "balance_start": balance_start,
            "rebalance_every": rebalance_every,
            "tolerance": tolerance,
            "guard": guard,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "evaluations": 0,
        }
        super().__init__(params, defaults, on_nonfinite, rest={} if adamw_lr is None else {"lr": adamw_lr})

    @property
    def evaluations(self) -> int:
        """Gradient evaluations so far, failed steps included; kept in the state dictionary."""
        return self.param_groups[0]["evaluations"]

    @property
    def multistage(self) -> bool:
        """Whether a step evaluates the gradient more than once, and so needs a closure."""
        return self.scheme not in ONE_GRADIENT

    def _step_pairs(self, stacks: Stacks, closure: Callable[[], Any] | None) -> None:
        evaluate = closure or self.replay
        if evaluate is None and self.multistage:
            raise InputError(
                f"step needs a closure, because scheme {self.scheme!r} evaluates the gradient more than once: "
                "optimizer.step(closure); tangora.Trainer does that by itself"
            )
        loaded, options = [gathered.stack for gathered, _ in stacks], [each for _, each in stacks]
        for (stack, gradients), each in stacks:
            stack.load(gradients, maximize=each["maximize"])
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        flow = Flow(loaded, options, self.scheme, parameters, evaluate, lambda: self._check_loaded(stacks))
        try:
            new = flow.step()
        finally:
            for group in self.param_groups:
                group["evaluations"] += flow.evaluations
        for stack, each, factors in zip(loaded, options, new, strict=True):
            every = each["rebalance_every"]
            stack.write(*(rebalance(*factors) if every and stack.step % every == 0 else factors))

    def _check_group(self, group: dict[str, Any]) -> None:
        check_choice("gauge", group["gauge"], GAUGES)
        check_choice("balance_start", group["balance_start"], (True, False))
        check_number("guard", group["guard"], low=0)
        check_number("tolerance", group["tolerance"], low=0, high=1, open_high=True)
        if group["tolerance"] and self.scheme != "bug":
            raise InputError(
                f"tolerance must be 0 with scheme {self.scheme!r}: only bug cuts ranks; got {group['tolerance']!r}"
            )
        if group["rebalance_every"] is not None:
            check_whole("rebalance_every", group["rebalance_every"], low=1)

    def _check_loaded(self, stacks: Stacks) -> None:
        """Check the gradients that the stacks hold now, those of a stage."""
        held = [Gathered(each.stack, [*zip(*each.stack.gradient, strict=True)]) for each, _ in stacks]
        self._check_finite([(each, {}) for each in held])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "scheme": self.scheme}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.replay = None
