"""Splits: they never share a text, do not depend on each other, and have sizes that fit."""

import random
import re

import pytest

from tangora._checks import InputError
from tangora.training.data import Task, load_task
from tangora.training.data.examples import content_key
from tangora.training.data.splits import Counts, make_splits, stratified_order
from tests.training.tiny import labelled_rows, reviews, write_csv, write_jsonl

SMALL = {"num_validation": 3, "num_test": 4}


def keys(examples):
    return [content_key(example) for example in examples]


def prompts(count, name=""):
    return [{"prompt": f"{name}{index}", "completion": "x"} for index in range(count)]


def sizes(splits):
    return [len(split) for split in splits]


def test_duplicates_never_cross_splits(tmp_path):
    texts = [f"text  {index % 15}" + " " * (index % 2) for index in range(60)]
    values = [{"text": text, "label": index % 3 % 2} for index, text in enumerate(texts)]
    task = load_task(write_jsonl(tmp_path / "a.jsonl", values), **SMALL)
    every = keys((*task.train, *task.validation, *task.test))
    assert len(set(every)) == len(every) == 15


def test_contradictory_texts_are_told_and_never_in_two_splits(tmp_path):
    rows = [{"text": f"t {index // 2}", "label": ["a", "b"][index % 2]} for index in range(60)]
    rows += [{"text": f"u {index}", "label": "ab"[index % 2]} for index in range(10)]
    task = load_task(write_jsonl(tmp_path / "f.jsonl", rows))
    told = "\n".join(task.notes)
    assert "30 texts have different labels" in told
    assert "30 of 70 examples repeat the text" in told
    texts = keys((*task.train, *task.validation, *task.test))
    assert len(set(texts)) == len(texts) == 40


def test_the_seed_and_nothing_else_says_the_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", labelled_rows(40))
    random.seed(1)
    first = load_task(path, **SMALL)
    random.seed(2)
    assert load_task(path, **SMALL).fingerprint == first.fingerprint
    assert load_task(path, seed=1, **SMALL).fingerprint != first.fingerprint
    fewer = load_task(path, num_train=5, num_validation=2, num_test=4)
    assert fewer.test == first.test
    assert fewer.validation == first.validation[:2]


def test_every_stretch_holds_each_label_in_its_share():
    examples = [{"text": str(index), "label": 0 if index < 90 else 1} for index in range(120)]
    order = stratified_order(examples, seed=3)
    assert sorted(keys(order)) == sorted(keys(examples))
    for start in range(0, 120, 20):
        assert abs(sum(example["label"] for example in order[start : start + 20]) - 5) <= 1
    assert keys(order) != keys(stratified_order(examples, seed=4))


def test_own_splits_of_a_data_set_are_kept_and_cleaned():
    pools = {name: prompts(6, name) for name in ("train", "validation", "test")}
    pools["train"].append(pools["test"][0])
    pools["validation"].append(pools["test"][1])
    splits = make_splits(pools, Counts(None, 5, 5), seed=0)
    assert len(splits.train) == 6
    assert all(key.startswith("validation") for key in keys(splits.validation))
    assert all(key.startswith("test") for key in keys(splits.test))


def test_own_splits_are_taken_whole_up_to_the_caps():
    pools = {name: prompts(size, name) for name, size in (("train", 10), ("validation", 300), ("test", 30))}
    assert sizes(make_splits(pools, Counts(), seed=0)) == [10, 200, 30]


def test_default_sizes_are_shares(tmp_path):
    path = write_csv(tmp_path / "f.csv", ["review", "sentiment"], reviews())
    task = load_task(path)
    assert sizes((task.train, task.validation, task.test)) == [120, 40, 40]
    told = " ".join(task.notes)
    for part in ("text = 'review', label = 'sentiment'", "bad (100), good (100)", "120 training, 40 val"):
        assert part in told
    some = load_task(path, num_test=20)
    assert sizes((some.train, some.validation, some.test)) == [135, 45, 20]


@pytest.mark.parametrize("count", [3, 4, 5, 7, 20, 99, 700, 2500, 4000])
def test_default_sizes_always_fit_and_are_capped(count):
    train, validation, test = sizes(make_splits({"train": prompts(count)}, Counts(), seed=0))
    assert train + validation + test == count
    assert test == min(500, max(1, count // 5))
    assert 1 <= validation <= 200
    assert train >= count / 3


@pytest.mark.messages
@pytest.mark.parametrize(
    "options",
    [
        {"num_test": 500},
        {"num_validation": 300},
        {"num_train": 199},
        {"num_test": 201, "num_validation": 0},
        {"num_test": 4, "num_validation": 197},
        {"num_train": 194, **SMALL},
    ],
)
def test_sizes_that_do_not_fit_are_answered_with_all_that_do(tmp_path, options):
    path = write_csv(tmp_path / "f.csv", ["review", "sentiment"], reviews())
    with pytest.raises(InputError, match=r"f\.csv has 200 different examples, too few") as caught:
        load_task(path, **options)
    fitting = re.findall(r"--num-(\w+) (\d+)", str(caught.value).split("fit:")[1])
    task = load_task(path, **{f"num_{name}": int(number) for name, number in fitting})
    assert len(task.train) + len(task.validation) + len(task.test) == 200


@pytest.mark.parametrize("name", ["validation", "test"])
@pytest.mark.parametrize(
    ("kind", "one", "same"),
    [
        ("classification", {"text": "a b", "label": 0}, {"text": " a  b\n", "label": 1}),
        ("causal", {"prompt": "2 + 2", "completion": "4"}, {"prompt": "2 + 2 ", "completion": "5"}),
        ("causal", {"prompt": "", "completion": "news"}, {"prompt": "", "completion": "news "}),
        ("classification", {"pixels": [[[0.5]]], "label": 0}, {"pixels": [[[0.5]]], "label": 1}),
    ],
)
def test_a_task_has_no_overlap(name, kind, one, same):
    splits = {"train": (one,), "validation": (), "test": ()}
    Task("own", kind, **splits)
    with pytest.raises(InputError, match=f"{name} example 0 is train example 0: "):
        Task("own", kind, **splits | {name: (same,)})


def test_the_same_completion_may_answer_two_questions():
    rows = [({"prompt": f"{number} ?", "completion": "1"},) for number in range(3)]
    assert Task("own", "causal", *rows).test == rows[2]
