"""Cuts examples into train, validation and test so that the splits never share a text."""

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tangora._checks import InputError, check_whole
from tangora.training.data.columns import Example, content_key, shown


class Counts(NamedTuple):
    """How many examples each split gets; ``train=None`` is all that remain."""

    train: int | None
    validation: int
    test: int

    def check(self) -> None:
        """Raise `InputError` unless all are whole numbers that can be met."""
        for name, value, low in (
            ("num_train", self.train, 1),
            ("num_validation", self.validation, 0),
            ("num_test", self.test, 0),
        ):
            if value is not None:
                check_whole(name, value, low=low)


class Splits(NamedTuple):
    """The examples of each split."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def unique(examples: Iterable[Example], seen: set[str], limit: int | None = None) -> list[Example]:
    """Keep the first example of each text.

    Args:
        examples: Of either kind.
        seen: Texts that are taken; those kept are added.
        limit: How many to keep at most; by default all.

    Returns:
        The examples whose text was not in ``seen``.
    """
    kept = []
    for example in examples:
        key = content_key(example)
        if key not in seen and (limit is None or len(kept) < limit):
            seen.add(key)
            kept.append(example)
    return kept


def check_disjoint(splits: Mapping[str, Sequence[Example]]) -> None:
    """Raise unless no two splits hold the same example, by the SHA-256 of what `content_key` says of each.

    Args:
        splits: Examples by split.

    Raises:
        InputError: Naming the first example that an earlier split holds too.
    """
    owners: dict[bytes, tuple[str, int]] = {}
    for name, examples in splits.items():
        for number, example in enumerate(examples):
            key = content_key(example)
            other, first = owners.setdefault(hashlib.sha256(key.encode()).digest(), (name, number))
            if other != name:
                raise InputError(
                    f"splits must not overlap; {name} example {number} is {other} example {first}: {shown(key)}"
                )


def stratified_order(examples: Iterable[Example], seed: int) -> list[Example]:
    """Shuffle examples so that every stretch of them holds each label in its share.

    The i-th of the n shuffled examples of a label gets the position (i + u) / n with u uniform in [0, 1), and all
    are sorted by position. Without labels this is an ordinary shuffle.

    Args:
        examples: Of either kind.
        seed: Says the order.

    Returns:
        The examples in their new order.
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


def make_splits(pools: Mapping[str, list[Example]], counts: Counts, seed: int) -> Splits:
    """Cut examples into splits.

    Duplicates go first, from train before validation before test. A validation or test split that the data set
    does not bring is cut from its train split, test first, so that the test split does not depend on the others.

    Args:
        pools: Examples by the split that they come in; at least ``train``.
        counts: How many to take.
        seed: Says which.

    Returns:
        The splits.

    Raises:
        InputError: If there are too few examples.
    """
    seen: set[str] = set()
    ordered = {
        name: stratified_order(unique(pools[name], seen), seed)
        for name in ("test", "validation", "train")
        if pools.get(name)
    }
    rest = ordered.get("train", [])
    taken: dict[str, tuple[Example, ...]] = {}
    for name, count in (("test", counts.test), ("validation", counts.validation)):
        pool = ordered.get(name, rest)
        if count > len(pool):
            raise InputError(
                f"num_{name} must be at most {len(pool)}, the number of different examples; got {count}"
            )
        taken[name] = tuple(pool[:count])
        if name not in ordered:
            rest = rest[count:]
    num_train = len(rest) if counts.train is None else counts.train
    if not 1 <= num_train <= len(rest):
        asked = "all that remain" if counts.train is None else counts.train
        raise InputError(
            f"num_train must be in [1, {len(rest)}], {len(rest)} being what num_validation={counts.validation} "
            f"and num_test={counts.test} leave; got {asked}"
        )
    return Splits(tuple(rest[:num_train]), taken["validation"], taken["test"])
