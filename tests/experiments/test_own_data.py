"""Runs on one's own data: sizes are recorded, old folders go on, and what is cut off is said."""

import itertools
import json
import logging

import pytest

from tangora import CompareSettings, InputError, RunSettings, compare, train
from tangora.experiments.run.preparing import check_chat, load_run_task, sized
from tangora.report import load_record
from tests.experiments.small import write_classifier, write_generator
from tests.models import WORDS


@pytest.fixture
def small(tmp_path):
    """Settings without sizes."""
    values = write_classifier(tmp_path)
    return {key: value for key, value in values.items() if not key.startswith("num_")} | {"steps": 1}


def test_sizes_are_recorded_and_folders_that_name_them_go_on(small, tmp_path):
    record = train(RunSettings(**small), tmp_path / "out")
    assert (record.settings["num_validation"], record.settings["num_test"]) == (68, 68)
    # an older version wrote its defaults, and knew no chat template
    path = tmp_path / "out" / "settings.json"
    values = json.loads(path.read_text())
    assert (values["num_validation"], values["num_test"]) == (68, 68)
    values.pop("chat_template")
    path.write_text(json.dumps(values))
    assert train(RunSettings(**small), tmp_path / "out") == record
    assert train(RunSettings(**small, num_test=68), tmp_path / "out") == record
    with pytest.raises(InputError, match="num_test is 68 there and 50 here"):
        train(RunSettings(**small, num_test=50), tmp_path / "out")
    older = json.loads((tmp_path / "out" / "record.json").read_text())
    del older["notes"]
    (tmp_path / "old.json").write_text(json.dumps(older))
    assert load_record(tmp_path / "old.json").notes == []


def test_folders_with_other_sizes_go_on_with_those(small, tmp_path):
    record = train(RunSettings(**small, num_validation=50, num_test=60), tmp_path / "out")
    assert train(RunSettings(**small), tmp_path / "out") == record


def test_the_default_task_has_its_published_sizes(tmp_path):
    settings, _ = sized(RunSettings(), tmp_path / "out")
    assert (settings.num_train, settings.num_validation, settings.num_test) == (None, 200, 500)


def test_what_is_cut_off_is_told_logged_and_recorded(small, tmp_path, caplog):
    settings = RunSettings(**small | {"max_length": 2})
    with caplog.at_level(logging.INFO, logger="tangora"):
        record = train(settings.model_copy(update={"num_train": 10}), tmp_path / "out")
    (sentence,) = [note for note in record.notes if "are cut to" in note]
    assert sentence.startswith("10 of 10 training, ")
    assert sentence.endswith(" are cut to 2 tokens (longest 3); the end is lost; increase --max-length")
    assert sentence in (tmp_path / "out" / "log.txt").read_text()


def test_a_comparison_says_what_is_cut_and_refuses_what_leaves_nothing_before_its_first_run(small, tmp_path):
    own = small | {"recipes": ["lora"], "learning_rates": {"lora": [1e-3]}, "seeds": [0], "max_length": 2}
    outcome = compare(CompareSettings(**own | {"num_train": 10}), tmp_path / "cut")
    (record,) = outcome.comparison.records
    assert any(note.startswith("10 of 10 training") and " cut to 2 tokens" in note for note in record.notes)
    first, second, *others = WORDS[:7]
    rows = [
        {"text": f"{first} {second} {one} {other}", "label": index % 2}
        for index, (one, other) in enumerate(itertools.product(others, others))
    ]
    alike = tmp_path / "alike.jsonl"
    alike.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="only 1 different"):
        compare(CompareSettings(**own | {"data": str(alike)}), tmp_path / "alike")
    assert not (tmp_path / "alike").exists()


@pytest.mark.messages
def test_conversations_need_a_word_about_the_template(tmp_path):
    values = write_generator(tmp_path) | {"steps": 1}
    turns = [
        [{"role": "user", "content": f"{number} + 1"}, {"role": "assistant", "content": str(number + 1)}]
        for number in range(200)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    chat = values | {"data": str(tmp_path / "chat.jsonl")}
    with pytest.raises(InputError, match="contains conversations: pass --chat-template"):
        train(RunSettings(**chat), tmp_path / "out")
    with pytest.raises(InputError, match="tokenizer has none"):
        train(RunSettings(**chat, chat_template=True), tmp_path / "out")
    record = train(RunSettings(**chat, chat_template=False), tmp_path / "plain")
    assert record.status == "finished"
    labelled = load_run_task(RunSettings(**write_classifier(tmp_path)))
    with pytest.raises(InputError, match="has labels: omit it"):
        check_chat(labelled, True)
