"""Several processes of a launcher train one model, and it is the one that a single process trains."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tangora import InputError, RunSettings, train
from tangora._checks import OtherRankError
from tangora._folders import RunFolder
from tangora.experiments import train as train_module
from tangora.experiments.run.preparing import load_run_task
from tangora.experiments.run.saving import verify_adapter
from tangora.training.callbacks import StepTimer
from tests.experiments.small import write_classifier, write_generator
from tests.models import tiny_llama, tiny_tokenizer
from tests.processes import in_processes

SHARED = {"num_train": 31, "batch_size": 6, "accumulate": 2, "learning_rate": 1e-2, "epochs": 1}
"""The last batch has one example, and one of two processes none of it."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.messages,
    pytest.mark.filterwarnings(
        "ignore:step .* changes A of",
        "ignore:The following rank_pattern keys did not match",  # PEFT, loading an AdaLoRA adapter
        "ignore:Adapter .default.. \\d+ LoRA tensor",  # AdaLoRA takes some layers their whole rank
    ),
]


def written(folder, write):
    """Write a model and data; it has no dropout, which processes draw each for their own examples."""
    folder.mkdir()
    small = write(folder)
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config |= {key: 0.0 for key in config if "dropout" in key and config[key]}
    path.write_text(json.dumps(config))
    return small | SHARED


def write_sharded_classifier(folder):
    small = write_classifier(folder)
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return small


def cases(folder):
    classifier, generator = (
        written(folder / name, write) for name, write in (("c", write_classifier), ("g", write_generator))
    )
    measured = {"measure_every": 2, "measure_gradient": 8, "curvature_every": 3}
    whole = {
        "measured": RunSettings(**classifier, recipe="lora-ga", evaluate_every=2, **measured),
        "answers": RunSettings(**generator, recipe="adalora", exact_match=True, forgetting=True),
        "ranks": RunSettings(**generator | {"epochs": 3}, recipe="adalora+tangent"),
        "stages": RunSettings(**generator, recipe="odelora-heun"),
        "one step": RunSettings(**generator, recipe="one-step"),
        "cut off": RunSettings(**classifier, recipe="tangent", save_every=2),
        "cut off, and alone": RunSettings(**generator, recipe="tangent", save_every=2),
    }
    heads = written(folder / "s", write_sharded_classifier)
    sharded = {
        "start": RunSettings(**generator, recipe="lora-ga", fsdp=True, exact_match=True),
        "head": RunSettings(**heads, recipe="tangent", fsdp=True, gradient_checkpointing=True),
        "cut off, and not sharded": RunSettings(**generator, recipe="tangent", fsdp=True, save_every=2),
    }
    return whole | sharded


def averaging(tensor, op=dist.ReduceOp.SUM, _reduce=dist.all_reduce, **options):
    """Average as NCCL does, which gloo cannot."""
    done = _reduce(tensor, dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op, **options)
    if op == dist.ReduceOp.AVG:
        tensor.div_(dist.get_world_size())
    return done


def interrupt(self, args, state, control, **_):
    if state.global_step == 2:
        raise KeyboardInterrupt


def together(rank, folder, runs):
    """Train all runs, some of which are interrupted; return what the bad ones raise."""
    dist.all_reduce = averaging
    records = {}
    for name, settings in runs.items():
        with pytest.MonkeyPatch.context() as patch:
            if "cut off" in name:
                patch.setattr(StepTimer, "on_step_begin", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    train(settings, f"{folder}/{name}")
        if name in {"cut off, and alone", "cut off, and not sharded"}:  # another number of processes goes on
            continue
        records[name] = train(settings, f"{folder}/{name}")
    return records, refusals(rank, folder, runs["stages"])


def refusals(rank, folder, settings):
    def caught(settings, name="bad"):
        with pytest.raises((InputError, MemoryError)) as error:
            train(settings, f"{folder}/{name}")
        return type(error.value), str(error.value)

    def fails(_):
        raise InputError("only here")

    def out_of_memory(*_, **__):
        raise MemoryError("too much")

    found = {
        "remainder": caught(settings.model_copy(update={"batch_size": 7})),
        "device": caught(settings.model_copy(update={"device": "cuda:1"})),
        "other seeds": caught(settings.model_copy(update={"seed": rank})),
        "first": caught(settings.model_copy(update={"seed": 7}), "stages"),
    }
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(train_module, "check_trackers", fails)
        found["second"] = caught(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "execute", out_of_memory)
        found["both"] = caught(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        found["precision"] = caught(settings)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    runs = cases(folder)
    (folder / "two").mkdir()
    return folder, runs, in_processes(together, folder, 2, str(folder / "two"), runs)


def test_all_together_train_what_one_process_trains(trained):
    folder, runs, found = trained
    for name, settings in runs.items():
        alone = settings.model_copy(update={"fsdp": False})
        one, two = train(alone, folder / "one" / name), train(alone, folder / "two" / name)
        assert all(records.get(name, two) == two for records, _ in found)
        assert_same_run(one, two)
        if settings.recipe != "lora-ga":  # whose factors the rounding of near directions turns
            ours, theirs = (
                load_file(RunFolder(folder / which / name).adapter / "adapter_model.safetensors")
                for which in ("one", "two")
            )
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                torch.testing.assert_close(theirs[key], value, atol=2e-5, rtol=1e-4, msg=f"{name}: {key}")
        assert verify_adapter(alone, load_run_task(alone), folder / "two" / name).holds
        assert not RunFolder(folder / "two" / name).checkpoints.exists()


def assert_same_run(one, two):
    assert (one.processes, one.launcher) == (1, None)
    close = {"rel": 2e-4, "abs": 2e-5}
    assert one.metrics.keys() == two.metrics.keys()
    for split, metrics in one.metrics.items():
        assert two.metrics[split] == pytest.approx(metrics, **close)
    assert two.metrics["before"] == one.metrics["before"]  # the same batches of the same model
    assert [step.step for step in two.history] == [step.step for step in one.history]
    for ours, theirs in zip(one.history, two.history, strict=True):
        assert theirs.model_dump() == pytest.approx(ours.model_dump(), **close)
    assert len(two.evaluations) == len(one.evaluations)
    assert two.gradient_evaluations == one.gradient_evaluations
    assert two.trainable_parameters == one.trainable_parameters
    assert two.memory.optimizer_state_bytes == one.memory.optimizer_state_bytes
    assert two.correct == one.correct
    for measured in ("trajectory", "curvature"):
        for ours, theirs in zip(getattr(one, measured), getattr(two, measured), strict=True):
            assert theirs == pytest.approx(ours, rel=2e-3, abs=1e-5)
    if one.forgetting:
        assert two.forgetting.after == pytest.approx(one.forgetting.after, **close)


def test_the_record_says_how_many_trained(trained):
    folder, _, _ = trained
    told = json.loads((folder / "two" / "stages" / "record.json").read_text())
    assert told["processes"] == 2
    lines = (folder / "two" / "stages" / "log.txt").read_text()
    assert lines.count("2 processes train together, each with 3 of the 6 examples of each batch") == 1


def test_an_error_of_one_process_is_that_of_all(trained):
    folder, _, ((_, first), (_, second)) = trained
    for name, said in {
        "remainder": "must be a multiple of their number, 2; got 7",
        "device": "one GPU each; got 'cuda:1'",
        "other seeds": "seed differs between processes",
        "first": "belongs to another configuration: seed is 0 there and 7 here",
        "second": "only here",
        "both": "too much",
        "precision": "sets ACCELERATE_MIXED_PRECISION to bf16",
    }.items():
        for found in (first, second):
            assert said in found[name][1], name
            assert "\n" not in found[name][1]
    assert (first["first"][0], second["first"][0]) == (InputError, OtherRankError)
    assert (first["second"][0], second["second"][0]) == (OtherRankError, InputError)
    assert {first["both"][0], second["both"][0]} == {
        MemoryError,
        OtherRankError,
    }  # one tells, the other is silent
    assert not (folder / "two" / "bad").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "there is one: start it with torchrun"),
        ({"recipe": "full"}, "recipe full trains it"),
        ({"recipe": "pissa"}, "reads whole base weights"),
        ({"recipe": "dora"}, "reads whole base weights"),
        ({"curvature": True}, "cannot be used with curvature"),
        ({"measure_every": 1}, "cannot be used with measure_every"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_loaded(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        train(RunSettings(**{"fsdp": True, "recipe": "lora"} | options), tmp_path / "out")
    assert not (tmp_path / "out").exists()
