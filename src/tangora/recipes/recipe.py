"""A recipe: a complete method, except the model, the data and the rank."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pkgutil import resolve_name
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from tangora._checks import InputError, check_choice, check_kind, check_number
from tangora._names import Kind
from tangora.recipes.rank_search import RankSearch

# methods are listed and named in settings without torch: what works on a model is imported where it is used
if TYPE_CHECKING:
    import torch
    import transformers

    import tangora._types
    import tangora.init

Adapter = Literal["lora", "adalora"] | None
_SEARCH_OPTIONS = {"search_fraction": float, "search_lr": float}
MakeOptimizer = Callable[..., "torch.optim.Optimizer"]


@dataclass(frozen=True)
class Later:
    """Calls what a name such as ``package.module:function`` stands for, imported at the first call."""

    name: str

    @property
    def maker(self) -> Callable[..., Any]:
        """The class or function itself."""
        return resolve_name(self.name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call it."""
        return self.maker(*arguments, **options)


@dataclass(frozen=True)
class Recipe:
    """A named method."""

    name: str
    """Its name for ``tangora.recipe`` and the command line."""
    summary: str
    """What it is, in a line, for lists and pages."""
    paper: str
    """Its source: an arXiv identifier or an address."""
    learning_rates: tuple[float, ...]
    """Default grid for a sweep, ascending, in units of the method's own optimizer."""
    make_optimizer: MakeOptimizer
    """``(model, lr=, weight_decay=, betas=, eps=)`` -> optimizer; what else it names are options for `with_options`."""
    adapter: Adapter = "lora"
    """PEFT's method, or ``None`` for full fine-tuning."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Options of PEFT's configuration beyond rank, alpha and targets."""
    start: str | None = None
    """Name of the initialization for `tangora.initialize`; ``None`` for PEFT's own."""
    start_options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Options of that initialization."""
    trains: bool = True
    """Whether training follows the initialization."""
    search: RankSearch | None = None
    """A first phase in which AdaLoRA finds the ranks; the recipe's optimizer then trains plain LoRA of these ranks."""
    causal_learning_rates: tuple[float, ...] = ()
    """Another default grid for causal language models; empty: the same."""

    @property
    def reads_gradients(self) -> bool:
        """Whether the initialization needs batches."""
        from tangora.init import start_method

        return self.start is not None and start_method(self.start).reads_gradients

    @property
    def reads_weight(self) -> bool:
        """Whether the initialization, or PEFT's adapter, computes with whole base weights before training."""
        from tangora.init import start_method

        if self.start is None:
            return bool(self.options.get("use_dora"))
        return start_method(self.start).reads_weight(self.start_options)

    @property
    def searches_step(self) -> bool:
        """Whether the initialization has a step size that is searched on held-out batches."""
        from tangora.init import start_method

        return self.start is not None and start_method(self.start).searches_step

    def grid(self, kind: Kind | None = None) -> tuple[float, ...]:
        """Return the default learning rates of a sweep for a kind of model."""
        return (kind == "causal" and self.causal_learning_rates) or self.learning_rates

    def default_learning_rate(self, kind: Kind | None = None) -> float:
        """Return the second-smallest value of the grid: safe, and seldom far from the best."""
        grid = self.grid(kind)
        return grid[min(1, len(grid) - 1)]

    def with_options(self, **options: Any) -> "Recipe":
        """Change options of this method's optimizer, initialization and search for ranks, for ablations.

        Args:
            **options: For example ``gauge="zero"`` for LoRA-Pro, which is the recipe ``lora-pro@gauge=zero``.

        Returns:
            The variant, whose name says what was changed.

        Raises:
            InputError: If the method has no such option, or a value is of another type.
        """
        from tangora.init import start_method

        of_optimizer = self._optimizer_options()
        of_start = dict(start_method(self.start).options) if self.start is not None else {}
        of_search = {} if self.search is None else _SEARCH_OPTIONS
        known = of_optimizer | of_start | of_search
        if not known:
            given = "@".join(f"{name}={value}" for name, value in options.items())
            raise InputError(f"recipe {self.name} has no options of its own; got @{given}")
        for name in options:
            check_choice(f"option of {self.name}", name, tuple(known))
        options = {name: _converted(name, options[name], known[name]) for name in sorted(options)}
        written = [f"{name}={value}" for name, value in options.items()]
        for_optimizer = {name: value for name, value in options.items() if name in of_optimizer}
        for_start = {name: value for name, value in options.items() if name in of_start}
        for_search = {
            name.removeprefix("search_"): value for name, value in options.items() if name in of_search
        }
        return replace(
            self,
            name="@".join([self.name, *written]),
            summary=f"{self.summary}; {', '.join(written)}",
            make_optimizer=partial(self.make_optimizer, **for_optimizer),
            start_options=MappingProxyType(dict(self.start_options) | for_start),
            search=self.search and replace(self.search, **for_search),
        )

    def _optimizer_options(self) -> dict[str, Any]:
        # types by name of what makes the optimizer this method's own: what all optimizers take belongs to a run
        from tangora.optim.base import CommonOptions

        make = self.make_optimizer
        maker: Any = make.func if isinstance(make, partial) else make
        maker = maker.maker if isinstance(maker, Later) else maker
        _, *others = inspect.signature(maker, eval_str=True).parameters.values()  # after the model
        return {
            each.name: Any if each.annotation is each.empty else each.annotation
            for each in others
            if each.kind is not each.VAR_KEYWORD and each.name not in {"lr", *CommonOptions.__annotations__}
        }

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
            total_steps: Number of optimizer steps that will follow, those of a search for ranks included (AdaLoRA's
                budget schedule needs it).
            seed: Seed of the adapter's random initialization; the caller's random state is untouched.
            target_modules: Layers to adapt, as in ``LoraConfig``.
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

    def check_fit(self, model: "torch.nn.Module") -> None:
        """Raise `InputError` unless a model fits this method: the kind of adapter and its PEFT options."""
        from tangora.recipes.prepare import check_fit

        check_fit(self, model)

    def initialize(
        self,
        model: "torch.nn.Module",
        batches: Iterable[Any] | None = None,
        *,
        held_out: Iterable[Any] | None = None,
        loss_fn: "tangora._types.LossFn | None" = None,
        seed: int = 0,
        progress: "tangora._types.Progress | bool" = False,
    ) -> "tangora.init.Start | None":
        """Give the adapter this method's initialization.

        Args:
            batches: Model inputs with labels, for initializations that need gradients.
            held_out: Further batches, for an initialization that is tuned on them (``one-step``).
            loss_fn: ``loss_fn(model, batch)``; default the model's own loss.
            seed: Seed of what is random in it.
            progress: Whether to draw a progress bar, or a function called after each batch instead.

        Returns:
            Report of the initialization; ``None`` where PEFT's own stays.
        """
        if self.start is None:
            return None
        from tangora.init import initialize

        options: dict[str, Any] = dict(self.start_options) | (
            {"held_out": held_out} if self.searches_step else {}
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
            model: Result of `prepare`, possibly wrapped. A recipe that searches for ranks gets the AdamW of that
                phase for its AdaLoRA adapter, and its own optimizer for what `from_adalora` makes of that.
            head_lr: Learning rate of a new head; default: the recipe's, which for most is ``lr``.

        Returns:
            The optimizer of all trainable parameters.
        """
        from torch import Tensor, nn

        check_kind("model", model, nn.Module, "the model that prepare returned")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError(f"model must have trainable parameters; {type(model).__name__} has none")
        check_number("lr", lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr, low=0)
        make = self.make_optimizer
        if self.search is not None:
            from tangora.adapters import is_adalora
            from tangora.recipes.baselines import adamw

            if is_adalora(model):
                make, lr = adamw, self.search.lr
        optimizer = make(model, lr=lr, **options)
        if head_lr is not None:
            from tangora.recipes.baselines import set_head_rate

            set_head_rate(optimizer, model, head_lr)
        return optimizer


def _converted(name: str, value: Any, kind: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise InputError(f"{name}: {said[0].lower()}{said[1:]}; got {value!r}") from None
