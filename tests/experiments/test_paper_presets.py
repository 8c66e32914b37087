"""The papers' settings, which need the hub and large models, with tiny ones of the same kind in their place."""

import json
import math
import random

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import T5Config, T5ForConditionalGeneration

from tangora.experiments.comparison.plan import PlanSettings, read_plan
from tangora.experiments.run.execute import execute
from tangora.experiments.run.preparing import load_run_task
from tangora.experiments.settings_files import preset
from tangora.training.answers import answers_match
from tangora.training.benchmarks import load_benchmarks
from tangora.training.callbacks import read_history
from tests.experiments.lm_eval_tasks import write_tasks
from tests.models import SPECIAL, WORDS, tiny_llama, tiny_tokenizer

SMALL = {
    "num_train": 40,
    "num_validation": 10,
    "num_test": 10,
    "steps": 2,
    "batch_size": 4,
    "start_examples": 4,
    "rank": 2,
}
RECIPES = ["full", "lora", "lora-ga", "lora-pro", "orthogonal+tangent"]

pytestmark = pytest.mark.filterwarnings("ignore:step .* changes A of")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def glue(tmp_path):
    """T5 as it comes from pretraining, and pairs of sentences."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(SPECIAL) + len(WORDS), d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2,
        pad_token_id=0, eos_token_id=3, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 3)]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"sentence1": f"{a} {b}", "sentence2": f"{b} {c}", "label": int(a == c)}
        for a in WORDS[:6] for b in WORDS[:6] for c in WORDS[:6]
    ]  # fmt: skip
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    return {"model": str(tmp_path / "model"), "data": data, **SMALL}


@pytest.fixture
def mathematics(tmp_path):
    """Llama; solutions to learn from, and problems of another data set with other columns to be tested on."""
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    numbers = random.Random(0).sample([(a, b) for a in range(30) for b in range(30)], 100)
    learnt = [
        {"query": f"{a} + {b}", "response": f"{a} + {b} = {a + b}\nThe answer is: {a + b}", "type": "sum"}
        for a, b in numbers[:80]
    ]
    tested = [
        {"question": f"{a} + {b}", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in numbers[80:]
    ]
    return {
        "model": str(tmp_path / "model"),
        "data": write_lines(tmp_path / "learnt.jsonl", learnt),
        "test_data": write_lines(tmp_path / "tested.jsonl", tested),
        **SMALL,
        "accumulate": 2,
        "learning_rates": {},
    }


@pytest.fixture
def chat(tmp_path):
    """Llama without a chat template; instructions and their outputs; prompts of two turns."""
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"instruction": f"{a} {b} " + "cat " * 30, "output": f"{b} {a}", "instruction_zh": "", "output_zh": ""}
        for a in WORDS[:8] for b in WORDS[:8]
    ]  # fmt: skip
    prompts = [{"prompt": ["red cat", "blue"], "category": "writing", "reference": [], "prompt_id": 81}]
    return {
        "model": str(tmp_path / "model"),
        "data": write_lines(tmp_path / "instructions.jsonl", rows),
        "prompts": write_lines(tmp_path / "prompts.jsonl", prompts),
        **SMALL,
        "accumulate": 2,
        "max_length": 96,
        "max_new_tokens": 3,
        "learning_rates": {},
    }


def speaker(folder):
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    benchmarks = {"benchmark_path": str(write_tasks(folder / "tasks"))}
    return {"model": str(folder / "model"), **SMALL, **benchmarks, "accumulate": 1, "learning_rates": {}}


@pytest.fixture
def code(tmp_path):
    """Questions with answers, as CodeFeedback has them; the programs of a task are only written down."""
    pytest.importorskip("lm_eval", reason="needs the extra eval, lm-eval")
    rows = [
        {"query": f"{a} + {b}", "answer": f"red = {a} + {b}\nblue", "resource": "oss", "lang": "python"}
        for a in range(8)
        for b in range(8)
    ]
    return {
        "data": write_lines(tmp_path / "code.jsonl", rows),
        "benchmarks": ["tiny_code"],
        **speaker(tmp_path),
    }


@pytest.fixture
def commonsense(tmp_path):
    """Questions with a sentence as their output and its last word as their answer."""
    pytest.importorskip("lm_eval", reason="needs the extra eval, lm-eval")
    rows = [
        {
            "instruction": f"{a} + {b} red: {a + b} blue: {a}",
            "input": "",
            "output": "cat = red",
            "answer": "red",
        }
        for a in range(8)
        for b in range(8)
    ]
    return {
        "data": write_lines(tmp_path / "170k.jsonl", rows),
        "benchmarks": ["tiny_sums"],
        **speaker(tmp_path),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_glue(glue, tmp_path, name):
    plan = read_plan(preset("paper-glue"))
    assert isinstance(plan, PlanSettings)
    settings = type(plan.tasks["mrpc"])(**plan.tasks["mrpc"].model_dump() | glue).run(name, 1e-3, 0)
    task = load_run_task(settings)
    assert {"text", "text_pair", "label"} == set(task.train[0])
    record = execute(settings, task, tmp_path / "run", run_id="run")
    assert record.status == "finished", record.error
    assert set(record.metrics["test"]) >= {"accuracy", "loss"}


@pytest.mark.parametrize("name", RECIPES)
def test_mathematics(mathematics, tmp_path, name):
    plan = read_plan(preset("paper-math") | mathematics)
    assert not isinstance(plan, PlanSettings)
    settings = plan.run(name, 1e-3, 0)
    assert settings.dtype == ("float32" if name == "full" else "bfloat16")
    task = load_run_task(settings)
    assert all("####" in example["completion"] for example in task.test)
    assert all("The answer is:" in example["completion"] for example in (*task.train, *task.validation))
    record = execute(settings, task, tmp_path / "run", run_id="run")
    assert record.status == "finished", record.error
    assert record.metrics["test"]["exact_match"] == sum(record.correct) / len(task.test)
    assert plan.metric == "exact_match"


@pytest.mark.parametrize("name", RECIPES)
def test_chat(chat, tmp_path, name):
    plan = read_plan(preset("paper-chat") | chat)
    assert not isinstance(plan, PlanSettings)
    settings = plan.run(name, 1e-3, 0)
    task = load_run_task(settings)
    record = execute(settings, task, tmp_path / "run", run_id="run")
    assert record.status == "finished", record.error
    assert record.settings["data_format"] == "chat template"
    (answered,) = read_history(tmp_path / "run" / "answers.jsonl")
    assert (answered["id"], len(answered["answers"]), answered["recipe"]) == ("81", 2, name)
    assert plan.metric == "loss"


@pytest.mark.parametrize("name", ["full", "lora", "lora-pro"])
def test_code(code, tmp_path, name):
    plan = read_plan(preset("paper-code") | code)
    assert not isinstance(plan, PlanSettings)
    settings = plan.run(name, 1e-3, 0)
    task = load_run_task(settings)
    assert {"blue" in example["completion"] and "+" in example["prompt"] for example in task.train} == {True}
    record = execute(settings, task, tmp_path / "run", run_id="run")
    assert record.status == "finished", record.error
    assert record.benchmarks["tiny_code"].metric is None
    assert (tmp_path / "run" / "benchmarks" / "tiny_code.jsonl").is_file()
    assert plan.metric == "loss"
    assert set(preset("paper-code")["benchmarks"]) == {"humaneval", "mbpp"}


@pytest.mark.parametrize("name", ["lora", "lora-one"])
def test_commonsense(commonsense, tmp_path, name):
    plan = read_plan(preset("paper-commonsense") | commonsense | {"epochs": None, "steps": 2})
    assert not isinstance(plan, PlanSettings)
    settings = plan.run(name, 1e-3, 0)
    task = load_run_task(settings)
    assert all("red:" in example["prompt"] for example in task.train)
    # the sentence that the model learns is right, and so is the answer alone
    assert answers_match(["cat = red", "red"], task.test[:2]).all()
    assert not answers_match(["cat = blue", "cat"], task.test[:2]).any()
    record = execute(settings, task, tmp_path / "run", run_id="run")
    assert record.status == "finished", record.error
    assert record.metrics["test"]["exact_match"] == sum(record.correct) / len(task.test)
    assert record.benchmarks["tiny_sums"].num_examples == 12
    assert plan.metric == "exact_match"
    assert len(preset("paper-commonsense")["benchmarks"]) == 8


@pytest.mark.parametrize("name", ["paper-code", "paper-commonsense"])
def test_stand_ins_need_no_hub(name):
    pytest.importorskip("lm_eval", reason="needs the extra eval, lm-eval")
    plan = read_plan(preset(name), tiny=True)
    assert not isinstance(plan, PlanSettings)
    task = load_run_task(plan)
    assert len(task.test) == plan.num_test
    loaded = load_benchmarks(plan.benchmarks)
    asked = [min(len(each.eval_docs), plan.benchmark_limit or math.inf) for each in loaded.tasks.values()]
    assert asked == [len(task.test)]
    assert plan.model == "smollm2-135m"
