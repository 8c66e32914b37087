"""A recipe: everything that makes a method, but for the model, the data and the rank."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from tangora._checks import InputError, check_number
from tangora.adapters import discover
from tangora.init import Start, initialize, needs_batches
from tangora.probes import Report
from tangora.recipes.head import head_options, set_head_rate

Adapter = Literal["lora", "adalora"] | None
MakeOptimizer = Callable[..., Optimizer]


@dataclass(frozen=True)
class Recipe:
    """A named method.

    Attributes:
        name: What ``tangora.recipe`` and the command line call it.
        summary: One line.
        paper: Where it comes from.
        learning_rates: Default grid for a sweep, ascending, in units of the method's own optimizer.
        make_optimizer: ``(model, lr=, weight_decay=, betas=, eps=)`` -> optimizer.
        adapter: PEFT's method, or ``None`` for full fine-tuning.
        options: Options of PEFT's configuration beyond rank, alpha and targets.
        start: What `tangora.initialize` gives the adapter; ``None`` for PEFT's own start.
        start_options: Its options.
        trains: Whether training follows the start.
    """

    name: str
    summary: str
    paper: str
    learning_rates: tuple[float, ...]
    make_optimizer: MakeOptimizer
    adapter: Adapter = "lora"
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    start: str | None = None
    start_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    trains: bool = True

    @property
    def reads_gradients(self) -> bool:
        """Whether the start needs batches."""
        return self.start is not None and needs_batches(self.start)

    @property
    def default_learning_rate(self) -> float:
        """The second smallest of the grid: safe, and seldom far from the best."""
        return self.learning_rates[min(1, len(self.learning_rates) - 1)]

    def prepare(
        self,
        model: PreTrainedModel,
        *,
        r: int,
        lora_alpha: float | int,
        task_type: str,
        total_steps: int,
        seed: int = 0,
        target_modules: str | list[str] = "all-linear",
        rank_plan: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """Make a base model ready for training with this method.

        Args:
            model: Base model, changed in place as PEFT does.
            r: Rank.
            lora_alpha: LoRA's alpha.
            task_type: PEFT's task type, ``SEQ_CLS`` or ``CAUSAL_LM``.
            total_steps: Number of optimizer steps that will follow (AdaLoRA's budget schedule needs it).
            seed: Seed of the adapter's random start; the caller's random state is untouched.
            target_modules: What PEFT should adapt.
            rank_plan: ``rank_pattern`` and ``alpha_pattern`` for single layers, and what they were made for (``r``,
                ``lora_alpha``, ``use_rslora``), as ``tangora diagnose`` writes them.

        Returns:
            The PEFT model, or ``model`` with all weights trainable for full fine-tuning.

        Raises:
            InputError: If the rank is not in [1, smallest side of an adapted layer], or the method takes no rank plan,
                or the plan was made for another rank, alpha or scaling.
        """
        if self.adapter is None:
            return model.requires_grad_(True)
        check_number("rank", r, low=1)
        if rank_plan and self.adapter != "lora":
            raise InputError(
                f"rank_plan cannot be used with recipe {self.name}, which chooses its ranks itself"
            )
        common = {"lora_alpha": lora_alpha, "target_modules": target_modules, "task_type": task_type}
        if task_type == "SEQ_CLS":
            common |= head_options(model)
        if self.adapter == "adalora":
            config = _adalora_config(r, total_steps, common | dict(self.options))
        else:
            scaled = {"use_rslora": False} | dict(self.options)
            plan = _single_layers(rank_plan or {}, {"r": r, "lora_alpha": lora_alpha} | scaled)
            config = LoraConfig(r=r, **common, **self.options, **plan)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        assert isinstance(adapted, PeftModel)
        _check_rank(adapted, r)
        return adapted

    def initialize(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None = None,
        *,
        held_out: Iterable[Any] | None = None,
        seed: int = 0,
        progress: Report = False,
    ) -> Start | None:
        """Give the adapter this method's start.

        Args:
            model: What `prepare` returned.
            batches: Model inputs with labels, for starts that read gradients.
            held_out: Others, for a start that is tuned on them (``one-step``).
            seed: Seed of what is random in it.
            progress: Whether to draw a progress bar, or what hears of it.

        Returns:
            What was done; ``None`` where PEFT's own start stays.
        """
        if self.start is None:
            return None
        assert isinstance(model, PeftModel)
        options: dict[str, Any] = dict(self.start_options) | (
            {"held_out": held_out} if self.start == "one-step" else {}
        )
        return initialize(model, self.start, batches, seed=seed, progress=progress, **options)

    def create_optimizer(
        self, model: nn.Module, lr: float, *, head_lr: float | None = None, **options: Any
    ) -> Optimizer:
        """Make the optimizer.

        Args:
            model: What `prepare` returned, possibly wrapped.
            lr: Learning rate.
            head_lr: That of a new head; default: what the method does, which for most is ``lr``.
            **options: ``weight_decay``, ``betas``, ``eps``.

        Returns:
            The optimizer of all trainable parameters.
        """
        optimizer = self.make_optimizer(model, lr=lr, **options)
        if head_lr is not None:
            set_head_rate(optimizer, model, head_lr)
        return optimizer


def _adalora_config(r: int, total_steps: int, options: dict[str, Any]) -> AdaLoraConfig:
    # the paper starts with 1.5 times the target rank, and reshuffles it between a tenth and two thirds of training
    return AdaLoraConfig(
        init_r=(3 * r + 1) // 2,
        target_r=r,
        total_step=total_steps,
        tinit=total_steps // 10,
        tfinal=total_steps // 3,
        **options,
    )


def _single_layers(plan: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    # the plan leaves layers out that keep the common rank: under another one they would silently get that
    for key in ("r", "lora_alpha", "use_rslora"):
        if key in plan and plan[key] != config[key]:
            raise InputError(f"rank_plan was made for {key} = {plan[key]}; got {key} = {config[key]}")
    return {key: dict(plan[key]) for key in ("rank_pattern", "alpha_pattern") if key in plan}


def _check_rank(model: PeftModel, r: int) -> None:
    for pair in discover(model).pairs:
        m, n, rank = pair.shape
        if rank > min(m, n):
            raise InputError(
                f"rank must be at most {min(m, n)}, the smaller side of layer {pair.name} ({m} x {n}); got {r}"
            )
