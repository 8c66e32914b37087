"""The first phase of a recipe that trains in two: how long it is, and how fast it learns."""

from dataclasses import dataclass

from tangora._checks import InputError, check_number, check_whole

_SHORTEST = 3  # an allocation of ranks, a final one, and a step after it


@dataclass(frozen=True)
class RankSearch:
    """A first phase of training, in which AdaLoRA finds the rank of every layer with AdamW."""

    fraction: float = 1 / 3
    """Its share of all optimizer steps, in (0, 1); the recipe's own optimizer takes the others."""
    lr: float = 1e-2
    """Peak learning rate of its AdamW: large, because AdaLoRA's factors begin near zero and this phase is short."""

    def __post_init__(self) -> None:
        check_number("search_fraction", self.fraction, low=0, high=1, open_low=True, open_high=True)
        check_number("search_lr", self.lr, low=0, open_low=True)

    def num_steps(self, total: int) -> int:
        """Return its number of optimizer steps.

        Args:
            total: Number of steps of both phases.

        Raises:
            InputError: If there are too few for two phases.
        """
        check_whole("total", total, low=1)
        if total <= _SHORTEST:
            raise InputError(
                f"a search for ranks and training after it need at least {_SHORTEST + 1} optimizer steps; got {total}"
            )
        return min(max(_SHORTEST, round(self.fraction * total)), total - 1)
