"""The table of methods. Methods that approximate full fine-tuning use its grid of learning rates."""

from functools import cache, partial
from types import MappingProxyType
from typing import Any

from tangora._checks import InputError, check_choice, check_kind
from tangora.recipes.rank_search import RankSearch
from tangora.recipes.recipe import Later, Recipe

_FULL_GRID = (3e-5, 1e-4, 3e-4, 1e-3)
_LORA_GRID = (3e-4, 1e-3, 3e-3, 1e-2)
# Plain descent on the full weights: in 30 steps MiniLM learnt little of BBC News at 0.03 and nothing at 3. The
# initialization is PEFT's B = 0: from an orthogonal one or LoRA-GA's the loss fell by a quarter of that or less at the
# same rate.
_ODE_GRID = (1e-1, 3e-1, 1.0)
_MUON_GRID = (1e-2, 2e-2, 4e-2)
# from B = 0, SmolLM2 chose 0.01 or 0.003, never 0.02: benchmarks/spectral/{smollm2,sums-exact}.json
_CAUSAL_MUON_GRID = (2.5e-3, 5e-3, 1e-2)
_HEAD_LR = 1e-3
# after 15 steps from r = 8 at 0.3: 0.01 had cut the rank of one layer of 37, 0.1 that of all but six, at held-out
# losses of 1.035 and 1.065
_BUG_TOLERANCE = 1e-1


_adamw = Later("tangora.recipes.baselines:adamw")
_lora_plus = Later("tangora.recipes.baselines:lora_plus")
_preconditioned = Later("tangora.optim:PreconditionedAdamW")
_tangent = Later("tangora.optim:TangentAdam")
_tangent_muon = Later("tangora.optim:TangentMuon")
_full_muon = Later("tangora.recipes.baselines:full_muon")
_factor_muon = Later("tangora.recipes.baselines:factor_muon")
_lora_muon = Later("tangora.optim:LoRAMuon")
_polora = Later("tangora.optim:PoLoRA")
_lora_rite = Later("tangora.optim:LoRARITE")


def _lora_pro(**fixed: Any) -> Any:
    return partial(Later("tangora.optim:LoRAPro"), **fixed)


def _ode_lora(**fixed: Any) -> Any:
    # a new head is trained by AdamW, whose steps are not those of plain descent
    return partial(Later("tangora.optim:ODELoRA"), adamw_lr=_HEAD_LR, **fixed)


def _options(**options: Any) -> MappingProxyType[str, Any]:
    return MappingProxyType(options)


_ORTHOGONAL = _options(size=1.0)


_TABLE = (
    Recipe(
        "full", "full fine-tuning with AdamW: the reference", "arXiv:1711.05101", _FULL_GRID, _adamw, None
    ),
    Recipe(
        "full-muon",
        "full fine-tuning with Muon: a second reference",
        "https://kellerjordan.github.io/posts/muon",
        _MUON_GRID,
        _full_muon,
        None,
    ),
    Recipe("lora", "LoRA with AdamW", "arXiv:2106.09685", _LORA_GRID, _adamw),
    Recipe(
        "rslora",
        "LoRA scaled by alpha / sqrt(r)",
        "arXiv:2312.03732",
        _LORA_GRID,
        _adamw,
        options=_options(use_rslora=True),
    ),
    Recipe(
        "lora+", "LoRA with a 16 times larger learning rate for B", "arXiv:2402.12354", _FULL_GRID, _lora_plus
    ),
    Recipe(
        "pissa",
        "initializes with the weight's principal directions",
        "arXiv:2404.02948",
        _FULL_GRID,
        _adamw,
        start="pissa",
        start_options=_options(niter=16),
    ),
    Recipe(
        "dora",
        "LoRA for directions, a trainable vector for magnitudes",
        "arXiv:2402.09353",
        _LORA_GRID,
        _adamw,
        options=_options(use_dora=True),
    ),
    Recipe(
        "adalora",
        "LoRA that moves rank between layers",
        "arXiv:2303.10512",
        _LORA_GRID,
        _adamw,
        adapter="adalora",
    ),
    Recipe(
        "p-lora",
        "LoRA with gradients preconditioned by the other factor",
        "arXiv:2402.02347",
        _LORA_GRID,
        _preconditioned,
    ),
    Recipe(
        "orthogonal",
        "initializes with orthogonal factors; their product is subtracted from the frozen weight",
        "https://spaces.ac.cn/archives/10266",
        _LORA_GRID,
        _adamw,
        start="orthogonal",
        start_options=_ORTHOGONAL,
    ),
    Recipe(
        "lora-ga",
        "initializes with the gradient's singular directions",
        "arXiv:2407.05000",
        _FULL_GRID,
        _adamw,
        start="lora-ga",
    ),
    Recipe(
        "lora-one",
        "initializes with a rank-r step of gradient descent; preconditioned AdamW",
        "arXiv:2502.01235",
        _LORA_GRID,
        _preconditioned,
        options=_options(use_rslora=True),
        start="lora-one",
    ),
    Recipe(
        "lora-one-plain",
        "LoRA-One's initialization with AdamW, as its authors released it",
        "arXiv:2502.01235",
        _FULL_GRID,
        _adamw,
        options=_options(use_rslora=True),
        start="lora-one",
    ),
    Recipe(
        "one-step",
        "one rank-r step of gradient descent, its size chosen on validation data; no training",
        "arXiv:2502.01235",
        (1.0,),
        _adamw,
        start="one-step",
        trains=False,
    ),
    Recipe(
        "lora-pro",
        "LoRA-Pro: Adam on the projected full gradient, moments of the shape of the weight",
        "arXiv:2407.18242",
        _FULL_GRID,
        _lora_pro(moments="weight"),
    ),
    Recipe(
        "lora-pro-factor",
        "LoRA-Pro with moments of the shape of the factors",
        "arXiv:2407.18242",
        _FULL_GRID,
        _lora_pro(moments="factor"),
    ),
    Recipe(
        "lora-pro-sgd",
        "LoRA-Pro without moments (Algorithm 1)",
        "arXiv:2407.18242",
        (1e-2, 3e-2, 1e-1, 3e-1),
        _lora_pro(moments=None),
    ),
    Recipe(
        "tangent",
        "TangentAdam: Adam on the projected full gradient in half of LoRA's optimizer state",
        "this project, from arXiv:2407.18242, 1804.04235, 2605.08734, 2507.12142",
        _FULL_GRID,
        _tangent,
    ),
    Recipe(
        "tangent-muon",
        "TangentMuon: Muon on the projected momentum in half of LoRA's optimizer state",
        "this project, from arXiv:2507.12142, 2608.14492, 2609.02734",
        _MUON_GRID,
        _tangent_muon,
        causal_learning_rates=_CAUSAL_MUON_GRID,
    ),
    Recipe(
        "factor-muon",
        "Muon on each factor of LoRA",
        "arXiv:2605.10468",
        _MUON_GRID,
        _factor_muon,
        causal_learning_rates=_CAUSAL_MUON_GRID,
    ),
    Recipe(
        "lora-muon",
        "LoRA-Muon: each factor's momentum orthogonalised in the other's metric",
        "arXiv:2606.12921",
        _MUON_GRID,
        _lora_muon,
    ),
    Recipe(
        "polora",
        "PoLoRA: spectral steps of the factors, preconditioned by curvature",
        "arXiv:2607.17620",
        _MUON_GRID,
        _polora,
    ),
    Recipe(
        "lora-rite",
        "LoRA-RITE: second moments of size r, the same for every factorization",
        "arXiv:2410.20625",
        _FULL_GRID,
        _lora_rite,
    ),
    Recipe(
        "odelora-euler",
        "gradient flow on the balanced rank-r matrices, Euler steps",
        "arXiv:2602.07479",
        _ODE_GRID,
        _ode_lora(scheme="euler"),
    ),
    Recipe(
        "odelora-heun",
        "ODELoRA's flow with Heun steps: two gradients of a batch per step",
        "arXiv:2602.07479",
        _ODE_GRID,
        _ode_lora(scheme="heun"),
    ),
    Recipe(
        "odelora-rk4",
        "ODELoRA's flow with the classical Runge-Kutta method: four gradients per step",
        "arXiv:2602.07479",
        _ODE_GRID,
        _ode_lora(scheme="rk4"),
    ),
    Recipe(
        "odelora-bug",
        "ODELoRA's flow with basis updates and Galerkin steps, which find the ranks",
        "arXiv:2602.07479, 2410.18720",
        _ODE_GRID,
        _ode_lora(scheme="bug", tolerance=_BUG_TOLERANCE),
    ),
    Recipe(
        "lora-ga+pro",
        "LoRA-GA's initialization, LoRA-Pro",
        "arXiv:2407.05000, 2407.18242",
        _FULL_GRID,
        _lora_pro(moments="weight"),
        start="lora-ga",
    ),
    Recipe(
        "orthogonal+tangent",
        "orthogonal initialization, TangentAdam",
        "https://spaces.ac.cn/archives/10266 and this project",
        _FULL_GRID,
        _tangent,
        start="orthogonal",
        start_options=_ORTHOGONAL,
    ),
    Recipe(
        "orthogonal+tangent-muon",
        "orthogonal factors as initialization, TangentMuon",
        "https://spaces.ac.cn/archives/10266 and this project",
        _MUON_GRID,
        _tangent_muon,
        causal_learning_rates=_CAUSAL_MUON_GRID,
        start="orthogonal",
        start_options=_ORTHOGONAL,
    ),
    Recipe(
        "lora-ga+tangent-muon",
        "LoRA-GA's initialization, TangentMuon",
        "arXiv:2407.05000 and this project",
        _MUON_GRID,
        _tangent_muon,
        causal_learning_rates=_CAUSAL_MUON_GRID,
        start="lora-ga",
    ),
    Recipe(
        "lora-ga+tangent",
        "LoRA-GA's initialization, TangentAdam",
        "arXiv:2407.05000 and this project",
        _FULL_GRID,
        _tangent,
        start="lora-ga",
    ),
    Recipe(
        "lora-one+tangent",
        "LoRA-One's initialization, TangentAdam",
        "arXiv:2502.01235 and this project",
        _FULL_GRID,
        _tangent,
        options=_options(use_rslora=True),
        start="lora-one",
    ),
    Recipe(
        "adalora+tangent-muon",
        "AdaLoRA finds the ranks in the first third of the steps, TangentMuon trains on",
        "arXiv:2303.10512 and this project",
        _MUON_GRID,
        _tangent_muon,
        causal_learning_rates=_CAUSAL_MUON_GRID,
        adapter="adalora",
        search=RankSearch(),
    ),
    Recipe(
        "adalora+tangent",
        "AdaLoRA finds the ranks in the first third of the steps, TangentAdam trains on",
        "arXiv:2303.10512 and this project",
        _FULL_GRID,
        _tangent,
        adapter="adalora",
        search=RankSearch(),
    ),
    Recipe(
        "adalora+lora-pro",
        "AdaLoRA finds the ranks in the first third of the steps, LoRA-Pro trains on",
        "arXiv:2303.10512, 2407.18242",
        _FULL_GRID,
        _lora_pro(moments="weight"),
        adapter="adalora",
        search=RankSearch(),
    ),
)


def recipes() -> tuple[Recipe, ...]:
    """List the named methods.

    Returns:
        All recipes, baselines first.
    """
    return _TABLE


def recipe(name: str) -> Recipe:
    """Look up a method.

    Args:
        name: Its name, as in ``tangora list``; options of its optimizer, initialization or search for ranks may follow:
            ``lora-pro@gauge=zero``.

    Raises:
        InputError: If there is none of this name (the message lists all), or it has no such option.
    """
    check_kind("recipe", name, str, "the name of a recipe, such as 'tangent'")
    return _looked_up(name)


@cache
def _looked_up(name: str) -> Recipe:
    by_name = {entry.name: entry for entry in _TABLE}
    known, *changes = name.split("@")
    check_choice("recipe", known, tuple(by_name), listed_by="tangora list")
    return by_name[known].with_options(**dict(map(_option, changes))) if changes else by_name[known]


def _option(change: str) -> tuple[str, Any]:
    import yaml

    name, equals, text = change.partition("=")
    if not equals:
        raise InputError(f"options of a recipe are @name=value; got @{change}")
    try:
        return name, yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"{name}: cannot be parsed; got {text!r}") from None
