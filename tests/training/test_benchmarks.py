"""Benchmarks of lm-eval on a model in memory, against lm-eval itself."""

import json
import random

import numpy
import pytest
import torch

from tangora._checks import InputError
from tangora.training.benchmarks import evaluate_benchmarks, load_benchmarks, packaged_test
from tangora.training.data.sources import read_data
from tangora.training.sandbox import run_programs
from tests.experiments.lm_eval_tasks import RIGHT, skip_without_sandbox, write_tasks
from tests.models import randomize, tiny_llama, tiny_tokenizer, with_lora

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval, lm-eval")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_tasks(tmp_path_factory.mktemp("tasks")))


@pytest.fixture(scope="module", autouse=True)
def _data_in_a_folder_of_its_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def adapted(**config):
    model = with_lora(tiny_llama(num_hidden_layers=1, **config.pop("base", {})), **config)
    return randomize(model, seed=1)


@pytest.mark.parametrize("name", ["tiny_sums", "tiny_few"])
def test_results_are_those_of_lm_eval(folder, name):
    model, tokenizer = adapted(), tiny_tokenizer()
    results, samples = evaluate_benchmarks(load_benchmarks([name], folder), model, tokenizer, batch_size=4)
    theirs = lm_eval.simple_evaluate(
        model=lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        tasks=[name],
        task_manager=lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False),
    )
    ours, found = results[name], theirs["results"][name]
    assert ours.metric == "acc,none"
    assert ours.metrics.keys() == {key for key in found if key.startswith("acc") and "stderr" not in key}
    assert all(found[key] == value for key, value in ours.metrics.items())
    assert all(found[key.replace(",", "_stderr,")] == value for key, value in ours.stderr.items())
    assert ours.stderr
    assert ours.scores == [example["acc"] for example in theirs["samples"][name]]
    assert 0 < sum(ours.scores) < len(ours.scores) == ours.num_examples == 12
    assert ours.num_fewshot == theirs["n-shot"][name] == (2 if name == "tiny_few" else 0)
    assert ours.higher_is_better
    assert not samples


def test_a_group_is_the_mean_over_its_parts(folder):
    results, _ = evaluate_benchmarks(load_benchmarks(["tiny_group"], folder), adapted(), tiny_tokenizer())
    assert [*results] == ["tiny_group"]
    found = results["tiny_group"]
    assert found.num_examples == len(found.scores) == 24
    assert found.metrics["acc,none"] == pytest.approx(sum(found.scores) / 24)


def test_limit(folder):
    results, _ = evaluate_benchmarks(
        load_benchmarks(["tiny_sums"], folder), adapted(), tiny_tokenizer(), limit=5
    )
    assert results["tiny_sums"].num_examples == len(results["tiny_sums"].scores) == 5


def test_the_model_is_left_as_it_was(folder):
    # lm-eval would tie its weights anew, which fails where an adapter lies on the embedding
    config = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    model, tokenizer = adapted(base={"tie_word_embeddings": True}, **config), tiny_tokenizer(pad=False)
    model.train()
    model.base_model.model.model.layers[0].eval()
    model(input_ids=torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    needed = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5), numpy.random.seed(5), random.seed(5)  # noqa: NPY002
    drawn = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    evaluate_benchmarks(load_benchmarks(["tiny_sums"], folder), model, tokenizer)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)
    assert grads
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2
    assert [p.requires_grad for p in model.parameters()] == needed
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert numpy.random.get_state()[1].tolist() == drawn[1]  # noqa: NPY002
    assert random.getstate() == drawn[2]
    assert "tie_weights" not in vars(model)
    assert tokenizer.pad_token is None


def test_programs_are_not_run_unless_that_is_wanted(folder, monkeypatch):
    monkeypatch.setattr("tangora.training.code_eval.run_program", None)
    results, samples = evaluate_benchmarks(
        load_benchmarks(["tiny_code", "tiny_unprotected"], folder), adapted(), tiny_tokenizer()
    )
    found = results["tiny_code"]
    assert (found.metric, found.metrics, found.scores, found.num_examples) == (None, {}, None, 4)
    assert [sample.passed for sample in samples["tiny_code"]] == [None] * 4
    assert all(sample.program.startswith("def sum(a, b):\n") for sample in samples["tiny_code"])
    assert all(sample.test.endswith("check(sum)") for sample in samples["tiny_code"])


def test_programs_are_judged_by_the_sandbox(folder, tmp_path):
    skip_without_sandbox()
    loaded = load_benchmarks(["tiny_code"], folder, execute_code=True)
    results, samples = evaluate_benchmarks(loaded, adapted(), tiny_tokenizer(), execute_code=True)
    found = results["tiny_code"]
    assert found.metric == "pass@1,create_test"
    assert found.scores == [float(right) for right in RIGHT]
    assert found.metrics[found.metric] == sum(RIGHT) / len(RIGHT)
    assert found.stderr[found.metric] > 0
    assert [sample.passed for sample in samples["tiny_code"]] == RIGHT
    assert "AssertionError" in samples["tiny_code"][1].reason
    json.dumps([vars(sample) for sample in samples["tiny_code"]])


def test_no_program_leaves_a_trace(folder, tmp_path):
    skip_without_sandbox()
    traces = write_tasks(tmp_path / "own")
    for execute_code in (False, True):
        loaded = load_benchmarks(["tiny_code"], str(traces), execute_code=execute_code)
        _, samples = evaluate_benchmarks(loaded, adapted(), tiny_tokenizer(), execute_code=execute_code)
        assert not (traces / "has_run").exists()
    program = samples["tiny_code"][0]
    exec(program.program + "\nsum(1, 2)", {})  # here it does
    assert (traces / "has_run").exists()


@pytest.mark.messages
def test_errors(folder, tmp_path):
    with pytest.raises(InputError, match=r"'hellaswagg' \(did you mean hellaswag\?\)"):
        load_benchmarks(["hellaswagg"])
    with pytest.raises(InputError, match="benchmark_path must be a folder"):
        load_benchmarks(["tiny_sums"], str(tmp_path / "none"))
    with pytest.raises(InputError, match="benchmark tiny_own_judge cannot be used"):
        load_benchmarks(["tiny_own_judge"], folder)
    broken = write_tasks(tmp_path / "broken")
    (broken / "sums.jsonl").unlink()
    with pytest.raises(InputError, match="benchmark tiny_sums cannot be loaded"):
        load_benchmarks(["tiny_sums"], str(broken))
    skip_without_sandbox()
    with pytest.raises(InputError, match="execute_code cannot be used with benchmark tiny_unprotected"):
        load_benchmarks(["tiny_unprotected"], folder, execute_code=True)


def test_lm_evals_own_code_tasks_can_be_judged(monkeypatch):
    skip_without_sandbox()
    # their data are on the hub, their functions here
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.tasks.manager import TaskManager

    from tangora.training.code_eval import check_code, code_eval_replaced, writes_code

    class Task:
        def __init__(self, config):
            self.get_config = config.get

    tasks = TaskManager.load.__globals__["__file__"].rpartition("/")[0]
    with code_eval_replaced():
        for name in (
            "humaneval/humaneval",
            "humaneval/humaneval_instruct",
            "mbpp/mbpp",
            "mbpp/mbpp_instruct",
        ):
            task = Task(load_yaml(f"{tasks}/{name}.yaml"))
            assert writes_code(task)
            check_code(name, task, execute_code=True)


def test_packaged_functions_pass_their_tests():
    skip_without_sandbox()
    rows = packaged_test("python-functions")["test"]
    tests = [f"{row['test']}\ncheck({row['entry_point']})" for row in rows]
    right = [f"{row['prompt']}{row['completion']}\n{test}" for row, test in zip(rows, tests, strict=True)]
    wrong = [f"{row['prompt']}    return None\n{test}" for row, test in zip(rows, tests, strict=True)]
    assert all(verdict.passed for verdict in run_programs(right))
    assert not any(verdict.passed for verdict in run_programs(wrong[:5]))


def test_packaged_choices_have_one_right_answer():
    data = read_data("everyday-choices").splits
    for row in data["test"]:
        assert row.values["answer"] == f"answer{row.values['label'] + 1}"
        assert (
            f"Answer{row.values['label'] + 1}: {row.values['choices'][row.values['label']]}"
            in row.values["instruction"]
        )
    assert not {row.values["instruction"] for row in data["test"]} & {
        row.values["instruction"] for row in data["train"]
    }
