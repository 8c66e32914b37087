"""What a diagnosis found: in words, and by kind of layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tangora.diagnostics import GRADIENT_STARTS, Diagnosis, LayerDiagnosis, LayerGradient
from tangora.diagnostics.records import SHARES, mean_share
from tangora.report import formats
from tangora.report.layer_places import places

ALL = "all layers"
_WORTH_IT = 0.01  # what a rank plan must promise more, as a share of the gradient's energy


class StartName(NamedTuple):
    """How pages write a start: in full, inside a sentence, and in a narrow column's two lines."""

    full: str
    in_sentence: str
    short: str


_START_NAMES = {
    "lora": StartName("plain LoRA", "plain LoRA", "plain\nLoRA"),
    "orthogonal": StartName("orthogonal", "a random orthogonal initialization", "ortho-\ngonal"),
    "pissa": StartName("PiSSA", "PiSSA", "PiSSA"),
    "lora-ga": StartName("LoRA-GA", "LoRA-GA", "LoRA-GA"),
    "lora-one": StartName("LoRA-One", "LoRA-One", "LoRA-One"),
}


def start_name(start: str) -> StartName:
    """Look up how pages write a start; by its own name where there is no other."""
    return _START_NAMES.get(start, StartName(start, start, start))


@dataclass(frozen=True)
class KindRow:
    """Layers of one kind, each weighted with the energy of its gradient."""

    kind: str
    num_layers: int
    energy_share: float
    """Their part in the energy of all layers' base gradients."""
    adapter: float | None
    """Captured energy of the adapter as it stands; None without one."""
    starts: Mapping[str, float]
    """Captured energy by start."""
    held_out: Mapping[str, float]
    """The same on other examples, of the starts that are made from the gradient; empty without any."""
    reachable: float
    """The largest that any adapter of these ranks could have."""
    ranks_needed: Mapping[int, int | None]
    """Smallest common rank that could capture 50, 80, 90 % of their energy; None beyond `known_rank`."""
    known_rank: int
    """Largest rank of which it is known what it could capture."""


def kind_rows(diagnosis: Diagnosis) -> list[KindRow]:
    """Sum a diagnosis up by kind of layer."""
    total = sum(layer.gradient.energy for layer in diagnosis.layers)
    rows = [_row(kind, layers, total) for kind, layers in group_by_kind(diagnosis).items()]
    return [*rows, _row(ALL, diagnosis.layers, total)]


def group_by_kind(diagnosis: Diagnosis) -> dict[str, list[LayerDiagnosis]]:
    """Gather the layers of each kind."""
    where = places(layer.name for layer in diagnosis.layers)
    groups: dict[str, list[LayerDiagnosis]] = {}
    for layer in diagnosis.layers:
        groups.setdefault(where[layer.name].kind, []).append(layer)
    return groups


def _row(kind: str, layers: Sequence[LayerDiagnosis], total: float) -> KindRow:
    gradients = [layer.gradient for layer in layers]
    adapters = [layer.adapter for layer in layers if layer.adapter is not None]
    others = [layer.held_out for layer in layers if layer.held_out is not None]
    return KindRow(
        kind=kind,
        num_layers=len(layers),
        energy_share=sum(gradient.energy for gradient in gradients) / total if total > 0 else 0.0,
        adapter=mean_share([a.captured_energy for a in adapters], [a.gradient for a in adapters])
        if adapters
        else None,
        starts={
            start: mean_share([layer.starts[start] for layer in layers], gradients)
            for start in layers[0].starts
        },
        held_out={
            start: mean_share([other.starts[start] for other in others], others)
            for start in gradient_starts(layers)
        },
        reachable=mean_share([layer.reachable for layer in layers], gradients),
        ranks_needed={share: _common_rank(gradients, share / 100) for share in SHARES},
        known_rank=known_rank(gradients),
    )


def gradient_starts(layers: Sequence[LayerDiagnosis]) -> list[str]:
    """List the starts that were made from the gradient, and looked at on other examples too."""
    other = layers[0].held_out
    return [start for start in GRADIENT_STARTS if other is not None and start in other.starts]


def known_rank(gradients: Sequence[LayerGradient]) -> int:
    """Return the largest rank of which it is known what it could capture in every layer."""
    limits = [gradient.largest_rank for gradient in gradients]
    return min(
        (limit for limit, gradient in zip(limits, gradients, strict=True) if not gradient.complete),
        default=max(limits),
    )


def reachable_shares(gradients: Sequence[LayerGradient]) -> list[float]:
    """Return what adapters of one rank could capture at most, for the ranks 1, 2, …."""
    total = sum(gradient.energy for gradient in gradients)
    if not total > 0:
        return []
    return [
        sum(gradient.reachable(rank) for gradient in gradients) / total
        for rank in range(1, known_rank(gradients) + 1)
    ]


def _common_rank(gradients: Sequence[LayerGradient], share: float) -> int | None:
    shares = enumerate(reachable_shares(gradients), 1)
    return next((rank for rank, reachable in shares if reachable >= share * (1 - 1e-6)), None)


def needed(rank: int | None, known: int) -> str:
    """Write a rank that may lie beyond what is known."""
    return f"> {known}" if rank is None else str(rank)


def diagnosis_sentences(diagnosis: Diagnosis) -> list[str]:
    """Say in words what was found, the most important first."""
    return [
        *_of_adapter(diagnosis),
        *_of_starts(diagnosis),
        *_of_ranks(diagnosis),
        *_of_plan(diagnosis),
        *_of_hungry(diagnosis),
        "These shares are about the first step of training on this data; they do not predict the final result.",
    ]


def _of_adapter(diagnosis: Diagnosis) -> list[str]:
    totals, ranks = diagnosis.totals, ranks_text(layer.rank for layer in diagnosis.layers)
    lora = totals.starts.get("lora")
    if diagnosis.plain_start and lora is not None:
        return [
            f"Plain LoRA of {ranks} captures {formats.small_share(lora)} of the full gradient's energy at its start."
        ]
    if totals.adapter is None:
        return []
    own = ranks_text(layer.adapter.rank for layer in diagnosis.layers if layer.adapter)
    seen = formats.small_share(totals.adapter)
    sentences = [f"The adapter, of {own}, captures {seen} of the full gradient's energy at its own weights."]
    if lora is not None:
        sentences.append(f"Plain LoRA of {ranks} on the base model captures {formats.small_share(lora)}.")
    return sentences


def _of_starts(diagnosis: Diagnosis) -> list[str]:
    totals = diagnosis.totals
    others = sorted((start for start in totals.starts if start != "lora"), key=lambda s: -totals.starts[s])
    parts = [f"no adapter of this rank can capture more than {formats.small_share(totals.reachable)}"]
    if others:
        names = [start_name(start).in_sentence for start in others]
        names[0] += " would capture"
        seen = [
            f"{name} {formats.small_share(totals.starts[start])}"
            for name, start in zip(names, others, strict=True)
        ]
        parts.insert(0, ", ".join(seen))
    text = "; ".join(parts)
    sentences = [f"{text[0].upper()}{text[1:]}."]
    if totals.held_out and (starts := gradient_starts(diagnosis.layers)):
        shares = [
            f"{formats.small_share(totals.held_out[start])} for {start_name(start).in_sentence}"
            for start in starts
        ]
        sentences.append(
            f"On examples that were not used for the initialization, captured energy is {formats.listing(shares)}."
        )
    return sentences


def _of_ranks(diagnosis: Diagnosis) -> list[str]:
    row = kind_rows(diagnosis)[-1]
    # one rank may reach several shares: the largest says it all
    largest = {row.ranks_needed[share]: share for share in SHARES}
    parts = [f"{share} % of the energy {_at_rank(rank, row.known_rank)}" for rank, share in largest.items()]
    return [f"With one rank for all layers, adapters can capture {formats.listing(parts)}."]


def _at_rank(rank: int | None, known: int) -> str:
    return f"only beyond rank {known}" if rank is None else f"from rank {rank} on"


def _of_plan(diagnosis: Diagnosis) -> list[str]:
    plan = diagnosis.plan
    parameters = formats.count(plan.budget)
    if not plan.rank_pattern:
        return [
            f"No other distribution of rank {plan.r}'s {parameters} parameters over layers is expected to capture more."
        ]
    spread = f"the rank plan (ranks {min(plan.ranks.values())} to {max(plan.ranks.values())})"
    shares = (
        f"{formats.tenths(plan.captured_energy)} instead of {formats.tenths(plan.uniform_captured_energy)}"
    )
    if plan.gain < _WORTH_IT:
        text = f"Distributing rank {plan.r}'s {parameters} parameters differently gains little: {spread} could capture "
        return [f"{text}{shares}."]
    text = f"With the {parameters} parameters of rank {plan.r} everywhere, {spread} could capture {shares}."
    if plan.at_limit:
        text += (
            f" {formats.plural(len(plan.at_limit), 'layer')} got the largest rank that was examined; a larger "
            "num_values may find more."
        )
    return [text]


def _of_hungry(diagnosis: Diagnosis) -> list[str]:
    parts = [
        f"{layer.name} ({formats.small_share(diagnosis.missed_share(layer))})"
        for layer in diagnosis.starving(3)
    ]
    whom = "the adapter" if diagnosis.totals.adapter is not None else "the first initialization"
    return [
        f"What {whom} misses is largest in {formats.listing(parts)}, as shares of the whole gradient's energy."
    ]


def ranks_text(ranks: Iterable[int]) -> str:
    """Write the rank of an adapter, or the range of its ranks."""
    distinct = sorted(set(ranks))
    return f"rank {distinct[0]}" if len(distinct) == 1 else f"ranks {distinct[0]} to {distinct[-1]}"
