"""Rows to examples: their contents, their labels, and what a message says about a bad one."""

import re

import pytest

from tangora._checks import InputError
from tangora.training.data import load_task
from tangora.training.data.examples import to_examples
from tangora.training.data.readers import RawData, RawRow
from tangora.training.data.recognise import Columns, recognise
from tests.training.tiny import labelled_rows, reviews, write_csv, write_jsonl

SMALL = {"num_validation": 3, "num_test": 4}


def every(task):
    return [*task.train, *task.validation, *task.test]


def test_columns_by_name(tmp_path):
    values = [{"q": f"q{i}", "a": f"a{i}", "answer": str(i)} for i in range(9)]
    task = load_task(write_jsonl(tmp_path / "a.jsonl", values), prompt_column="q", completion_column="a")
    assert task.kind == "causal"
    example = task.train[0]
    assert example["completion"] == f"a{example['answer']}"
    assert set(example) == {"prompt", "completion", "answer"}


def test_numbers_are_answers(tmp_path):
    answers = [0, 0.5, True, None]
    values = [{"prompt": f"{i}?", "completion": "so", "answer": answers[i % 4]} for i in range(9)]
    task = load_task(write_jsonl(tmp_path / "a.jsonl", values), num_validation=0, num_test=1)
    found = {example["prompt"]: example.get("answer") for example in every(task)}
    assert [found[f"{i}?"] for i in range(4)] == ["0", "0.5", None, None]


def test_pairs_of_texts(tmp_path):
    values = [{"left": f"a {index}", "right": f"b {index}", "label": index % 2} for index in range(20)]
    values.append({"left": "a 0", "right": "b 1", "label": 0})  # not another pair with the same left
    task = load_task(write_jsonl(tmp_path / "a.jsonl", values), text_column="left, right", **SMALL)
    pairs = {(row["left"], row["right"]) for row in values}
    assert {(example["text"], example["text_pair"]) for example in every(task)} == pairs


def test_instructions_with_an_input(tmp_path):
    rows = [
        {"instruction": f"do {index}", "input": ["", f"this {index}"][index % 2], "output": "done"}
        for index in range(10)
    ]
    task = load_task(write_jsonl(tmp_path / "f.jsonl", rows))
    assert {example["prompt"] for example in every(task)} == {
        f"do {i}\nthis {i}" if i % 2 else f"do {i}" for i in range(10)
    }


def test_the_first_column_that_there_is_and_other_data_to_test_on(tmp_path):
    learnt = [{"query": f"{index} ?", "response": str(index)} for index in range(20)]
    tested = [{"question": f"{index} ?", "answer": str(index)} for index in range(15, 25)]
    path, other = write_jsonl(tmp_path / "a.jsonl", learnt), write_jsonl(tmp_path / "b.jsonl", tested)
    columns = {"prompt_column": "query|question", "completion_column": "response|answer"}
    task = load_task(path, test_spec=other, num_validation=3, num_test=10, **columns)
    assert {example["prompt"] for example in task.test} == {row["question"] for row in tested}
    # examples of both are tested, not learnt
    assert {example["prompt"] for example in (*task.train, *task.validation)} == {f"{i} ?" for i in range(15)}


def test_data_to_test_on_may_lack_a_class_and_have_other_headers(tmp_path):
    learnt = write_csv(tmp_path / "a.csv", ["review", "sentiment"], reviews(30))
    tested = write_csv(tmp_path / "b.csv", ["Text", "Label"], [[f"other {i}", "good"] for i in range(6)])
    task = load_task(learnt, test_spec=tested)
    assert [task.labels[example["label"]] for example in task.test] == ["good"] * 6


def test_conversations_of_all_forms_are_the_same(tmp_path):
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    ours = [
        [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": f"ask {i}"},
            {"role": "assistant", "content": f"say {i}"},
        ]
        for i in range(10)
    ]
    theirs = [[{"from": roles[each["role"]], "value": each["content"]} for each in turns] for turns in ours]
    parts = [
        [each | {"content": [{"type": "text", "text": each["content"]}]} for each in turns] for turns in ours
    ]
    prints = set()
    for column, values in (("messages", ours), ("conversations", theirs), ("conversation", parts)):
        path = write_jsonl(tmp_path / f"{column}.jsonl", [{column: turns} for turns in values])
        task = load_task(path)
        assert task.kind == "causal"
        assert task.train[0]["messages"][0] == ours[0][0]
        assert task.train[0]["prompt"].startswith("be short\nask")
        prints.add(task.fingerprint)
    assert len(prints) == 1


def labelled(tmp_path, labels):
    rows = [{"text": f"t {index}", "label": label} for index, label in enumerate(labels)]
    return write_jsonl(tmp_path / "f.jsonl", rows)


def test_labels_are_in_their_order_and_written_in_one_way(tmp_path):
    assert load_task(labelled(tmp_path, [i % 11 for i in range(44)])).labels == tuple(map(str, range(11)))
    assert load_task(labelled(tmp_path, [3, "3", " 3 ", 3.0, 1, "1"] * 5)).labels == ("1", "3")
    stars = [str(index % 10 / 2) for index in range(60)]  # half stars are classes
    assert len(load_task(labelled(tmp_path, stars)).labels) == 10


def test_rare_and_alike_classes_are_told(tmp_path):
    task = load_task(labelled(tmp_path, ["good", "bad", "Good"] * 6 + ["odd"]))
    told = "\n".join(task.notes)
    assert re.search("a single example, .*: odd", told)
    assert "differ only in capital letters: Good, good" in told
    task = load_task(labelled(tmp_path, ["business", "sport"] * 6 + ["busines", "odd"]))
    told = "\n".join(task.notes)
    assert "busines (did you mean business?), odd" in told


@pytest.mark.messages
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([str(index / 37) for index in range(60)], r"60 different numbers, such as 0\.027.*regression"),
        ([index / 7 + 0.01 for index in range(60)], "regression"),
        ([f"name {index}" for index in range(60)], "60 different labels in 60 examples"),
        ([f"name {index % 40}" for index in range(60)], "40 different labels in 60 examples"),
        (["a", "b\x00"] * 10, "control characters"),
        (["a", "b\nc"] * 10, "control characters"),
        (["1", "1.0"] * 10, r"'1' and '1\.0' are the same number"),
        ([True, None] * 10, "must hold text or a whole number; got None"),
        (["a"] * 10, "at least 2 different labels"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, message):
    with pytest.raises(InputError, match=message) as caught:
        load_task(labelled(tmp_path, labels))
    assert "\n" not in str(caught.value)


GOOD = '{"text": "a", "label": 1}\n'
BAD_LINES = [
    ('{"text": "b"}', ":2: this example has no column 'label'; it has text"),
    ('{"text": 3, "label": 1}', ":2: column 'text' must hold text; got 3"),
    ('{"text": "  ", "label": 1}', ":2: column 'text' must hold text"),
    ('{"text": "a", "label": 0.5}', ":2: column 'label' .*regression"),
    ('{"text": "a", "label": null}', ":2: column 'label' .* whole number; got None"),
    ('{"text": "\\ud800", "label": 1}', ":2: column 'text' must hold Unicode text; surrogates"),
    ('{"text": {"long": "' + 999 * "a" + '"}, "label": 1}', r":2: column 'text'.*got .{80}\.\.\.$"),
]
FIRST_LINES = [
    ('{"text": "a"}\n' + GOOD, ":1: this example has no column 'label'"),  # columns are those of all rows
    ('{"prompt": "a", "completion": null}', ":1: column 'completion' must hold text; got None"),
    ('{"prompt": "a", "completion": "b"}\n{"text": "c"}', ":2: this example has no column 'prompt'"),
    ('{"messages": "hello"}', ":1: column 'messages' .*must hold a list of messages; got 'hello'"),
    ('{"messages": []}', ":1: column 'messages' .*list of messages"),
    ('{"messages": ["hello"]}', "messages with role and content; got 'hello'"),
    ('{"messages": [{"role": "user", "content": null}]}', "text as role and content"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "must end with a message of the assistant"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', "its roles are assistant"),
]


@pytest.mark.messages
@pytest.mark.parametrize(
    ("content", "message"), [(GOOD + line, message) for line, message in BAD_LINES] + FIRST_LINES
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(InputError, match=rf"bad\.jsonl.*{message}") as caught:
        load_task(str(tmp_path / "bad.jsonl"))
    assert "\n" not in str(caught.value)


@pytest.mark.messages
@pytest.mark.parametrize("pixels", [[[0.5]], 3, [[["a"]]], [[[2.0]]], [[[0.1], [0.1, 0.2]]], [], None])
def test_bad_images_are_named(tmp_path, pixels):
    good = {"pixels": [[[0.5]]], "label": 1}
    path = write_jsonl(tmp_path / "images.jsonl", [good, good | {"pixels": pixels}])
    with pytest.raises(InputError, match=r"jsonl:2: column 'pixels' must hold channels of rows of numbers"):
        load_task(path)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 0}, "num_train must be"),
        ({"num_test": 1.5}, "num_test must be a whole number"),
        ({"kind": "casual"}, "did you mean causal"),
        ({"label_column": "labl"}, "did you mean label"),
        ({"kind": "causal", "label_column": "label"}, "label_column is for kind='classification'"),
        ({"kind": "classification", "prompt_column": "text"}, "prompt_column and completion_column are for"),
        ({"text_column": "text", "prompt_column": "text"}, "pass either text_column, or"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        load_task(write_jsonl(tmp_path / "a.jsonl", labelled_rows()), **options)


@pytest.mark.messages
def test_labels_of_other_data_must_be_known(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", labelled_rows())
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": str(i), "label": i % 7} for i in range(20)])
    with pytest.raises(InputError, match=r"b\.jsonl:1: .* label of the training rows, no, yes; got '0'"):
        load_task(path, test_spec=other, **SMALL)
    own = {
        "train": [RawRow("a:1", {"text": "x", "label": "yes"}), RawRow("a:2", {"text": "y", "label": "no"})],
        "test": [RawRow("b:1", {"text": "z", "label": "nope"})],
    }
    with pytest.raises(InputError, match="b:1: column 'label' must hold a label of the training rows"):
        to_examples(RawData(own), recognise(RawData(own), Columns(), "classification"))
