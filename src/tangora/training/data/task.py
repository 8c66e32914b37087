"""Tasks: named data sets as train, validation and test examples. The entry point of the other data modules."""

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tangora._checks import InputError, check_choice, check_kind, check_seed
from tangora.training.data.columns import Columns, Example, infer_kind, to_examples
from tangora.training.data.generated import PREFIX, PROBLEM, generate_splits
from tangora.training.data.sources import (
    PACKAGED_CORPORA,
    PACKAGED_IMAGES,
    READERS,
    RawData,
    read_digit_images,
    read_file,
    read_folder,
    read_hub,
)
from tangora.training.data.splits import Counts, check_disjoint, make_splits
from tangora.training.models import KINDS, Kind
from tangora.training.models.hub import hub_problem
from tangora.training.models.packaged import locate, near_hint
from tangora.training.paths import is_data_path


@dataclass(frozen=True)
class Task:
    """A data set, ready to be trained on. Its splits share no text, prompt or image, which is checked.

    Attributes:
        name: As the user gave it.
        kind: ``classification`` or ``causal``.
        train: Examples ``{"text", "label"}`` (pairs of texts have a ``"text_pair"`` too), ``{"pixels", "label"}`` or
            ``{"prompt", "completion"}``, the last sometimes with the final ``"answer"``, the generated ``"problem"``;
            plain language modelling has empty prompts.
        validation: Examples to choose learning rates with.
        test: Examples to report.
        labels: Names of the classes; empty for causal tasks.

    Raises:
        InputError: If two splits share an example.
    """

    name: str
    kind: Kind
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...] = ()

    def __post_init__(self):
        check_disjoint({"train": self.train, "validation": self.validation, "test": self.test})

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the splits in their order: the same for the same data, whatever its name."""
        # a problem is what its prompt was made of, and need not be JSON
        splits = [
            [{key: value for key, value in example.items() if key != PROBLEM} for example in split]
            for split in (self.train, self.validation, self.test)
        ]
        content = [self.kind, self.labels, *splits]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_task(
    spec: str,
    *,
    kind: Kind | None = None,
    num_train: int | None = None,
    num_validation: int = 200,
    num_test: int = 500,
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
            ``reasoning-gym:<dataset>[,key=value...]``; a local ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file; a
            local folder of ``<label>/*.txt``; or a hub data set, ``name`` or ``name/config``.
        kind: ``classification`` or ``causal``; by default the former where there is a label.
        num_train: Number of training examples in [1, inf); by default all that remain, or 2000 generated ones.
        num_validation: Number of validation examples, in [0, inf).
        num_test: Number of test examples, in [0, inf).
        seed: Says which example goes where, or which are generated; in [0, inf).
        test_spec: Another data set to test on, as ``spec`` names them: its ``test`` split, or all of it.
        text_column: Column of the text, by default ``text``; ``premise,hypothesis`` for pairs. Here and below, ``a|b``
            is the first that a data set has.
        label_column: Column of the label, by default ``label``.
        prompt_column: Column of the prompt, by default ``prompt``.
        completion_column: Column of the completion, by default ``completion``.

    Returns:
        The task; the same for the same arguments. The test examples do not depend on ``num_train``.

    Raises:
        InputError: If the data set cannot be found or read, or has too few examples.

    Example:
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
            raise InputError(f"{PREFIX} tasks bring their own test problems; leave test_data out")
        if kind == "classification" or columns != Columns():
            raise InputError(
                f"{PREFIX} tasks are causal and have no columns to choose; leave kind and columns out"
            )
        return Task(spec, "causal", *generate_splits(spec.removeprefix(PREFIX), counts, seed))
    data = _read(spec)
    if kind is None:
        kind = infer_kind(columns, data.columns)
    pools, labels = to_examples(data, kind, columns)
    if test_spec is not None:
        tested, known = to_examples(_read(test_spec), kind, columns)
        if known != labels:
            raise InputError(
                f"test_data must have the labels of data, {', '.join(labels)}; it has {', '.join(known)}"
            )
        pools |= {"test": tested.get("test") or tested["train"]}
    return Task(spec, kind, *make_splits(pools, counts, seed), labels)


def _read(spec: str) -> RawData:
    """Return the rows of a data set, wherever it is."""
    if spec in PACKAGED_CORPORA:
        return read_folder(locate(spec, PACKAGED_CORPORA[spec]))
    if spec in PACKAGED_IMAGES:
        return read_digit_images(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return read_folder(path)
    if path.is_file():
        return read_file(path)
    if is_data_path(spec):
        raise InputError(f"data {spec!r}: there is no such file or folder; {_allowed_tasks()}")
    return _read_hub(spec)


def _read_hub(spec: str) -> RawData:
    """Return the rows of ``name`` or ``name/config`` on the hub; ``a/b`` may be either."""
    names: list[tuple[str, str | None]] = [(spec, None)] if spec.count("/") < 2 else []
    if "/" in spec:
        name, config = spec.rsplit("/", 1)
        names.append((name, config))
    problems = []
    for name, config in names:
        problem, cached = hub_problem(name, "dataset")
        if problem is None or cached:
            try:
                return read_hub(name, config, local=cached)
            except InputError:
                if problem is None:
                    raise
        problems.append(problem)
    hint = near_hint(spec, [*PACKAGED_CORPORA, *PACKAGED_IMAGES, PREFIX.rstrip(":")])
    raise InputError(f"data {spec!r}{hint} is no local file or folder, and {problems[0]}; {_allowed_tasks()}")


def _allowed_tasks() -> str:
    """Return what a task may be, in words."""
    return (
        f"use {', '.join((*PACKAGED_CORPORA, *PACKAGED_IMAGES))}, {PREFIX}<dataset>, "
        f"a {', '.join(list(READERS)[:-1])} or {list(READERS)[-1]} file, a folder of <label>/*.txt, or a hub data set"
    )
