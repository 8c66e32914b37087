"""Memory and messages of training with an adapter, as formulas of its layers; a test checks them on small real runs.

A layer is (m, n, r): its factors are A (r x n) and B (m x r). Sizes are numbers of entries, of 4 bytes each in float32.
"""

from collections.abc import Iterable
from dataclasses import dataclass

Shape = tuple[int, int, int]
FLOAT = 4
HALF = 2


@dataclass(frozen=True)
class State:
    """Optimizer state of a layer, without the counter of steps.

    Attributes:
        factors: Pairs of matrices of the factors' shapes.
        vectors: Pairs of one number for each row and one for each column of the weight.
        cores: Matrices of the rank's size.
        weights: Matrices of the weight's size.
    """

    factors: int = 0
    vectors: int = 0
    cores: int = 0
    weights: int = 0

    def numbers(self, m: int, n: int, r: int) -> int:
        """Return its size for a layer."""
        both = (self.factors * r + self.vectors) * (m + n)
        return both + self.cores * r * r + self.weights * m * n

    @property
    def text(self) -> str:
        """The same as a formula."""
        terms = {"r(m + n)": self.factors, "(m + n)": self.vectors, "r²": self.cores, "mn": self.weights}
        return (
            " + ".join(f"{count if count > 1 else ''}{term}" for term, count in terms.items() if count) or "0"
        )


STATES = {
    "lora": State(factors=2),
    "p-lora": State(factors=2),
    "lora-pro": State(weights=2),
    "lora-pro-factor": State(factors=2),
    "lora-pro-sgd": State(),
    "tangent": State(factors=1, vectors=1),
    "tangent-muon": State(factors=1),
    "factor-muon": State(factors=1),
    "lora-muon": State(factors=1),
    "polora": State(factors=1, vectors=1),
    "lora-rite": State(factors=1, cores=2),
    "odelora-euler": State(),
}
"""By recipe; recipes that differ in their start only have the same."""


def trained(shapes: Iterable[Shape]) -> int:
    """Return the size of the factors: of the adapter, and of its gradients."""
    return sum(r * (m + n) for m, n, r in shapes)


def state(recipe: str, shapes: Iterable[Shape]) -> int:
    """Return the size of an optimizer's state."""
    return sum(STATES[recipe].numbers(*shape) for shape in shapes)


@dataclass(frozen=True)
class Messages:
    """Numbers that processes send each other.

    Attributes:
        gathered: Made whole on every process from everybody's parts, padding included.
        reduced: Added up over all processes, whole on every process afterwards.
        scattered: Added up over all processes, of which each keeps its part.
    """

    gathered: int = 0
    reduced: int = 0
    scattered: int = 0

    def received(self, processes: int) -> float:
        """Return what each process receives, by rings: a sum that all get is scattered and gathered."""
        return (self.gathered + 2 * self.reduced + self.scattered) * (processes - 1) / processes


def sharded_step(recipe: str, shapes: Iterable[Shape], processes: int) -> Messages:
    """Return what a step sends where FSDP2 has cut the factors by rows, for each evaluation of the gradient.

    Factors, gradients and states of their shapes are made whole. Moments of the weight's size are not: the rows of
    their direction are multiplied where they are. One more number says whether all gradients are finite.
    """
    kept = STATES[recipe]
    gathered, reduced = 0, 1
    for m, n, r in shapes:
        rows_of_A, rows_of_B = padded(r, processes), padded(m, processes)
        gathered += (2 + kept.factors) * (rows_of_A * n + rows_of_B * r) + kept.vectors * rows_of_B
        if kept.weights:
            gathered += rows_of_B * r
            reduced += r * n
    return Messages(gathered, reduced)


def averaged(shapes: Iterable[Shape]) -> Messages:
    """Return what is sent for one step where every process has all factors: their gradients."""
    return Messages(reduced=trained(shapes))


def sharded_pass(parameters: Iterable[tuple[tuple[int, ...], bool, bool]], processes: int) -> Messages:
    """Return what FSDP2 itself sends in a forward and a backward pass.

    Args:
        parameters: Shape of each, whether it is trained, and whether its module is gathered again in the backward pass
            (all but the outermost one).
        processes: Their number.
    """
    gathered = scattered = 0
    for (rows, *others), is_trained, is_gathered_twice in parameters:
        size = padded(rows, processes)
        for other in others:
            size *= other
        gathered += size * (2 if is_gathered_twice else 1)
        scattered += size if is_trained else 0
    return Messages(gathered, scattered=scattered)


def sharded_base(weights: int, embedding: int) -> Messages:
    """Return what a base that transformers has sharded sends: all is gathered in the forward and in the backward pass.

    Args:
        weights: Of the whole base.
        embedding: Of its input embedding, which the backward pass does not need.
    """
    return Messages(gathered=2 * weights - embedding)


def padded(rows: int, processes: int) -> int:
    """Return the rows that all processes hold together when each holds equally many."""
    return processes * -(-rows // processes)


def read_by_start(shapes: Iterable[Shape]) -> int:
    """Return the size of the products with gradients that ``initialize(model, "lora-ga")`` reads in its first pass."""
    size = 0
    for m, n, r in shapes:
        right = min(2 * r + max(8, min(10 * r, 80)), m, n)
        left = min(7 * right // 4, m)
        size += min((right + 8) * m + left * n, m * n)  # the gradient itself where that is smaller
    return size
