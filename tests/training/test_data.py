"""Tasks: what is read, that splits never overlap, and what a message says."""

import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tangora._checks import InputError
from tangora.training.answers import answers_match
from tangora.training.data import Task, generated, load_task, sources
from tangora.training.data.examples import content_key, to_examples
from tangora.training.data.readers import RawData, Row, read_file
from tangora.training.data.recognise import Columns, recognise
from tangora.training.data.splits import Counts, make_splits, stratified_order

SMALL = {"num_validation": 3, "num_test": 4}


def rows(count=20):
    return [{"text": f"text {index}", "label": ["yes", "no"][index % 2]} for index in range(count)]


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def keys(examples):
    return [content_key(example) for example in examples]


def assert_disjoint(task):
    every = keys(task.train) + keys(task.validation) + keys(task.test)
    assert len(set(every)) == len(every)


def test_formats_agree(tmp_path):
    values = rows()
    jsonl = write_jsonl(tmp_path / "a.jsonl", values)
    (tmp_path / "b.json").write_text(json.dumps(values))
    write_jsonl(tmp_path / "lines.json", values)
    table = datasets.Dataset.from_list(values)
    (tmp_path / "c.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in values))
    table.to_parquet(tmp_path / "d.parquet")
    first = load_task(jsonl, **SMALL)
    assert (first.kind, first.labels) == ("classification", ("no", "yes"))
    assert (len(first.train), len(first.validation), len(first.test)) == (13, 3, 4)
    for name in ("b.json", "lines.json", "c.csv", "d.parquet"):
        assert load_task(str(tmp_path / name), **SMALL).fingerprint == first.fingerprint, name


def test_folder(tmp_path):
    for row in rows():
        (tmp_path / row["label"]).mkdir(exist_ok=True)
        (tmp_path / row["label"] / f"{row['text']}.txt").write_text(row["text"])
    task = load_task(str(tmp_path), **SMALL)
    assert task.labels == ("no", "yes")
    assert {(example["text"], task.labels[example["label"]]) for example in task.train} <= {
        (row["text"], row["label"]) for row in rows()
    }
    plain = load_task(str(tmp_path), kind="causal", **SMALL)
    assert plain.train[0]["prompt"] == ""
    assert plain.train[0]["completion"].startswith("text")


def test_columns_by_name(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"q": f"q{i}", "a": f"a{i}", "answer": str(i)} for i in range(9)]
    )
    task = load_task(path, prompt_column="q", completion_column="a", num_validation=1, num_test=1)
    assert task.kind == "causal"
    example = task.train[0]
    assert example["completion"] == f"a{example['answer']}"
    assert set(example) == {"prompt", "completion", "answer"}


def test_pairs_of_texts(tmp_path):
    values = [{"left": f"a {index}", "right": f"b {index}", "label": index % 2} for index in range(20)]
    values.append(
        {"left": "a 0", "right": "b 1", "label": 0}
    )  # not the same as another pair with the same left
    task = load_task(write_jsonl(tmp_path / "a.jsonl", values), text_column="left, right", **SMALL)
    examples = [*task.train, *task.validation, *task.test]
    pairs = {(f"{row['left']}", f"{row['right']}") for row in values}
    assert {(example["text"], example["text_pair"]) for example in examples} == pairs


def test_the_first_column_that_there_is_and_other_data_to_test_on(tmp_path):
    learnt = [{"query": f"{index} ?", "response": str(index)} for index in range(20)]
    tested = [{"question": f"{index} ?", "answer": str(index)} for index in range(15, 25)]
    paths = [
        write_jsonl(tmp_path / name, values) for name, values in (("a.jsonl", learnt), ("b.jsonl", tested))
    ]
    columns = {"prompt_column": "query|question", "completion_column": "response|answer"}
    task = load_task(paths[0], test_spec=paths[1], num_validation=3, num_test=10, **columns)
    assert {example["prompt"] for example in task.test} == {row["question"] for row in tested}
    # what both hold is tested, not learnt
    assert {example["prompt"] for example in (*task.train, *task.validation)} == {f"{i} ?" for i in range(15)}


def test_numbers_are_labels_in_their_order(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": i % 11} for i in range(44)])
    assert load_task(path, **SMALL).labels == tuple(map(str, range(11)))


def test_duplicates_never_cross_splits(tmp_path):
    values = [
        {"text": f"text  {index % 15}" + " " * (index % 2), "label": index % 3 % 2} for index in range(60)
    ]
    task = load_task(write_jsonl(tmp_path / "a.jsonl", values), **SMALL)
    assert_disjoint(task)
    assert len(task.train) + len(task.validation) + len(task.test) == 15


def test_seed_says_the_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows(40))
    first = load_task(path, **SMALL)
    assert load_task(path, **SMALL).fingerprint == first.fingerprint
    assert load_task(path, seed=1, **SMALL).fingerprint != first.fingerprint
    fewer = load_task(path, num_train=5, num_validation=2, num_test=4)
    assert fewer.test == first.test
    assert fewer.validation == first.validation[:2]


def test_split_does_not_depend_on_the_callers_random_state(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows())
    random.seed(1)
    first = load_task(path, **SMALL)
    random.seed(2)
    assert load_task(path, **SMALL).fingerprint == first.fingerprint


def test_every_stretch_holds_each_label_in_its_share():
    examples = [{"text": str(index), "label": 0 if index < 90 else 1} for index in range(120)]
    order = stratified_order(examples, seed=3)
    assert sorted(keys(order)) == sorted(keys(examples))
    for start in range(0, 120, 20):
        assert abs(sum(example["label"] for example in order[start : start + 20]) - 5) <= 1
    assert keys(order) != keys(stratified_order(examples, seed=4))


def test_own_splits_of_a_data_set_are_kept_and_cleaned():
    pools = {
        name: [{"prompt": f"{name} {index}", "completion": "x"} for index in range(6)]
        for name in ("train", "validation", "test")
    }
    pools["train"].append(pools["test"][0])
    pools["validation"].append(pools["test"][1])
    splits = make_splits(pools, Counts(None, 5, 5), seed=0)
    assert len(splits.train) == 6
    assert all(key.startswith("validation") for key in keys(splits.validation))
    assert all(key.startswith("test") for key in keys(splits.test))


def test_class_names_of_hub_data_sets():
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zebra", "ant"])}
    )
    labelled = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    withheld = datasets.Dataset.from_dict({"text": ["c"], "label": [-1]}, features=features)
    data = sources.from_datasets({"train": labelled, "test": withheld}, "zoo")
    examples, labels = to_examples(data, recognise(data, Columns(), "classification"))
    assert labels == ("zebra", "ant")
    assert examples == {"train": [{"text": "a", "label": 0}, {"text": "b", "label": 1}], "test": []}


def test_hub_data_set_with_config(monkeypatch):
    asked = []

    def load(name, config, **_):
        asked.append((name, config))
        return datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(rows()), "dev": datasets.Dataset.from_list(rows(4))}
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        "tangora.training.data.sources.hub_problem",
        lambda name, _: (None, False) if name == "glue" else ("the hub has no such dataset", False),
    )
    task = load_task("glue/sst2", num_validation=2, num_test=4)
    assert asked == [("glue", "sst2")]
    assert set(keys(task.validation)) <= {row["text"] for row in rows(4)}


@pytest.mark.messages
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r":1: the file must hold at least one example; it is empty"),
        ('{"text": "a", "label": 1}\n\n{"text"', r":3: the line must be JSON"),
        ('{"text": "a", "label": 1}\n[1]', r":2: an example must be a JSON object; got list"),
        ('{"text": "a", "label": 1}\n{"text": "b"}', r":2: this example has no column 'label'; it has text"),
        (
            '{"a": "a", "b": "b", "label": 1}',
            r"bad\.jsonl: no column is recognised as the text.*--text-column NAME$",
        ),
        ('{"text": 3, "label": 1}', r":1: column 'text' must hold text; got 3"),
        ('{"text": "  ", "label": 1}', r":1: column 'text' must hold text"),
        (
            '{"text": "a", "label": 0.5}',
            r":1: column 'label' must hold text or a whole number, as regression is not",
        ),
        ('{"text": "a", "label": null}', r":1: column 'label' must hold text or a whole number; got None"),
        ('{"text": "a", "label": 1}', r"at least 2 different labels; got only '1'"),
        ('{"prompt": "a"}', r"its columns are prompt; give --text-column NAME"),
        ('{"prompt": "a", "completion": null}', r":1: column 'completion' must hold text; got None"),
        ('{"text": "a"}\n{"text": "b", "label": 1}', r":1: this example has no column 'label'; it has text"),
        (
            '{"prompt": "a", "completion": "b"}\n{"text": "c"}',
            r":2: this example has no column 'prompt'; it has text",
        ),
        ('{"text": "\\ud800", "label": 1}', r":1: column 'text' must hold Unicode text; surrogates"),
        ('{"text": {"long": "' + 999 * "a" + '"}, "label": 1}', r":1: column 'text'.*got .{80}\.\.\.$"),
        (5000 * "[", r":1: the line must be JSON"),
        ('{"text": ' + 5000 * "9" + "}", r":1: the line must be JSON that can be read"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_task(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\na,b,c\n", r"a\.csv:2: a line must have 2 cells"),
        ("a.csv", b'text,label\n"a"b,c\n', r"a\.csv:2: the line must be CSV"),
        ("a.csv", b"", r"a\.csv:1: the file must hold"),
        ("a.csv", b"text,text\na,b\n", r"a\.csv:1: the header must name different columns; 'text'"),
        ("a.csv", b"text,label\na,1\n,2\n", r"a\.csv:3: column 'text' must hold text; got ''"),
        ("a.csv", b"text,label\na,1\nb,\n", r"a\.csv:3: column 'label' must hold text or a whole number"),
        ("a.csv", b"text,label\na,1\n\xe9,2\n", r"a\.csv:3: the file must be UTF-8 text; byte 1"),
        ("a.jsonl", b"\xff\xfe\xff", r"a\.jsonl:1: the file must be UTF-8 text; byte 1 of this line is not"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            r"a\.jsonl:2: the file must be UTF-8 text; byte 11",
        ),
        (
            "a.json",
            b'[{"text": "a"},\n oops]',
            r"a\.json:2: the file must be JSON; Expecting value at column 2$",
        ),
        ("a.json", b'[{"text": "a,[]"},\n\n{"text": 1}]', r"a\.json:3: column 'text' must hold text; got 1"),
        ("a.json", b'[\n{"text": "a"}\n,2]', r"a\.json:3: an example must be a JSON object; got int"),
        ("a.parquet", b"nothing", r"must be a Parquet file"),
        ("a.xlsx", b"nothing", r"must end in one of \.jsonl, \.json, \.csv, \.tsv, \.parquet; got '\.xlsx'"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_task(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.messages
def test_bad_rows_of_parquet_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    text = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    for columns, message in [
        (
            {"text": ["a", None], "label": [1, 2]},
            r"a\.parquet: row 1: column 'text' must hold text; got None",
        ),
        (
            {"text": ["a", "b"], "label": [1.0, 0.5]},
            r"row 1: column 'label' must hold text or a whole number, as regression",
        ),
        ({"text": text, "label": [1, 2]}, r"a\.parquet: row 1: a value cannot be read; 'utf-8' codec"),
    ]:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(InputError, match=message):
            load_task(str(path))


@pytest.mark.messages
def test_labels_that_cannot_be_learned_are_named():
    def split(labels, classes=("zebra", "ant")):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(classes))}
        )
        texts = [f"{id(labels)} {index}" for index in range(len(labels))]
        return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)

    with pytest.raises(InputError, match="data set 'zoo' must have training examples with a label"):
        sources.from_datasets({"train": split([-1])}, "zoo")
    table = split([0, 1]).data.table.set_column(1, "label", pyarrow.array([0, 2]))
    broken = datasets.Dataset(datasets.table.InMemoryTable(table), info=split([0, 1]).info)
    with pytest.raises(InputError, match=r"zoo/train: row 1: column 'label' must be in \[-1, 1\]; got 2"):
        sources.from_datasets({"train": broken}, "zoo")
    rows = {
        "train": [
            Row("a:1", {"text": "x", "label": "yes"}),
            Row("a:2", {"text": "y", "label": "no"}),
        ],
        "test": [Row("b:1", {"text": "z", "label": "nope"})],
    }
    with pytest.raises(
        InputError, match="b:1: column 'label' must hold a label of the training rows, no, yes"
    ):
        to_examples(RawData(rows), recognise(RawData(rows), Columns(), "classification"))


def test_lines_of_a_json_list(tmp_path):
    values = [{"text": f'{index} "], [', "deep": [{"a": [1, 2]}, "}"]} for index in range(4)]
    (tmp_path / "a.json").write_text("\n [" + ",\n\n".join(map(json.dumps, values)) + "\n]\n")
    found = read_file(tmp_path / "a.json").splits["train"]
    assert [row.values for row in found] == values
    assert [row.where.rsplit(":", 1)[1] for row in found] == ["2", "4", "6", "8"]


def test_numbers_are_answers(tmp_path):
    values = [
        {"prompt": f"{i}?", "completion": "so", "answer": [i, 0.5, True, None][i % 4]} for i in range(9)
    ]
    task = load_task(write_jsonl(tmp_path / "a.jsonl", values), num_validation=0, num_test=1)
    answers = {example["prompt"]: example.get("answer") for example in task.train + task.test}
    assert [answers[f"{i}?"] for i in range(4)] == ["0", "0.5", None, None]


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


FITTING = "20 different examples, too few for .*: --num-train 12 --num-validation 4 --num-test 4$"


@pytest.mark.messages
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_test": 21, "num_validation": 0}, FITTING),
        ({"num_test": 4, "num_validation": 17}, FITTING),
        ({"num_train": 14, **SMALL}, FITTING),
        ({"num_test": 17, "num_validation": 3}, FITTING),
        ({"num_train": 0}, "num_train must be"),
        ({"num_test": 1.5}, "num_test must be a whole number"),
        ({"kind": "casual"}, "did you mean causal"),
        ({"label_column": "labl"}, "did you mean label"),
        ({"kind": "causal", "label_column": "label"}, "label_column is for kind='classification'"),
        ({"kind": "classification", "prompt_column": "text"}, "prompt_column and completion_column are for"),
        ({"text_column": "text", "prompt_column": "text"}, "give either text_column, or"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_options(tmp_path, options, message):
    path = write_jsonl(tmp_path / "a.jsonl", rows())
    with pytest.raises(InputError, match=message):
        load_task(path, **options)


@pytest.mark.messages
def test_bad_data_to_test_on(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", rows())
    other = write_jsonl(
        tmp_path / "b.jsonl", [{"text": str(index), "label": index % 7} for index in range(20)]
    )
    with pytest.raises(
        InputError,
        match=r"b\.jsonl:1: column 'label' must hold a label of the training rows, no, yes; got '0'",
    ):
        load_task(path, test_spec=other, **SMALL)
    with pytest.raises(InputError, match="tasks bring their own test problems; leave test_data out"):
        load_task("reasoning-gym:chain_sum", test_spec=path)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./nothing.jsonl", "no such file or folder; use bbc-news"),
        ("bbcnews", r"did you mean bbc-news\?.*hub is switched off"),
        ("org/name", r"hub is switched off \(HF_HUB_OFFLINE\).*use bbc-news"),
        ("org/name/config", "hub is switched off"),
    ],
)
def test_unknown_data(spec, message):
    with pytest.raises(InputError, match=message):
        load_task(spec)


@pytest.mark.messages
def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"must hold <label>/\*\.txt; it holds none"):
        load_task(str(tmp_path))


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
    with pytest.raises(InputError, match="has problems without a written answer"):
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
