r"""The files of an adapter, and the same adapter at other ranks: factors and config.

From the factors alone: no matrix as large as the weight is ever formed.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from tangora._checks import InputError
from tangora.adapters.load import CONFIG_FILE
from tangora.adapters.offset import doubled_rank
from tangora.adapters.pair import pattern_key

WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"^(?P<layer>.*)\.lora_(?:embedding_)?(?P<letter>[AB])(?:\.weight)?$")


class AdapterFiles(NamedTuple):
    """The files that PEFT wrote, or their replacement."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "AdapterFiles":
        """Read what PEFT wrote."""
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return cls(load_file(folder / WEIGHTS), config)

    def write(self, folder: Path) -> None:
        """Replace what PEFT wrote."""
        save_file(self.tensors, folder / WEIGHTS, metadata={"format": "pt"})
        content = json.dumps(self.config, indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(content, encoding="utf-8")

    def ranks(self) -> dict[str, int]:
        """Return ranks by layer."""
        return {layer: self.tensors[key_A].shape[0] for layer, (key_A, _) in _layers(self.tensors).items()}


class Loss(NamedTuple):
    """The error of a truncation to a smaller rank, relative to the updates, in Frobenius norm."""

    relative_error: float
    errors: dict[str, float]
    """The same for each layer."""


def is_factor(name: str) -> bool:
    """Tell the factors among the tensors of a file."""
    return _FACTOR.match(name) is not None


def uncompiled(name: str) -> str:
    """Return the name that a tensor or module has without ``torch.compile``."""
    return name.replace("_orig_mod.", "")


def of_plain_base(files: AdapterFiles) -> AdapterFiles:
    """Rename what belongs to a compiled base."""
    if all(name == uncompiled(name) for name in files.tensors):
        return files
    config = dict(files.config)
    for key in ("target_modules", "modules_to_save"):
        if isinstance(names := config.get(key), list):
            config[key] = [uncompiled(name) for name in names]
    return AdapterFiles({uncompiled(name): tensor for name, tensor in files.tensors.items()}, config)


def with_initial(files: AdapterFiles, initial: Mapping[str, Tensor]) -> AdapterFiles:
    """Subtract the product of the initial factors, at twice the rank."""
    tensors = dict(files.tensors)
    # Embeddings and convolutions, whose base PEFT leaves alone, start from a zero factor: appending changes nothing.
    for name, trained in files.tensors.items():
        if (factor := _FACTOR.match(name)) is None:
            continue
        if name not in initial or initial[name].shape != trained.shape:
            raise InputError(f"initial has no factors of {name}: pass initial_factors(model) of this model")
        first = initial[name].to(trained.dtype)
        is_A = factor["letter"] == "A"
        tensors[name] = torch.cat([trained, first if is_A else -first], dim=0 if is_A else 1)
    return AdapterFiles(tensors, doubled_rank(files.config))


def with_tied_layers(files: AdapterFiles, origin: Any) -> AdapterFiles:
    """Name the layers that PEFT adapted because they are tied to one that was named (``ensure_weight_tying``).

    PEFT takes them out of its lists and keeps them beside; a file has the lists alone, and from those it finds the ties
    again only where an embedding has one of a few names.
    """
    named = {"target_modules": "target_modules_to_tie", "modules_to_save": "modules_to_tie"}
    found = {}
    for key, beside in named.items():
        tied = getattr(origin, beside, None)
        if tied and not isinstance(
            files.config.get(key), str
        ):  # a regular expression still finds what it found
            found[key] = sorted({*(files.config.get(key) or ()), *tied})
    return files._replace(config=files.config | found)


def resolved(files: AdapterFiles) -> AdapterFiles:
    r"""Write updates that are a difference of two products by their singular values, at the same rank.

    Where $B_0 A_0$ is larger than what was trained, $B A - B_0 A_0$ cancels in every forward pass and loses digits. The
    product's own balanced factors have nothing to cancel. Factors below float32, which cannot hold them as exactly,
    stay as they are, and so do those of a product that is of smaller rank but for rounding: zeros could not be trained
    further.
    """
    result = dict(files.tensors)
    for key_A, key_B in _layers(files.tensors).values():
        A, B = files.tensors[key_A], files.tensors[key_B]
        precision = torch.finfo(A.dtype).eps
        if precision > torch.finfo(torch.float32).eps:
            continue
        B_k, A_k, values = truncate(B.flatten(1), A.flatten(1), len(A))
        rounding = precision * float(B.double().norm() * A.double().norm())
        if len(values) == len(A) and values[-1] > rounding:
            result[key_A] = A_k.reshape(A.shape).to(A).contiguous()
            result[key_B] = B_k.reshape(B.shape).to(B).contiguous()
    return files._replace(tensors=result)


def trimmed(files: AdapterFiles, scalings: Mapping[str, float]) -> AdapterFiles:
    """Leave out the ranks of an adapter that are exactly zero in both factors.

    Training with a rank-adaptive method (``ODELoRA(scheme="bug", tolerance=...)``) leaves them. A rank that is zero in
    one factor only, as all are in a fresh adapter, stays: its gradient is not zero.
    """
    result, ranks = dict(files.tensors), {}
    for layer, (key_A, key_B) in _layers(files.tensors).items():
        A, B = files.tensors[key_A], files.tensors[key_B]
        used = (A.flatten(1) != 0).any(1) | (B.transpose(0, 1).flatten(1) != 0).any(1)
        if not used.any():
            used[0] = True  # PEFT knows no rank 0
        ranks[layer] = int(used.sum())
        if ranks[layer] < len(used):
            result[key_A], result[key_B] = A[used].contiguous(), B[:, used].contiguous()
    return files if ranks == files.ranks() else _with_ranks(files, result, ranks, scalings)


def cut(files: AdapterFiles, rank: int, scalings: Mapping[str, float]) -> tuple[AdapterFiles, Loss]:
    """Cut every layer of an adapter that has a larger rank."""
    result, ranks, lost, total = dict(files.tensors), {}, {}, {}
    for layer, (key_A, key_B) in _layers(files.tensors).items():
        A, B = files.tensors[key_A], files.tensors[key_B]
        B_k, A_k, values = truncate(B.flatten(1), A.flatten(1), rank)
        energy = scalings[layer] ** 2 * values.square()
        total[layer], lost[layer], ranks[layer] = float(energy.sum()), 0.0, A.shape[0]
        if rank < A.shape[0]:
            ranks[layer], lost[layer] = rank, float(energy[rank:].sum())
            result[key_A] = A_k.reshape(rank, *A.shape[1:]).to(A.dtype).contiguous()
            result[key_B] = B_k.reshape(len(B), rank, *B.shape[2:]).to(B.dtype).contiguous()
    errors = {layer: _root_ratio(lost[layer], total[layer]) for layer in total}
    loss = Loss(_root_ratio(sum(lost.values()), sum(total.values())), errors)
    return _with_ranks(files, result, ranks, scalings), loss


def is_uniform(config: Mapping[str, Any]) -> bool:
    """Say whether all layers have one rank and one alpha, and the scaling alpha / rank."""
    return not any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora"))


def uniform(files: AdapterFiles, scalings: Mapping[str, float]) -> AdapterFiles:
    r"""Write every update $s B A$ with one scaling $c$ and one rank: $c\,(\tfrac{s}{c} B) A$, padded with zeros.

    The scaling $c$ is one of the adapter's own. Factors that are multiplied by a power of two keep every bit, so the
    one is taken from which most entries of $B$ differ by such a power.
    """
    tensors, layers = files.tensors, _layers(files.tensors)
    rank = max(files.ranks().values())
    common = _commonest_scaling(
        {layer: tensors[key_B].numel() for layer, (_, key_B) in layers.items()}, scalings
    )
    result = dict(tensors)
    for layer, (key_A, key_B) in layers.items():
        ratio, missing = scalings[layer] / common, rank - tensors[key_A].shape[0]
        for key in (key_B, f"{layer}.lora_B.bias"):
            if key in tensors and ratio != 1:
                result[key] = _times(tensors[key], ratio, layer)
        if missing:
            result[key_A] = _padded(tensors[key_A], missing, 0)
            result[key_B] = _padded(result[key_B], missing, 1)
    config = files.config | {"r": rank, "lora_alpha": _alpha(common * rank), "init_lora_weights": True}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    if config.get("ensure_weight_tying"):
        # layers that shared their factors and not their scaling no longer can
        config["ensure_weight_tying"] = False
    return AdapterFiles(result, config)


def truncate(
    B: Float[Tensor, "m r"], A: Float[Tensor, "r n"], rank: int
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k n"], Float[Tensor, " p"]]:
    r"""Cut a product to a smaller rank.

    With $B = Q_B R_B$, $A^\top = Q_A R_A$ and $R_B R_A^\top = P \Sigma Q^\top$, the best approximation of $BA$ has the
    factors $Q_B P_k \Sigma_k^{1/2}$ and $\Sigma_k^{1/2} Q_k^\top Q_A^\top$, which are balanced
    (Eckart and Young, 1936).

    Examples:
        >>> B, A = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.eye(2)
        >>> B1, A1, values = truncate(B, A, 1)
        >>> (B1 @ A1).round(), values
        (tensor([[3., 0.],
                [0., 0.]], dtype=torch.float64), tensor([3., 1.], dtype=torch.float64))
    """
    Q_B, R_B = torch.linalg.qr(B.detach().cpu().double())
    Q_A, R_A = torch.linalg.qr(A.detach().cpu().double().mT)
    P, values, Qh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    root = values[:rank].sqrt()
    missing = max(rank - len(root), 0)
    B_k, A_k = (Q_B @ P[:, :rank]) * root, root[:, None] * (Qh[:rank] @ Q_A.mT)
    return F.pad(B_k, (0, missing)), F.pad(A_k, (0, 0, 0, missing)), values


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    # the names of both factors by layer
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := _FACTOR.match(key):
            found.setdefault(match["layer"], {})[match["letter"]] = key
    return {layer: (keys["A"], keys["B"]) for layer, keys in found.items()}


def _with_ranks(
    files: AdapterFiles, tensors: dict[str, Tensor], ranks: Mapping[str, int], scalings: Mapping[str, float]
) -> AdapterFiles:
    power = 0.5 if files.config.get("use_rslora") else 1
    alphas = {name: _alpha(scalings[name] * rank**power) for name, rank in ranks.items()}
    rank, alpha = commonest(ranks.values()), commonest(alphas.values())
    config = files.config | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_key(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {pattern_key(name): own for name, own in alphas.items() if own != alpha},
        "init_lora_weights": True,
    }
    return AdapterFiles(tensors, config)


def _alpha(value: float) -> float:
    # PEFT's alpha is a whole number, and readers that are typed (Ollama's) take no 16.0
    return round(value) if math.isclose(value, round(value), rel_tol=1e-14) else value


def commonest(values: Iterable[Any]) -> Any:
    """Return the most frequent value."""
    return Counter(values).most_common(1)[0][0]


def _commonest_scaling(sizes: Mapping[str, int], scalings: Mapping[str, float]) -> float:
    classes, exact = Counter[float](), Counter[float]()
    for layer, size in sizes.items():
        classes[math.frexp(scalings[layer])[0]] += size
        exact[scalings[layer]] += size
    mantissa = classes.most_common(1)[0][0]
    return max((s for s in exact if math.frexp(s)[0] == mantissa), key=exact.__getitem__)


def _times(factor: Tensor, ratio: float, layer: str) -> Tensor:
    result = (factor.double() * ratio).to(factor.dtype)
    if not torch.isfinite(result).all() or ((result == 0) & (factor != 0)).any():
        raise InputError(
            f"uniform must be False, because {factor.dtype} cannot represent the factors of {layer} "
            f"times {ratio:g}; "
            "save the model in float32"
        )
    return result


def _padded(factor: Tensor, missing: int, dim: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _root_ratio(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total else 0.0
