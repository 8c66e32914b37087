"""Cuts examples into train, validation and test so that the splits never share a text."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tangora._checks import InputError, check_whole
from tangora.training.data.examples import Example, content_key
from tangora.training.data.readers import excerpt

_MOST_VALIDATION, _MOST_TEST = 200, 500  # sizes by default, where the data is large enough


class Counts(NamedTuple):
    """Numbers of examples of the three splits.

    ``train=None`` is all remaining examples. ``None`` for the others is a fifth of the data, at most 200 and
    500, or of a
    split of its own all, at most 200 and 500.
    """

    train: int | None = None
    validation: int | None = None
    test: int | None = None

    def check(self) -> None:
        """Raise `InputError` unless all are whole numbers that can be met."""
        for name, value in self._asdict().items():
            if value is not None:
                check_whole(f"num_{name}", value, low=1 if name == "train" else 0)

    def filled(self) -> "Counts":
        """Return them with 200 validation and 500 test examples where nothing was asked for."""
        return self._replace(
            validation=_MOST_VALIDATION if self.validation is None else self.validation,
            test=_MOST_TEST if self.test is None else self.test,
        )

    def flags(self) -> str:
        """Return the flags that ask for them."""
        return " ".join(
            f"--num-{name} {count}" for name, count in self._asdict().items() if count is not None
        )


class Splits(NamedTuple):
    """The examples of each split."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def unique(examples: Iterable[Example], seen: set[str], limit: int | None = None) -> list[Example]:
    """Keep the first example of each text."""
    kept = []
    for example in examples:
        key = content_key(example)
        if key not in seen and (limit is None or len(kept) < limit):
            seen.add(key)
            kept.append(example)
    return kept


def check_disjoint(splits: Mapping[str, Sequence[Example]]) -> None:
    """Raise unless no two splits hold the same example, by the SHA-256 of what `content_key` says of each."""
    owners: dict[bytes, tuple[str, int]] = {}
    for name, examples in splits.items():
        for number, example in enumerate(examples):
            key = content_key(example)
            other, first = owners.setdefault(hashlib.sha256(key.encode()).digest(), (name, number))
            if other != name:
                raise InputError(
                    f"splits must not overlap; {name} example {number} is {other} example {first}: {excerpt(key)}"
                )


def stratified_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Shuffle examples so that every stretch of them holds each label in its share.

    The i-th of the n shuffled examples of a label gets the position (i + u) / n with u uniform in [0, 1), and all
    are sorted by position. Without labels this is an ordinary shuffle.
    """
    rng = random.Random(seed)
    groups: dict[int | None, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.get("label")].append(example)
    placed: list[tuple[float, Example]] = []
    for _, group in sorted(groups.items(), key=lambda item: -1 if item[0] is None else item[0]):
        rng.shuffle(group)
        placed += [((index + rng.random()) / len(group), example) for index, example in enumerate(group)]
    return [example for _, example in sorted(placed, key=lambda pair: pair[0])]


def make_splits(
    pools: Mapping[str, list[Example]], counts: Counts, seed: int, name: str = "the data"
) -> Splits:
    """Cut examples into splits.

    Duplicates go first, from train before validation before test. A validation or test split that the data set
    does not bring is cut from its train split, test first, so that the test split does not depend on the others.
    """
    seen: set[str] = set()
    ordered = {
        split: stratified_order(unique(pools[split], seen), seed)
        for split in ("test", "validation", "train")
        if pools.get(split)
    }
    available = {name: len(pool) for name, pool in ordered.items()}
    wanted = fitting(available, counts)
    if not _fits(available, wanted):
        _refuse(name, sum(map(len, pools.values())), available, counts)
    rest = ordered["train"]
    taken: dict[str, tuple[Example, ...]] = {}
    for split, count in (("test", wanted.test), ("validation", wanted.validation)):
        taken[split] = tuple(ordered.get(split, rest)[:count])
        if split not in ordered:
            rest = rest[count:]
    return Splits(tuple(rest[: wanted.train]), taken["validation"], taken["test"])


def fitting(available: Mapping[str, int], counts: Counts) -> Counts:
    """Fill in the counts that were left open, as far as the others leave room."""
    pool = available.get("train", 0)
    test = counts.test
    if test is None:
        test = min(_MOST_TEST, available.get("test", max(1, pool // 5)))
    cut = 0 if "test" in available else test
    validation = counts.validation
    if validation is None:
        # a quarter of what a fifth has left is a fifth of the whole
        validation = min(_MOST_VALIDATION, available.get("validation", max(1, (pool - cut) // 4)))
    cut += 0 if "validation" in available else validation
    return Counts(pool - cut if counts.train is None else counts.train, validation, test)


def _fits(available: Mapping[str, int], counts: Counts) -> bool:
    rest = available.get("train", 0)
    for name in ("test", "validation"):
        count = getattr(counts, name)
        if count > available.get(name, rest):
            return False
        rest -= 0 if name in available else count
    return counts.train is not None and 1 <= counts.train <= rest


def _refuse(name: str, total: int, available: Mapping[str, int], counts: Counts) -> None:
    """Raise, and propose sizes that fit."""
    proposed = fitting(available, Counts())
    has = ", ".join(
        f"{available[split]} different {word}examples"
        for split, word in (("train", ""), ("validation", "validation "), ("test", "test "))
        if split in available
    )
    if total > sum(available.values()):
        has += f" among {total}"
    if not _fits(available, proposed):
        raise InputError(f"training, validation and test each need an example; {name} has {has or 'none'}")
    raise InputError(f"{name} has {has}, too few for {counts.flags()}; these sizes fit: {proposed.flags()}")
