"""Files of data: every format and its odd files, and which line a message names."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tangora._checks import InputError
from tangora.training.data import load_task
from tangora.training.data.readers import read_file
from tests.training.tiny import labelled_rows, write_jsonl


def rows_of(path):
    return read_file(path).splits["train"]


def test_formats_agree(tmp_path):
    values = labelled_rows()
    (tmp_path / "b.json").write_text(json.dumps(values))
    write_jsonl(tmp_path / "lines.json", values)
    (tmp_path / "c.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in values))
    datasets.Dataset.from_list(values).to_parquet(tmp_path / "d.parquet")
    sizes = {"num_validation": 3, "num_test": 4}
    first = load_task(write_jsonl(tmp_path / "a.jsonl", values), **sizes)
    assert (first.kind, first.labels) == ("classification", ("no", "yes"))
    assert (len(first.train), len(first.validation), len(first.test)) == (13, 3, 4)
    for name in ("b.json", "lines.json", "c.csv", "d.parquet"):
        assert load_task(str(tmp_path / name), **sizes).fingerprint == first.fingerprint, name


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_separators_and_marks_are_detected(tmp_path, separator, mark):
    text = f'{mark}review{separator}sentiment\n"a{separator}, ; b\nc"{separator}good\n"d"{separator}bad\n'
    for name in ("f.csv", "F.CSV", *(["f.tsv"] if separator == "\t" else [])):
        (tmp_path / name).write_text(text)
        assert [row.values for row in rows_of(tmp_path / name)] == [
            {"review": f"a{separator}, ; b\nc", "sentiment": "good"},
            {"review": "d", "sentiment": "bad"},
        ]


def test_a_line_that_says_the_separator_is_no_header(tmp_path):
    (tmp_path / "f.csv").write_text("sep=;\ntext;label\na, b;01\n")
    (row,) = rows_of(tmp_path / "f.csv")
    assert row.values == {"text": "a, b", "label": "01"}  # cells are text
    assert row.where.endswith(":3")


def test_long_cells_are_read(tmp_path):
    (tmp_path / "f.csv").write_text(f"text,label\n{'x' * 300_000},a\n")
    assert len(rows_of(tmp_path / "f.csv")[0].values["text"]) == 300_000


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(("key", "others"), [("data", {"version": 1}), ("rows", {})])
def test_a_list_inside_of_an_object_is_read(tmp_path, key, others, indent):
    values = [{"text": f"t {index}", "label": index % 2} for index in range(4)]
    (tmp_path / "a.json").write_text(json.dumps({**others, key: values}, indent=indent))
    rows = rows_of(tmp_path / "a.json")
    assert [row.values for row in rows] == values
    assert rows[2].where.endswith("[2]")


def test_lines_of_a_json_list(tmp_path):
    values = [{"text": f'{index} "], [', "deep": [{"a": [1, 2]}, "}"]} for index in range(4)]
    (tmp_path / "a.json").write_text("\n [" + ",\n\n".join(map(json.dumps, values)) + "\n]\n")
    found = rows_of(tmp_path / "a.json")
    assert [row.values for row in found] == values
    assert [row.where.rsplit(":", 1)[1] for row in found] == ["2", "4", "6", "8"]


def test_whole_numbers_of_parquet_are_classes(tmp_path):
    columns = {"Text": [f"t {i}" for i in range(20)], "Label": [float(i % 2) for i in range(20)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "f.parquet")
    assert load_task(str(tmp_path / "f.parquet")).labels == ("0", "1")


def test_folders_name_labels(tmp_path):
    for row in labelled_rows():
        (tmp_path / row["label"]).mkdir(exist_ok=True)
        (tmp_path / row["label"] / f"{row['text']}.txt").write_text(row["text"])
    task = load_task(str(tmp_path))
    assert {(example["text"], task.labels[example["label"]]) for example in task.train} <= {
        (row["text"], row["label"]) for row in labelled_rows()
    }
    plain = load_task(str(tmp_path), kind="causal").train[0]
    assert plain["prompt"] == ""
    assert plain["completion"].startswith("text")


BAD_FILES = [
    ("a.jsonl", b"", ":1: the file must hold at least one example"),
    ("a.jsonl", b'{"text": "a", "label": 1}\n\n{"text"', ":3: the line must be JSON"),
    ("a.jsonl", b'{"text": "a", "label": 1}\n[1]', ":2: .* JSON object; got list"),
    ("a.jsonl", 5000 * b"[", ":1: the line must be JSON"),
    ("a.jsonl", b'{"text": ' + 5000 * b"9" + b"}", ":1: the line must be JSON that can be read"),
    ("a.jsonl", b"\xff\xfe\xff", ":1: the file must be UTF-8 text; byte 1"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', ":2: the file must be UTF-8 text; byte 11"),
    ("a.csv", b"text,label\na,b,c\n", ":2: a line must have 2 cells"),
    ("a.csv", b"text,label\na\n", ":2: a line must have 2 cells"),
    ("a.csv", b'text,label\n"a"b,c\n', ":2: the line must be CSV"),
    ("a.csv", b"", ":1: the file must hold"),
    ("a.csv", b"\na,b\n", ":1: the first line must name the columns"),
    ("a.csv", b"text,text\na,b\n", ":1: the header must name different columns; 'text'"),
    ("a.csv", b"text,label\na,1\n,2\n", ":3: column 'text' must hold text; got ''"),
    ("a.csv", b"text,label\na,1\n\xe9,2\n", ":3: the file must be UTF-8 text; byte 1"),
    ("a.json", b'[{"text": "a"},\n oops]', ":2: the file must be JSON; Expecting value at column 2$"),
    ("a.json", b'[{"text": "a,[]"},\n\n{"text": 1}]', ":3: column 'text' must hold text; got 1"),
    ("a.json", b'[\n{"text": "a"}\n,2]', ":3: .* JSON object; got int"),
    ("a.json", b'[{"text": "a", "lab', ":1: .* Unterminated string starting at column 16$"),
    ("a.json", b'{"data": [{"text": "a"},\n {"te', ":2: .* Unterminated .* at column 3$"),
    ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "several lists of examples, train, test"),
    ("a.json", b'{"text": ["a"], "label": [1]}', "got an object with text, label$"),
    ("a.json", b"{}", "must hold a list of examples"),
    ("a.json", b'"text"', "JSON object; got str"),
    ("a.parquet", b"nothing", "must be a Parquet file"),
    ("a.xlsx", b"nothing", r"must end in one of \.jsonl, \.json, \.csv, \.tsv, \.parquet; got '\.xlsx'"),
]


@pytest.mark.messages
@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*{message}") as caught:
        load_task(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.messages
@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", None], [1, 2], "column 'text' must hold text; got None"),
        (["a", "b"], [1.0, 0.5], "column 'label' .*regression"),
        ([b"good", b"\xff\xfe"], [1, 2], "a value cannot be read; 'utf-8' codec"),
    ],
)
def test_bad_rows_of_parquet_are_named(tmp_path, texts, labels, message):
    if isinstance(texts[0], bytes):
        texts = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"a\.parquet: row 1: {message}"):
        load_task(str(tmp_path / "a.parquet"))
