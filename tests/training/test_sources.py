"""Data sets by name: of packages, of the hub and generated ones; and what a message says of unknown ones."""

import json

import datasets
import pyarrow
import pytest

from tangora._checks import InputError
from tangora.training.answers import answers_match
from tangora.training.data import generated, load_task, sources
from tangora.training.data.conversations import read_chatterbot
from tangora.training.data.examples import content_key, to_examples
from tangora.training.data.recognise import Columns, recognise
from tests.training.tiny import labelled_rows


def assert_disjoint(task):
    every = [content_key(example) for example in (*task.train, *task.validation, *task.test)]
    assert len(set(every)) == len(every)


def zoo(labels):
    names = datasets.ClassLabel(names=["zebra", "ant"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    texts = [f"{id(labels)} {index}" for index in range(len(labels))]
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def test_class_names_of_hub_data_sets():
    data = sources.from_datasets({"train": zoo([0, 1]), "test": zoo([-1])}, "zoo")
    examples, labels = to_examples(data, recognise(data, Columns(), "classification"))
    assert labels == ("zebra", "ant")
    assert [example["label"] for example in examples["train"]] == [0, 1]
    assert examples["test"] == []  # its label is withheld


@pytest.mark.messages
def test_hub_labels_that_cannot_be_learned_are_named():
    with pytest.raises(InputError, match="data set 'zoo' must have training examples with a label"):
        sources.from_datasets({"train": zoo([-1])}, "zoo")
    table = zoo([0, 1]).data.table.set_column(1, "label", pyarrow.array([0, 2]))
    broken = datasets.Dataset(datasets.table.InMemoryTable(table), info=zoo([0, 1]).info)
    with pytest.raises(InputError, match=r"zoo/train: row 1: column 'label' must be in \[-1, 1\]; got 2"):
        sources.from_datasets({"train": broken}, "zoo")


def test_hub_data_set_with_config(monkeypatch):
    asked = []

    def load(name, config, **_):
        asked.append((name, config))
        splits = {"train": labelled_rows(), "dev": labelled_rows(4)}
        return datasets.DatasetDict({key: datasets.Dataset.from_list(rows) for key, rows in splits.items()})

    def problem(name, _):
        return (None, False) if name == "glue" else ("the hub has no such dataset", False)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(sources, "hub_problem", problem)
    task = load_task("glue/sst2", num_validation=2, num_test=4)
    assert asked == [("glue", "sst2")]
    assert {example["text"] for example in task.validation} <= {row["text"] for row in labelled_rows(4)}


@pytest.mark.messages
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./nothing.jsonl", "no such file or folder; use bbc-news"),
        ("bbcnews", r"did you mean bbc-news\?.*hub access is disabled"),
        ("org/name", r"hub access is disabled \(HF_HUB_OFFLINE\).*use bbc-news"),
        ("org/name/config", "hub access is disabled"),
        (".", r"must contain <label>/\*\.txt or images, <label>/\*\.png; it contains none"),
    ],
)
def test_unknown_data(monkeypatch, tmp_path, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_task(spec)


def test_chatterbot():
    task = load_task("chatterbot", num_train=400, num_validation=32, num_test=64)
    assert task.kind == "causal"
    assert (len(task.train), len(task.validation), len(task.test)) == (400, 32, 64)
    for example in (*task.train, *task.validation, *task.test):
        roles = [message["role"] for message in example["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_a_dialogue_ends_with_an_answer(tmp_path):
    said = {"categories": ["x"], "conversations": [["a", "b", "c"], ["a"], ["a", " "], [1, True], ["a"] * 10]}
    (tmp_path / "some.yml").write_text(json.dumps(said))
    rows = read_chatterbot(tmp_path, "it").splits["train"]
    assert [[message["content"] for message in row.values["messages"]] for row in rows] == [
        ["a", "b"],
        ["1", "True"],
    ]
    assert [row.where for row in rows] == ["some.yml: conversation 1", "some.yml: conversation 4"]


def test_bbc_news():
    task = load_task("bbc-news", num_train=300)
    assert task.labels == ("business", "entertainment", "politics", "sports", "tech")
    assert (len(task.train), len(task.validation), len(task.test)) == (300, 200, 500)
    assert_disjoint(task)
    assert {example["label"] for example in task.validation} == set(range(5))
    assert any("£" in example["text"] for example in task.train)
    assert not any("Â£" in example["text"] for example in task.train)
    everything = load_task("bbc-news", kind="causal")
    assert len(everything.train) == 2125 - 700
    assert everything.train[0]["prompt"] == ""


def test_packaged_data_has_its_published_sizes():
    for name, sizes in (("bbc-news", (1425, 200, 500)), ("digits", (196, 200, 500))):
        task = load_task(name)
        assert (len(task.train), len(task.validation), len(task.test)) == sizes
        assert task.notes == ()


def gym(spec, **options):
    pytest.importorskip("reasoning_gym")
    return load_task(
        f"reasoning-gym:{spec}", **{"num_train": 30, "num_validation": 10, "num_test": 10} | options
    )


def test_chain_sum_defaults_to_three_terms_of_two_digits():
    task = gym("chain_sum")
    assert task.kind == "causal"
    assert_disjoint(task)
    for example in task.train:
        problem = example["prompt"].split(":")[1].strip(" =")
        assert [len(term) for term in problem.replace("-", "+").split(" + ")] == [2, 2, 2]
        total = sum(int(term) for term in problem.replace("- ", "-").replace("+ ", "").split())
        assert example["completion"] == example["answer"] == str(total)


def test_generated_splits_never_overlap_even_when_few_exist():
    # 10 x 10 terms and two signs: 200 problems
    task = gym(
        "chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1",
        num_train=80,
        num_validation=40,
        num_test=40,
    )
    assert_disjoint(task)
    assert gym("chain_sum", num_train=5).test == gym("chain_sum").test
    assert gym("chain_sum", seed=1).fingerprint != gym("chain_sum").fingerprint


def test_gsm_has_chains_of_thought_that_end_with_the_answer():
    task = gym("gsm_symbolic", num_train=300)
    for example in task.train:
        reasoning, answer = example["completion"].split(generated.ANSWER_MARKER)
        assert reasoning.strip()
        assert answer.strip() == example["answer"]
    assert_disjoint(task)


@pytest.mark.messages
def test_problems_without_one_answer():
    with pytest.raises(InputError, match="has problems without a text answer"):
        gym("propositional_logic")


@pytest.mark.parametrize(
    ("spec", "right", "wrong"),
    [
        ("chain_sum", lambda answer: f"{answer}.00", lambda answer: f"{answer}1"),
        ("gsm_symbolic", lambda answer: f"so\n#### {answer}.0", lambda answer: f"so\n#### {answer}7"),
        (
            "number_sorting,max_numbers=3",
            lambda answer: answer.replace("'", '"'),
            lambda answer: answer.replace("]", ", '1']"),
        ),
        ("family_relationships", str.upper, lambda answer: f"{answer}s"),
    ],
)
def test_problems_are_judged_by_who_made_them(spec, right, wrong):
    examples = gym(spec).test
    assert answers_match([right(example["answer"]) for example in examples], examples).all()
    assert answers_match([example["completion"] for example in examples], examples).all()
    for text in (wrong, lambda _: "", lambda _: "[(1"):
        assert not answers_match([text(example["answer"]) for example in examples], examples).any()
    strict = [
        {key: value for key, value in example.items() if key != generated.PROBLEM} for example in examples
    ]
    alone = answers_match([right(example["answer"]) for example in strict], strict)
    # without it, numbers alone may be written in another way
    numbers = all(example["answer"].lstrip("-").isdigit() for example in examples)
    assert alone.all() if numbers else not alone.any()


@pytest.mark.messages
@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("chain_sums", {}, r"did you mean chain_sum\?"),
        ("chain_sum,min_term=3", {}, r"did you mean min_terms\?"),
        ("chain_sum,min_terms", {}, "must be key=value; got 'min_terms'"),
        ("chain_sum,min_terms=many", {}, "setting min_terms must be a whole number; got 'many'"),
        ("chain_sum,allow_negation=3", {}, "setting allow_negation must be true or false"),
        ("chain_sum,min_terms=9", {}, "cannot work with min_terms=9,.*max_terms must be >= min_terms"),
        ("chain_sum,seed=3", {}, "must be one of"),
        ("chain_sum", {"kind": "classification"}, "tasks are causal"),
        ("chain_sum", {"test_spec": "a.jsonl"}, "their own test problems; omit test_data"),
        (
            "chain_sum,min_terms=1,max_terms=1,min_digits=1,max_digits=1",
            {"num_test": 5, "num_validation": 6},
            "10 different problems .*--num-validation 6 --num-test 5; these sizes fit: --num-train 6 --num-val",
        ),
    ],
)
def test_generated_messages(spec, options, message):
    with pytest.raises(InputError, match=message) as caught:
        gym(spec, **options)
    assert "\n" not in str(caught.value)
