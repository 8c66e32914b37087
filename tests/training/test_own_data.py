"""One's own data: columns by their names, sizes by default, labels that are none, and every reader's odd files."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from tangora._checks import InputError
from tangora.training.data import load_task
from tangora.training.data.readers import RawData, Row, read_file
from tangora.training.data.recognise import Columns, recognise
from tangora.training.data.splits import Counts, make_splits


def table(path, header, lines, separator=","):
    path.write_text("\n".join(separator.join(line) for line in [header, *lines]) + "\n")
    return str(path)


def reviews(count=200):
    return [[f"film {index}", ["bad", "good"][index % 2]] for index in range(count)]


def layout(columns, kind=None, rows=8, **given):
    values = [{column: f"{column} {index}" for column in columns} for index in range(rows)]
    data = RawData({"train": [Row(str(index), each) for index, each in enumerate(values)]}, name="f.csv")
    return recognise(data, Columns(**given), kind)


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        ("review,sentiment", "review", "sentiment"),
        ("sentiment,review", "review", "sentiment"),
        ("Text,Label", "Text", "Label"),
        ("text, Label ", "text", " Label "),
        ("id,review,stars", "review", "stars"),
        ("question,label", "question", "label"),
        ("anything at all,class", "anything at all", "class"),
        (",comment,target", "comment", "target"),
        ("Review Text,Category", "Review Text", "Category"),
        ("tweet_id,text,airline_sentiment", "text", "airline_sentiment"),
        ("text,label,label_text", "text", "label"),
        ("text,title,label", "text", "label"),
        ("sentence1,sentence2,label", "sentence1 sentence2", "label"),
        ("idx,Premise,Hypothesis,label", "Premise Hypothesis", "label"),
        ("question,passage,label", "question passage", "label"),
        ("message,response,intent", "message", "intent"),
    ],
)
def test_a_label_beside_a_text_is_classified(columns, text, label):
    found = layout(columns.split(","))
    assert found.kind == "classification"
    assert (" ".join(found.text), found.label) == (text, label)


@pytest.mark.parametrize(
    ("columns", "prompt", "context", "completion"),
    [
        ("prompt,completion", "prompt", None, "completion"),
        ("Prompt,Response", "Prompt", None, "Response"),
        ("question,answer", "question", None, "answer"),
        ("query,response,type", "query", None, "response"),
        ("problem,solution,answer", "problem", None, "solution"),
        ("instruction,input,output", "instruction", "input", "output"),
        ("instruction,context,response,category", "instruction", "context", "response"),
        ("input,output", "input", None, "output"),
        ("prompt,completion,messages", "prompt", None, "completion"),
        ("prompt,completion,label", "prompt", None, "completion"),
    ],
)
def test_prompts_with_completions_are_causal(columns, prompt, context, completion):
    found = layout(columns.split(","))
    assert (found.kind, found.prompt, found.context, found.completion) == (
        "causal",
        prompt,
        context,
        completion,
    )


def test_plain_text_is_causal():
    assert layout(["text"]).text == layout(["text", "url"]).text == ("text",)
    assert layout(["paragraphs"]).text == ("paragraphs",)
    assert layout(["text", "label"], kind="causal").text == ("text",)


def test_conversations_are_causal():
    assert layout(["id", "conversations"]).chat == "conversations"
    assert layout(["prompt", "messages"]).chat == "messages"


def test_named_columns_win_and_their_case_does_not_matter():
    found = layout(["Body", "Kind", "label"], text="body", label="kind")
    assert (found.text, found.label) == (("Body",), "Kind")
    assert layout(["review", "sentiment"], text="review").label == "sentiment"
    assert layout(["a", "b"], label="b").text == ("a",)
    assert layout(["a", "response"], prompt="a").completion == "response"
    assert layout(["q", "Answer"], prompt="query|q", completion="response|answer").completion == "Answer"


@pytest.mark.messages
@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (
            "a,b",
            {},
            r"\(from the first line\) are a, b; give --text-column NAME and --label-column NAME to",
        ),
        ("I loved it,positive", {}, r"are 'I loved it', positive; give"),
        (
            "title,body,label",
            {},
            r"may be the text, title, body; give --text-column title or --text-column body",
        ),
        ("review,sentiment,rating", {}, r"give --label-column sentiment or --label-column rating"),
        ("question,response,output", {}, r"--completion-column response or --completion-column output"),
        ("a,b,label", {}, r"no column is recognised as the text.* a, b, label; give --text-column NAME$"),
        ("a,b,c", {"text": "a", "kind": "classification"}, "the label .*; give --label-column NAME$"),
        ("a,b", {"prompt": "a"}, "no column is recognised as the completion"),
        ("review,sentiment", {"text": "reviews"}, "text_column must be one of review, .*did you mean review"),
        ("text,label", {"text": "text", "label": "text"}, "must differ; both are 'text'"),
        ("a,b", {"text": "a,c"}, "text_column must be one of a, b; got 'c'"),
    ],
)
def test_what_is_not_recognised_asks_for_flags(columns, given, message):
    with pytest.raises(InputError, match=f"^f\\.csv: .*{message}") as caught:
        layout(columns.split(","), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.messages
def test_what_looks_like_an_unknown_label_is_asked_for(tmp_path):
    path = table(tmp_path / "f.csv", ["text", "verdict"], reviews(20))
    with pytest.raises(InputError, match=r"is verdict the label of text\? give --label-column verdict"):
        load_task(path)
    assert load_task(path, label_column="verdict").labels == ("bad", "good")
    assert load_task(path, kind="causal").train[0]["completion"].startswith("film")
    scored = table(tmp_path / "g.csv", ["text", "score"], [[f"film {i}", str(i / 7)] for i in range(60)])
    with pytest.raises(InputError, match=r"is score the label of text\?"):
        load_task(scored)
    with pytest.raises(InputError, match="regression is not supported"):
        load_task(scored, label_column="score")


def test_sizes_are_shares_of_what_is_there(tmp_path):
    task = load_task(table(tmp_path / "f.csv", ["review", "sentiment"], reviews()))
    assert (len(task.train), len(task.validation), len(task.test)) == (120, 40, 40)
    assert task.labels == ("bad", "good")
    told = " ".join(task.notes)
    for part in ("text = 'review', label = 'sentiment'", "bad (100), good (100)", "120 training, 40 val"):
        assert part in told
    some = load_task(str(tmp_path / "f.csv"), num_test=20)
    assert (len(some.train), len(some.validation), len(some.test)) == (135, 45, 20)


@pytest.mark.parametrize("count", [3, 4, 5, 7, 20, 99, 700, 2500, 4000])
def test_default_sizes_always_fit_and_are_capped(count):
    pool = [{"prompt": str(index), "completion": "x"} for index in range(count)]
    train, validation, test = make_splits({"train": pool}, Counts(), seed=0)
    assert len(train) + len(validation) + len(test) == count
    assert len(test) == min(500, max(1, count // 5))
    assert 1 <= len(validation) <= 200
    assert len(train) >= count / 3


def test_own_splits_are_taken_whole_up_to_the_caps():
    pools = {
        name: [{"prompt": f"{name} {index}", "completion": "x"} for index in range(size)]
        for name, size in (("train", 10), ("validation", 300), ("test", 30))
    }
    assert [len(split) for split in make_splits(pools, Counts(), seed=0)] == [10, 200, 30]


@pytest.mark.messages
@pytest.mark.parametrize("options", [{"num_test": 500}, {"num_validation": 300}, {"num_train": 199}])
def test_sizes_that_do_not_fit_are_answered_with_all_that_do(tmp_path, options):
    path = table(tmp_path / "f.csv", ["review", "sentiment"], reviews())
    with pytest.raises(InputError, match=r"f\.csv has 200 different examples, too few") as caught:
        load_task(path, **options)
    fitting = re.findall(r"--num-(\w+) (\d+)", str(caught.value).split("fit:")[1])
    task = load_task(path, **{f"num_{name}": int(number) for name, number in fitting})
    assert len(task.train) + len(task.validation) + len(task.test) == 200


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_separators_and_marks_are_detected(tmp_path, separator, mark):
    text = f'{mark}review{separator}sentiment\n"a{separator}, ; b\nc"{separator}good\n"d"{separator}bad\n'
    for name in ("f.csv", "F.CSV", *(["f.tsv"] if separator == "\t" else [])):
        (tmp_path / name).write_text(text)
        rows = read_file(tmp_path / name).splits["train"]
        assert [row.values for row in rows] == [
            {"review": f"a{separator}, ; b\nc", "sentiment": "good"},
            {"review": "d", "sentiment": "bad"},
        ]


def test_a_line_that_says_the_separator_is_no_header(tmp_path):
    (tmp_path / "f.csv").write_text("sep=;\ntext;label\na, b;1\n")
    (row,) = read_file(tmp_path / "f.csv").splits["train"]
    assert row.values == {"text": "a, b", "label": "1"}
    assert row.where.endswith(":3")


def test_long_cells_are_read(tmp_path):
    table(tmp_path / "f.csv", ["text", "label"], [["x" * 300_000, "a"]])
    assert len(read_file(tmp_path / "f.csv").splits["train"][0].values["text"]) == 300_000


def test_a_list_inside_of_an_object_is_read(tmp_path):
    values = [{"text": f"t {index}", "label": index % 2} for index in range(4)]
    for name, whole in (("a", {"version": 1, "data": values}), ("b", {"rows": values})):
        for indent in (None, 1):
            (tmp_path / f"{name}.json").write_text(json.dumps(whole, indent=indent))
            rows = read_file(tmp_path / f"{name}.json").splits["train"]
            assert [row.values for row in rows] == values
            assert rows[2].where.endswith("[2]")


@pytest.mark.messages
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"text": "a", "lab',
            r"a\.json:1: the file must be JSON; Unterminated string starting at column 16$",
        ),
        (
            '{"data": [{"text": "a"},\n {"te',
            r"a\.json:2: the file must be JSON; Unterminated .* at column 3$",
        ),
        ('{"data": [{"text": "a"}', r"a\.json:1: the file must be JSON; .* at column \d+$"),
        ('{"train": [{"a": 1}], "test": [{"a": 1}]}', "several lists of examples, train, test"),
        ('{"text": ["a"], "label": [1]}', r"must hold a list of examples.*got an object with text, label$"),
        ("{}", "must hold a list of examples"),
        ('"text"', "must be a JSON object; got str"),
    ],
)
def test_json_that_is_no_list_of_examples(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_file(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def labelled(tmp_path, labels):
    rows = [{"text": f"t {index}", "label": label} for index, label in enumerate(labels)]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "f.jsonl")


@pytest.mark.messages
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [str(index / 37) for index in range(60)],
            r"60 different numbers, such as 0\.027.*regression is not",
        ),
        ([index / 7 + 0.01 for index in range(60)], "regression is not supported"),
        ([f"name {index}" for index in range(60)], "60 different labels in 60 examples"),
        ([f"name {index % 40}" for index in range(60)], "40 different labels in 60 examples"),
        (["a", "b\x00"] * 10, "without control characters"),
        (["a", "b\nc"] * 10, "without control characters"),
        (["1", "1.0"] * 10, r"'1' and '1\.0' are the same number"),
        ([True, None] * 10, "must hold text or a whole number; got None"),
        (["a"] * 10, "at least 2 different labels"),
    ],
)
def test_labels_that_are_no_classes(tmp_path, labels, message):
    with pytest.raises(InputError, match=message) as caught:
        load_task(labelled(tmp_path, labels))
    assert "\n" not in str(caught.value)


def test_labels_that_are_written_differently_are_one_class(tmp_path):
    assert load_task(labelled(tmp_path, [3, "3", " 3 ", 3.0, 1, "1"] * 5)).labels == ("1", "3")
    stars = [str(index % 10 / 2) for index in range(60)]  # half stars are classes
    assert len(load_task(labelled(tmp_path, stars)).labels) == 10


def test_rare_and_alike_classes_are_told(tmp_path):
    task = load_task(labelled(tmp_path, ["good", "bad", "Good"] * 6 + ["odd"]))
    told = "\n".join(task.notes)
    assert "a single example, which no method can learn and prove: odd" in told
    assert "capital letters only: Good, good" in told


def test_contradictory_texts_are_told_and_never_in_two_splits(tmp_path):
    rows = [{"text": f"t {index // 2}", "label": ["a", "b"][index % 2]} for index in range(60)]
    rows += [{"text": f"u {index}", "label": "ab"[index % 2]} for index in range(10)]
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(tmp_path / "f.jsonl"))
    told = "\n".join(task.notes)
    assert "30 texts have different labels" in told
    assert "30 of 70 examples repeat another's text" in told
    texts = [example["text"] for example in (*task.train, *task.validation, *task.test)]
    assert len(set(texts)) == len(texts) == 40


def test_packaged_data_has_its_published_sizes():
    for name, sizes in (("bbc-news", (1425, 200, 500)), ("digits", (196, 200, 500))):
        task = load_task(name)
        assert (len(task.train), len(task.validation), len(task.test)) == sizes
        assert task.notes == ()


def test_instructions_with_an_input(tmp_path):
    rows = [
        {"instruction": f"do {index}", "input": ["", f"this {index}"][index % 2], "output": "done"}
        for index in range(10)
    ]
    (tmp_path / "f.json").write_text(json.dumps(rows))
    task = load_task(str(tmp_path / "f.json"))
    prompts = {example["prompt"] for example in (*task.train, *task.validation, *task.test)}
    assert prompts == {f"do {i}\nthis {i}" if i % 2 else f"do {i}" for i in range(10)}


def chats(turn):
    return [turn(index) for index in range(10)]


def test_conversations_of_both_forms_are_the_same(tmp_path):
    ours = chats(
        lambda i: [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": f"ask {i}"},
            {"role": "assistant", "content": f"say {i}"},
        ]
    )
    theirs = [
        [
            {
                "from": {"user": "human", "assistant": "gpt"}.get(each["role"], each["role"]),
                "value": each["content"],
            }
            for each in turns
        ]
        for turns in ours
    ]
    parts = [
        [each | {"content": [{"type": "text", "text": each["content"]}]} for each in turns] for turns in ours
    ]
    prints = set()
    for column, values in (("messages", ours), ("conversations", theirs), ("conversation", parts)):
        path = tmp_path / f"{column}.jsonl"
        path.write_text("".join(json.dumps({column: turns}) + "\n" for turns in values))
        task = load_task(str(path))
        assert (task.kind, task.train[0]["messages"][0]) == (
            "causal",
            {"role": "system", "content": "be short"},
        )
        assert task.train[0]["prompt"].startswith("be short\nask")
        prints.add(task.fingerprint)
    assert len(prints) == 1


@pytest.mark.messages
@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hello", "must hold a list of messages; got 'hello'"),
        ([], "must hold a list of messages"),
        (["hello"], "messages with role and content; got 'hello'"),
        ([{"role": "user", "content": None}], "text as role and content"),
        ([{"role": "user", "content": "a"}], "must end with a message of the assistant"),
        ([{"role": "assistant", "content": "a"}], "that answers another; its roles are assistant"),
    ],
)
def test_conversations_that_teach_nothing(tmp_path, turns, message):
    (tmp_path / "f.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(InputError, match=rf"f\.jsonl:1: column 'messages' .*{message}"):
        load_task(str(tmp_path / "f.jsonl"))


def test_data_to_test_on_may_lack_a_class_and_have_other_headers(tmp_path):
    learnt = table(tmp_path / "a.csv", ["review", "sentiment"], reviews(30))
    tested = table(tmp_path / "b.csv", ["Text", "Label"], [[f"other {index}", "good"] for index in range(6)])
    task = load_task(learnt, test_spec=tested)
    assert {task.labels[example["label"]] for example in task.test} == {"good"}
    assert len(task.test) == 6


def test_whole_numbers_of_parquet_are_classes(tmp_path):
    values = {
        "Text": [f"t {index}" for index in range(20)],
        "Label": [float(index % 2) for index in range(20)],
    }
    pyarrow.parquet.write_table(pyarrow.table(values), tmp_path / "f.parquet")
    assert load_task(str(tmp_path / "f.parquet")).labels == ("0", "1")
