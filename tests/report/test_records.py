import json
import math
import os

import pytest
from pydantic import ValidationError

from tangora._checks import InputError
from tangora.report import Comparison, Record, load_comparison, load_record, record_files, save_json
from tests.report.synthetic import diverged, make_comparison, make_record, realistic, save_comparison


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_record_survives_the_file(tmp_path):
    record = make_record("lora-ga", correct=[True, False, True])
    assert load_record(save_json(record, tmp_path / "new" / "record.json")) == record


def test_nan_and_infinity_survive_as_valid_json(tmp_path):
    record = diverged("lora", 1.0, settings={"clip": math.inf}, metrics={"validation": {"loss": -math.inf}})
    path = save_json(record, tmp_path / "record.json")
    json.loads(path.read_text(), parse_constant=refuse_constant)
    loaded = load_record(path)
    assert math.isnan(loaded.history[1].loss)
    assert loaded.history[0].grad_norm == math.inf
    assert loaded.metrics["validation"]["loss"] == -math.inf
    assert loaded.settings["clip"] == "Infinity"  # settings are free-form: nothing says it was a float
    assert loaded.model_dump_json() == record.model_dump_json()


def test_comparison_survives_the_folder(tmp_path):
    comparison = realistic()
    loaded = load_comparison(save_comparison(comparison, tmp_path))
    by_id = sorted(comparison.records, key=lambda record: record.id)
    # As text, because a diverged run's NaN is not equal to itself.
    assert loaded.model_dump_json() == comparison.model_copy(update={"records": by_id}).model_dump_json()


def test_records_may_also_be_inside_the_comparison(tmp_path):
    old, new, other = make_record(test=0.1), make_record(test=0.2), make_record("full")
    save_json(make_comparison([old, other]), tmp_path / "comparison.json")
    save_json(new, tmp_path / "records" / f"{new.id}.json")
    assert {record.id: record for record in load_comparison(tmp_path).records} == {
        new.id: new,
        other.id: other,
    }


def test_a_crash_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = save_json(make_record(test=0.1), tmp_path / "record.json")
    before = path.read_bytes()

    def crash(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record_files.os, "fsync", crash)
    with pytest.raises(InputError):
        save_json(make_record(test=0.2), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["record.json"]


def test_files_are_as_readable_as_others(tmp_path):
    (tmp_path / "plain").write_text("")
    path = save_json(make_record(), tmp_path / "record.json")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("identifier", ["../up", "a/b", "", ".hidden", "a\nb", "x" * 300])
def test_an_id_is_a_file_name(identifier):
    with pytest.raises(ValidationError):
        make_record(id=identifier)


def test_models_are_frozen_and_closed():
    with pytest.raises(ValidationError):
        make_record().seed = 1
    with pytest.raises(ValidationError):
        make_record(surprise=1)
    with pytest.raises(ValidationError):
        make_record(created="yesterday")


def test_the_same_run_twice_is_refused():
    with pytest.raises(ValidationError, match="more than once"):
        make_comparison([make_record(), make_record()])
    with pytest.raises(ValidationError, match="more than once"):
        make_comparison([make_record(), make_record(id="another")])


@pytest.mark.parametrize("model", [Record, Comparison])
def test_every_field_says_what_it_means(model):
    known = {
        "schema_version",
        "time",
        "memory",
        "trainable_parameters",
        "title",
        "higher_is_better",
        "records",
    }
    assert {name for name, field in model.model_fields.items() if not field.description} <= known


def test_the_last_points_that_version_2_kept_are_read():
    older = make_record().model_dump() | {
        "schema_version": 2,
        "trajectory": {"step": 5, "cosine": 0.5},
        "curvature": {},
    }
    read = Record.model_validate(older)
    assert read.trajectory == [{"step": 5, "cosine": 0.5}]
    assert read.curvature == []


def break_json(path):
    path.write_text(path.read_text()[:-20])


def break_encoding(path):
    path.write_bytes(b"\xff\xfe\x00")


def change(**changes):
    def apply(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


@pytest.mark.messages
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_json, "is not valid JSON"),
        (break_encoding, "is not valid JSON"),
        (lambda path: path.write_text("[1]"), "must contain a JSON object; got list"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (change(schema_version=4), "has schema_version 4; this tangora reads 1 to 3"),
        (change(schema_version=None), "has schema_version None"),
        (
            change(stage="rehearsal"),
            "is not a valid Record at stage: Input should be 'trial', 'sweep' or 'final'",
        ),
        (change(surprise=1), "is not a valid Record at surprise"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, damage, message):
    path = save_json(make_record(), tmp_path / "broken.json")
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        load_record(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.messages
def test_a_damaged_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"comparison\.json cannot be read"):
        load_comparison(tmp_path)
    save_comparison(make_comparison([make_record(), make_record("full")]), tmp_path)
    path = next((tmp_path / "records").glob("*.json"))
    (path.parent / "copy.json").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"has the id .* of "):
        load_comparison(tmp_path)
    change(id="other")(path.parent / "copy.json")
    with pytest.raises(InputError, match="the same run is recorded more than once"):
        load_comparison(tmp_path)


@pytest.mark.messages
def test_settings_that_json_cannot_say(tmp_path):
    with pytest.raises(InputError, match=r"record\.json cannot be written as JSON"):
        save_json(make_record(settings={"model": object()}), tmp_path / "record.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_json(make_record(), tmp_path / "file" / "record.json")
