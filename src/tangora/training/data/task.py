"""Tasks: named data sets as train, validation and test examples. The entry point of the other data modules."""

import copy
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from tangora._checks import InputError, check_choice, check_kind, check_seed
from tangora.training.data.examples import Example, class_notes, repeats, to_examples
from tangora.training.data.generated import PREFIX, PROBLEM, generate_splits
from tangora.training.data.images import StoredImage
from tangora.training.data.readers import listed
from tangora.training.data.recognise import Columns, recognise
from tangora.training.data.sources import BUILT_IN_DATA, read_data
from tangora.training.data.splits import Counts, Splits, check_disjoint, make_splits
from tangora.training.models import KINDS, Kind


@dataclass(frozen=True)
class Task:
    """A data set, ready to be trained on. Its splits share no text, prompt or image, which is checked."""

    name: str  # as the user gave it
    kind: Kind
    train: tuple[Example, ...]
    validation: tuple[Example, ...]  # to choose learning rates with
    test: tuple[Example, ...]  # to report
    labels: tuple[str, ...] = ()  # names of the classes; empty for causal tasks
    notes: tuple[str, ...] = ()  # decisions about the data, such as its columns; one sentence each

    def __post_init__(self):
        check_disjoint({"train": self.train, "validation": self.validation, "test": self.test})

    def noted(self, notes: Iterable[str]) -> "Task":
        """Return the same data with more notes."""
        same = copy.copy(self)  # its splits have been compared, and its fingerprint taken
        object.__setattr__(same, "notes", (*self.notes, *notes))
        return same

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the splits in their order: the same for the same data, whatever its name."""
        # a problem is what its prompt was made of, and need not be JSON
        splits = [
            [{key: value for key, value in example.items() if key != PROBLEM} for example in split]
            for split in (self.train, self.validation, self.test)
        ]
        content = [self.kind, self.labels, *splits]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=_digest).encode()).hexdigest()


def _digest(value: StoredImage) -> str:
    return value.digest


def load_task(
    spec: str | os.PathLike[str],
    *,
    kind: Kind | None = None,
    num_train: int | None = None,
    num_validation: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
    test_spec: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
) -> Task:
    """Load a data set and cut it into splits that share no text, prompt or image.

    Args:
        spec: ``bbc-news``; ``digits`` (images of 5 to 9); ``digits-permuted`` (all ten, their pixels out of order);
            ``mnist-5k``; ``textures`` (brick, grass, gravel); ``chatterbot`` (conversations);
            ``reasoning-gym:<dataset>[,key=value...]``; a local ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or
            ``.parquet`` file; a local folder of ``<label>/*.txt`` or of images, ``<label>/*.png``; or a hub data set,
            ``owner/name`` or ``owner/name/config``.
        kind: ``classification`` or ``causal``; by default the former where there is a label beside a text.
        num_train: Number of training examples in [1, inf); by default all remaining examples, or 2000 generated ones.
        num_validation: Number of validation examples, in [0, inf); by default a fifth of the data, at most 200, and
            200 of packaged and generated data. Of a data set with a validation split, all of it, at most 200.
        num_test: Number of test examples, in [0, inf); by default a fifth of the data, at most 500, and 500 of packaged
            and generated data. Of a data set with a test split, all of it, at most 500.
        seed: Seed of the split, or of generated examples; in [0, inf).
        test_spec: Another data set to test on, as ``spec`` names them: its ``test`` split, or all of it.
        text_column: Column of the text, or of the images; ``premise,hypothesis`` for pairs. Here and below, ``a|b`` is
            the first that a data set has, and columns that are not given are recognised by their usual names.

    Returns:
        The task; the same for the same arguments. The test examples do not depend on ``num_train``.

    Raises:
        InputError: If the data set cannot be found or read, or has too few examples.

    Examples:
        >>> task = load_task("bbc-news", num_train=300)
        >>> len(task.train), len(task.validation), len(task.test)
        (300, 200, 500)
        >>> task.labels
        ('business', 'entertainment', 'politics', 'sports', 'tech')
    """
    spec = os.fspath(spec) if isinstance(spec, os.PathLike) else spec
    check_kind("spec", spec, str, "the name of a data set, or its file or folder")
    for column in (text_column, label_column, prompt_column, completion_column, test_spec):
        check_kind("columns and test_spec", column, (str, type(None)), "names")
    check_choice("kind", kind, (None, *KINDS))
    check_seed(seed)
    counts = Counts(num_train, num_validation, num_test)
    counts.check()
    columns = Columns(text_column, label_column, prompt_column, completion_column)
    if any(name is not None and name.startswith(PREFIX) for name in (spec, test_spec)):
        if test_spec is not None:
            raise InputError(f"{PREFIX} tasks have their own test problems; omit test_data")
        if kind == "classification" or columns != Columns():
            raise InputError(
                f"{PREFIX} tasks are causal and have no columns to choose; omit kind and columns"
            )
        return Task(spec, "causal", *generate_splits(spec.removeprefix(PREFIX), counts, seed))
    data, packaged = read_data(spec), spec in BUILT_IN_DATA
    layout = recognise(data, columns, kind)
    pools, labels = to_examples(data, layout)
    notes = [layout.sentence(data.columns)]
    if test_spec is not None:
        other = read_data(test_spec)
        tested_layout = recognise(other, columns, layout.kind)
        tested, _ = to_examples(other, tested_layout, labels)
        pools |= {"test": tested.get("test") or tested["train"]}
        notes.append(f"{other.name}: {tested_layout.sentence(other.columns)}")
    splits = make_splits(
        pools, counts.filled() if packaged and "test" not in pools else counts, seed, data.name
    )
    if packaged:
        return Task(spec, layout.kind, *splits, labels)
    notes += _notes(pools, labels, splits)
    return Task(spec, layout.kind, *splits, labels, tuple(f"{data.name}: {note}" for note in notes))


def _notes(pools: dict[str, list[Example]], labels: tuple[str, ...], splits: Splits) -> list[str]:
    every = [example for pool in pools.values() for example in pool]
    notes = class_notes([labels[example["label"]] for example in every], labels) if labels else []
    same, contradictory = repeats(every)
    if same:
        notes.append(
            f"{same} of {len(every)} examples repeat the text or prompt of another example and are excluded"
        )
    if contradictory:
        notes.append(f"{contradictory} texts have different labels in different places; one of each is kept")
    trained = {example["label"] for example in splits.train} if labels else set()
    if unseen := [name for number, name in enumerate(labels) if number not in trained]:
        notes.append(f"classes without a training example: {listed(unseen)}")
    sizes = Counts(len(splits.train), len(splits.validation), len(splits.test))
    notes.append(f"{sizes.train} training, {sizes.validation} validation and {sizes.test} test examples")
    return notes
