"""Answers to prompts: written after training, in turns; judged by a command, whose failure loses nothing. Packing."""

import json
import sys

import pytest

from tangora import CompareSettings, InputError, RunSettings, compare, train
from tangora.experiments.run.answering import mean_score
from tangora.experiments.values import validated
from tangora.report import load_record
from tangora.training.callbacks import read_history
from tangora.training.data.prompts import read_prompts
from tests.models import tiny_llama, tiny_tokenizer

PROMPTS = [["red cat", "blue dog"], "sun"]
JUDGE = """\
import json, sys
for line in open(sys.argv[1]):
    line = json.loads(line)
    print(json.dumps({"score": len(line["answers"])}))
"""


@pytest.fixture
def judge(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    return [sys.executable, str(tmp_path / "judge.py")]


def small_run(generator, **more):
    return RunSettings(
        **generator, recipe="lora", steps=2, batch_size=4, prompts=PROMPTS, max_new_tokens=4, **more
    )


def test_answers_are_written_and_judged(generator, judge, tmp_path):
    settings = small_run(generator, seed=3, judge=judge)
    record = train(settings, tmp_path / "out")
    lines = read_history(tmp_path / "out" / "answers.jsonl")
    assert [(line["id"], line["turns"]) for line in lines] == [("1", ["red cat", "blue dog"]), ("2", ["sun"])]
    assert [len(line["answers"]) for line in lines] == [2, 1]
    assert all((line["recipe"], line["seed"]) == ("lora", 3) for line in lines)
    assert record.metrics["answers"] == {"judged": 1.5}
    assert load_record(tmp_path / "out" / "record.json").metrics == record.metrics
    assert train(settings, tmp_path / "out") == record


def test_a_judge_that_fails_loses_nothing(generator, judge, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="answers are kept"):
        train(small_run(generator, judge=[sys.executable, "-c", "raise ValueError('no key')"]), out)
    kept = load_record(out / "record.json")
    assert kept.status == "finished"
    assert "answers" not in kept.metrics
    before = (out / "answers.jsonl").read_bytes()
    record = train(small_run(generator, judge=judge), out)
    assert record.metrics == kept.metrics | {"answers": {"judged": 1.5}}
    assert record.history == kept.history
    assert (out / "answers.jsonl").read_bytes() == before
    assert train(small_run(generator, judge=[sys.executable, "-c", "print(7)"]), out).metrics["answers"] == {
        "judged": 7
    }


def test_a_comparison_judges_what_it_reports(generator, judge, tmp_path):
    settings = CompareSettings(
        **generator, recipes=["lora"], learning_rates=[1e-3, 1e-2], seeds=[0], steps=2, batch_size=4,
        metric="exact_match", prompts=PROMPTS, max_new_tokens=4, judge=judge,
    )  # fmt: skip
    assert settings.judge_by == "exact_match"
    records = compare(settings, tmp_path / "out").comparison.records
    scored = [record for record in records if "answers" in record.metrics]
    assert (len(records), len(scored)) == (2, 1)
    assert scored[0].metrics["validation"]["exact_match"] == max(
        record.metrics["validation"]["exact_match"] for record in records
    )
    assert all((tmp_path / "out" / "runs" / record.id / "answers.jsonl").is_file() for record in records)


@pytest.mark.parametrize("printed", ["", "good", "true", "NaN", '{"mark": 3}', "[1]", "1\\nbad"])
@pytest.mark.messages
def test_what_is_no_score_is_refused(tmp_path, printed):
    with pytest.raises(InputError, match="must print a number"):
        mean_score([sys.executable, "-c", f"print('{printed}')"], tmp_path)


@pytest.mark.messages
def test_a_judge_that_cannot_be_run(tmp_path):
    with pytest.raises(InputError, match="cannot be run"):
        mean_score([str(tmp_path / "nothing")], tmp_path)
    with pytest.raises(InputError, match="exit code 3"):
        mean_score([sys.executable, "-c", "exit(3)"], tmp_path)


def test_prompts_as_the_hub_and_fastchat_write_them(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": ["one", "two"], "prompt_id": 81, "category": "writing"},
        {"question_id": 82, "turns": ["three"]},
        {"prompt": "four"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(str(file)) == [("81", ("one", "two")), ("82", ("three",)), ("3", ("four",))]


@pytest.mark.parametrize(
    "row", [{"question": "one"}, {"prompt": []}, {"prompt": ["one", " "]}, {"prompt": 3}]
)
@pytest.mark.messages
def test_prompts_that_are_none_are_refused_before_training(generator, tmp_path, row):
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    settings = RunSettings(**generator, prompts=str(tmp_path / "prompts.jsonl"), steps=1)
    with pytest.raises(InputError, match=r"prompts\.jsonl:1"):
        train(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given",
    [{"stop": "red"}, {"max_new_tokens": 3}, {"judge": "echo 1"}, {"exact_match": True, "stop": [""]}, {"prompts": []}],
)  # fmt: skip
@pytest.mark.messages
def test_settings_that_would_do_nothing_are_refused(given):
    with pytest.raises(InputError, match=next(reversed(given))):
        validated(RunSettings, given)


def test_a_base_model_learns_conversations_with_a_template_by_name(generator, tmp_path):
    said = [
        {"messages": [{"role": "user", "content": f"{a} {b} cat " * 12}, {"role": "assistant", "content": "red"}]}
        for a in range(9) for b in range(9)
    ]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    own = {"data": str(tmp_path / "chat.jsonl"), "chat_template": "alpaca", "num_train": 40, "max_length": 96}
    record = train(small_run(generator | own), tmp_path / "out")
    assert record.status == "finished"
    assert record.settings["data_format"] == "chat template"
    assert "### Response" in (tmp_path / "out" / "adapter" / "chat_template.jinja").read_text()
    assert len(read_history(tmp_path / "out" / "answers.jsonl")) == 2


@pytest.mark.parametrize("recipe", ["lora", "odelora-heun"])
def test_a_packed_run_is_the_padded_run(generator, tmp_path, recipe):
    tiny_llama(num_hidden_layers=1, attention_dropout=0.0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    losses, generator = [], generator | {"model": str(tmp_path / "model")}
    for packing in (False, True):
        settings = RunSettings(
            **generator,
            recipe=recipe,
            steps=4,
            batch_size=8,
            accumulate=2,
            learning_rate=1e-2,
            packing=packing,
        )
        losses.append([step.loss for step in train(settings, tmp_path / str(packing)).history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-3)


@pytest.mark.parametrize("key", ["packing", "prompts"])
@pytest.mark.messages
def test_settings_for_causal_models_are_refused_for_classifiers(classifier, tmp_path, key):
    settings = RunSettings(**classifier, **{key: True if key == "packing" else ["red"]})
    with pytest.raises(InputError, match=f"{key} is about"):
        train(settings, tmp_path / "out")
