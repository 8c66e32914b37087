"""A recipe: everything that makes a method, but for the model, the data and the rank."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from tangora._checks import InputError, check_kind, check_number

# methods are listed and named in settings without torch: what works on a model is imported where it is used
if TYPE_CHECKING:
    import torch
    import transformers

    import tangora._types
    import tangora.init
    import tangora.probes

Adapter = Literal["lora", "adalora"] | None
MakeOptimizer = Callable[..., "torch.optim.Optimizer"]


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
        from tangora.init import needs_batches

        return self.start is not None and needs_batches(self.start)

    @property
    def default_learning_rate(self) -> float:
        """The second smallest of the grid: safe, and seldom far from the best."""
        return self.learning_rates[min(1, len(self.learning_rates) - 1)]

    def prepare(
        self,
        model: "transformers.PreTrainedModel",
        *,
        r: int,
        lora_alpha: float | int,
        task_type: str,
        total_steps: int,
        seed: int = 0,
        target_modules: str | list[str] = "all-linear",
        lora_dropout: float = 0.0,
        rank_plan: Mapping[str, Any] | None = None,
    ) -> "torch.nn.Module":
        """Make a base model ready for training with this method.

        Args:
            model: Base model, changed in place as PEFT does.
            task_type: PEFT's task type, ``SEQ_CLS`` or ``CAUSAL_LM``.
            total_steps: Number of optimizer steps that will follow (AdaLoRA's budget schedule needs it).
            seed: Seed of the adapter's random start; the caller's random state is untouched.
            target_modules: What PEFT should adapt.
            lora_dropout: Probability that an input of the adapter is dropped in training, in [0, 1).
            rank_plan: ``rank_pattern`` and ``alpha_pattern`` for single layers, and what they were made for (``r``,
                ``lora_alpha``, ``use_rslora``), as ``tangora diagnose`` writes them.

        Returns:
            The PEFT model, or ``model`` with all weights trainable for full fine-tuning.

        Raises:
            InputError: If the rank is not in [1, smallest side of an adapted layer], or the method takes no rank plan,
                or the plan was made for another rank, alpha or scaling.
        """
        from tangora.recipes.prepare import prepare

        return prepare(
            self,
            model,
            r=r,
            lora_alpha=lora_alpha,
            task_type=task_type,
            total_steps=total_steps,
            seed=seed,
            target_modules=target_modules,
            lora_dropout=lora_dropout,
            rank_plan=rank_plan,
        )

    def initialize(
        self,
        model: "torch.nn.Module",
        batches: Iterable[Any] | None = None,
        *,
        held_out: Iterable[Any] | None = None,
        loss_fn: "tangora._types.LossFn | None" = None,
        seed: int = 0,
        progress: "tangora.probes.Report" = False,
    ) -> "tangora.init.Start | None":
        """Give the adapter this method's start.

        Args:
            batches: Model inputs with labels, for starts that read gradients.
            held_out: Others, for a start that is tuned on them (``one-step``).
            loss_fn: ``loss_fn(model, batch)``; default the model's own loss.
            seed: Seed of what is random in it.
            progress: Whether to draw a progress bar, or what hears of it.

        Returns:
            What was done; ``None`` where PEFT's own start stays.
        """
        if self.start is None:
            return None
        from tangora.init import initialize

        options: dict[str, Any] = dict(self.start_options) | (
            {"held_out": held_out} if self.start == "one-step" else {}
        )
        peft_model: Any = model  # `initialize` checks it
        return initialize(
            peft_model, self.start, batches, loss_fn=loss_fn, seed=seed, progress=progress, **options
        )

    def create_optimizer(
        self, model: "torch.nn.Module", lr: float, *, head_lr: float | None = None, **options: Any
    ) -> "torch.optim.Optimizer":
        """Make the optimizer.

        Args:
            model: What `prepare` returned, possibly wrapped.
            head_lr: That of a new head; default: what the method does, which for most is ``lr``.

        Returns:
            The optimizer of all trainable parameters.
        """
        from torch import Tensor, nn

        check_kind("model", model, nn.Module, "the model that prepare returned")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(f"model must have trainable parameters; {type(model).__name__} has none")
        check_number("lr", lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr, low=0)
        optimizer = self.make_optimizer(model, lr=lr, **options)
        if head_lr is not None:
            from tangora.recipes.head import set_head_rate

            set_head_rate(optimizer, model, head_lr)
        return optimizer
