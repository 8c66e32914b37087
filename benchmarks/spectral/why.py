"""Why do spectral steps learn faster? Every few steps of every method, seen in the dense weights.

    python benchmarks/spectral/why.py --data results/prototypes-200.parquet --output results/why.json

All methods see the same batches. Measured over all adapted layers, on fixed examples: the stable rank and the largest
singular values of a step and of the whole change of the weights; the share of the gradient, and of Muon's direction,
that the adapter's tangent space holds; the curvature along the step; the distance to the weights of `full-muon`.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from tangora import load_model, load_task, recipe
from tangora.adapters import find_pairs
from tangora.geometry.tangent import dense_captured_energy, frame
from tangora.training.data import collator, encode

sys.path.insert(0, str(Path(__file__).parents[1]))
from record import environment, save_record

_RATES = {
    "full-muon": 0.01,
    "full": 1e-3,
    "lora": 4e-3,
    "tangent": 1e-3,
    "tangent-muon": 0.02,
    "orthogonal+tangent-muon": 0.02,
}


class Subject:
    """A model being trained, and its adapted weights as dense matrices."""

    def __init__(self, method: str, arguments: argparse.Namespace, task: Any):
        self.loaded = load_model(arguments.model, kind=task.kind, num_labels=len(task.labels) or None, seed=0)
        entry = recipe(method)
        self.model = entry.prepare(
            self.loaded.model,
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            task_type="SEQ_CLS" if task.kind == "classification" else "CAUSAL_LM",
            total_steps=arguments.steps,
        )
        entry.initialize(self.model)
        self.pairs = (
            {} if entry.adapter is None else {_plain(pair.name): pair for pair in find_pairs(self.model)}
        )
        head = {"head_lr": 3e-3} if task.kind == "classification" else {}
        self.optimizer = entry.create_optimizer(self.model, _RATES[method], **head)
        weights = {
            _plain(name.removesuffix(".weight")): parameter
            for name, parameter in self.model.named_parameters()
            if name.endswith(".weight") and parameter.dim() == 2 and "lora_" not in name
        }
        self.bases = weights if not self.pairs else {name: weights[name] for name in self.pairs}

    def weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the effective weights."""
        made = {}
        for name in names:
            made[name] = self.bases[name].detach().clone()
            if name in self.pairs:
                pair = self.pairs[name]
                made[name] += pair.scaling * (pair.B.detach() @ pair.A.detach())
        return made

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss on a batch."""
        return self.model(**batch).loss

    def gradients(self, names: Sequence[str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the effective weights."""
        bases = [self.bases[name] for name in names]
        before = [base.requires_grad for base in bases]
        for base in bases:
            base.requires_grad_(True)
        gradients = torch.autograd.grad(self.loss(batch), bases)
        for base, flag in zip(bases, before, strict=True):
            base.requires_grad_(flag)
        return dict(zip(names, gradients, strict=True))

    @torch.no_grad()
    def curvature_along(self, step: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> float:
        """Return the second difference of the loss along a step of the weights, per squared length."""
        losses = []
        for sign in (1.0, -2.0, 1.0):
            for name, change in step.items():
                self.bases[name] += sign * change
            losses.append(self.loss(batch).item())
        # after +1, -2, +1 the weights are where they were: losses at +step, -step and here
        length = sum(change.square().sum().item() for change in step.values())
        return (losses[0] + losses[1] - 2 * losses[2]) / max(length, 1e-30)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _spectrum(change: Mapping[str, Tensor]) -> dict[str, Any]:
    values = [torch.linalg.svdvals(each) for each in change.values()]
    values = [each for each in values if each[0] > 0]
    if not values:
        return {"stable_rank": 0.0, "spectral_norm": 0.0, "singular_values": []}
    relative = torch.stack([(each / each[0])[:16] for each in values if len(each) >= 16])
    return {
        "stable_rank": fmean((each.square().sum() / each[0] ** 2).item() for each in values),
        "spectral_norm": fmean(each[0].item() for each in values),
        "singular_values": [round(each, 4) for each in relative.mean(0).tolist()],
    }


def _norm(change: Mapping[str, Tensor]) -> float:
    return sum(each.square().sum().item() for each in change.values()) ** 0.5


def measure(
    subject: Subject,
    before: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    muon: Mapping[str, Tensor] | None,
    batch: Any,
) -> dict[str, Any]:
    """Measure one point of a trajectory."""
    names = list(start)
    now = subject.weights(names)
    step = {name: now[name] - before[name] for name in names}
    change = {name: now[name] - start[name] for name in names}
    gradients = subject.gradients(names, batch)
    made: dict[str, Any] = {"step_of_weights": _spectrum(step), "change": _spectrum(change)}
    if subject.pairs:
        frames = {name: frame(pair.A.detach(), pair.B.detach()) for name, pair in subject.pairs.items()}
        energy = sum(g.square().sum().item() for g in gradients.values())
        held = sum(
            dense_captured_energy(frames[name], g).item() * g.square().sum().item()
            for name, g in gradients.items()
        )
        made["captured_gradient"] = held / energy
        made["captured_muon"] = fmean(
            dense_captured_energy(frames[name], _msign(g)).item() for name, g in gradients.items()
        )
    made["curvature_along_step"] = subject.curvature_along(step, batch)
    made["loss_on_fixed"] = subject.loss(batch).item()
    if muon is not None:
        made["distance_to_full_muon"] = _norm({name: now[name] - muon[name] for name in names}) / max(
            _norm({name: muon[name] - start[name] for name in names}), 1e-30
        )
    return made


def _msign(matrix: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = 1e-6 * S[0] < S
    return U[:, kept] @ Vh[kept]


def train(
    method: str, arguments: argparse.Namespace, task: Any, muon: dict[int, Any] | None
) -> tuple[list, dict[int, Any]]:
    """Train with one method; return the points, and the weights at them."""
    torch.manual_seed(0)
    subject = Subject(method, arguments, task)
    data = encode(task.train, subject.loaded.tokenizer, kind=task.kind, max_length=arguments.max_length)
    collate = collator(subject.loaded.tokenizer, task.kind)
    generator = torch.Generator().manual_seed(arguments.seed)
    order = torch.cat(
        [
            torch.randperm(len(data), generator=generator)
            for _ in range(-(-arguments.steps * arguments.batch_size // len(data)))
        ]
    ).split(arguments.batch_size)
    fixed = dict(collate([data[i] for i in range(min(arguments.fixed, len(data)))]))
    trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    schedule = LambdaLR(subject.optimizer, lambda step: 1 - step / arguments.steps)
    names = [name for name in arguments.layers if name in subject.bases]
    start = subject.weights(names)
    points, places = [], {}
    for step in range(arguments.steps):
        measured = step % arguments.every == 0 or step == arguments.steps - 1
        before = subject.weights(names) if measured else None
        subject.optimizer.zero_grad()
        subject.model.train()
        loss = subject.loss(dict(collate([data[i] for i in order[step].tolist()])))
        loss.backward()
        clip_grad_norm_(trained, 1.0)
        subject.optimizer.step()
        schedule.step()
        subject.model.eval()
        if before is not None:
            own = (muon or {}).get(step)
            points.append(
                {"step": step + 1, "loss": loss.item(), **measure(subject, before, start, own, fixed)}
            )
            if method == "full-muon":
                places[step] = subject.weights(names)
    return points, places


def main() -> None:
    """Train with all methods, and write what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit-digits")
    parser.add_argument("--data", required=True)
    parser.add_argument("--kind", default=None)
    parser.add_argument("--methods", default=",".join(_RATES))
    parser.add_argument("--rates", default="", help="other learning rates: method=rate,...")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--fixed", type=int, default=512)
    parser.add_argument("--num-train", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--layers", default="", help="regular expression: only adapted layers whose name has it"
    )
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    for each in filter(None, arguments.rates.split(",")):
        name, _, rate = each.partition("=")
        _RATES[name] = float(rate)
    task = load_task(
        arguments.data, kind=arguments.kind, num_train=arguments.num_train, num_validation=64, num_test=64
    )
    pattern = arguments.layers
    arguments.layers = [name for name in _layers(arguments, task) if re.search(pattern, name)]
    methods = arguments.methods.split(",")
    found: dict[str, Any] = {}
    muon: dict[int, Any] | None = None
    for method in methods:
        points, places = train(method, arguments, task, muon)
        muon = places or muon
        found[method] = {"learning_rate": _RATES[method], "points": points}
        last = points[-1]
        print(
            method,
            json.dumps({key: value for key, value in last.items() if not isinstance(value, dict)}),
            flush=True,
        )
    settings = {**vars(arguments), "layers": pattern}
    del settings["output"]
    save_record(arguments.output, {**environment(), "settings": settings, "methods": found})


def _layers(arguments: argparse.Namespace, task: Any) -> list[str]:
    loaded = load_model(arguments.model, kind=task.kind, num_labels=len(task.labels) or None, seed=0)
    kind = "SEQ_CLS" if task.kind == "classification" else "CAUSAL_LM"
    model: nn.Module = recipe("lora").prepare(loaded.model, r=1, lora_alpha=1, task_type=kind, total_steps=1)
    return [_plain(pair.name) for pair in find_pairs(model)]


if __name__ == "__main__":
    main()
