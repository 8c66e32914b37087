"""Several processes of a launcher train one model, and it is the one that a single process trains."""

import dataclasses
import json
import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tangora import InputError, RunSettings, train
from tangora._checks import OtherRankError
from tangora.experiments.run.saving import verify_adapter
from tangora.experiments.run.preparing import load_run_task
from tests.experiments.small import after_step, write_classifier, write_generator
from tests.processes import in_processes

WEIGHTS = "adapter/adapter_model.safetensors"
SHARED = {"num_train": 31, "batch_size": 6, "accumulate": 2, "epochs": 1, "learning_rate": 1e-2}
"""The last batch of an epoch has one example, and one of two processes none."""


def without_dropout(small):
    """Let all processes together draw what one does: nothing."""
    path = f"{small['model']}/config.json"
    with open(path) as file:
        config = json.load(file)
    config |= {key: 0.0 for key in config if key.endswith(("dropout", "dropout_prob")) and config[key]}
    with open(path, "w") as file:
        json.dump(config, file)
    return small | SHARED


def cases(classifier, generator):
    measured = {"measure_every": 2, "measure_gradient": 8, "curvature_every": 2, "curvature": True}
    return {
        "measured": RunSettings(**classifier, recipe="lora-ga", evaluate_every=2, save_every=2, **measured),
        "answers": RunSettings(**generator, recipe="adalora", exact_match=True, forgetting=True),
        "stages": RunSettings(**generator, recipe="odelora-heun"),
        "no steps": RunSettings(**generator, recipe="one-step"),
        "whole": RunSettings(**classifier, recipe="full"),
    }


def sharded(generator):
    return {
        name: RunSettings(**generator, recipe=recipe, fsdp=True, save_every=1, exact_match=True)
        for name, recipe in {"tangent, sharded": "tangent", "lora-ga, sharded": "lora-ga"}.items()
    }


def averaging(tensor, op=dist.ReduceOp.SUM, _reduce=dist.all_reduce, **options):
    """Average as NCCL does, which gloo cannot."""
    done = _reduce(tensor, dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op, **options)
    if op == dist.ReduceOp.AVG:
        tensor.div_(dist.get_world_size())
    return done


def together(rank, folder, runs, fsdp):
    dist.all_reduce = averaging
    for name, settings in (runs | fsdp).items():
        train(settings, f"{folder}/two/{name}")


def test_x(tmp_path):
    classifier = without_dropout(write_classifier(tmp_path))
    (tmp_path / "g").mkdir()
    generator = without_dropout(write_generator(tmp_path / "g"))
    runs, fsdp = cases(classifier, generator), sharded(generator)
    import time; t = time.time()
    in_processes(together, tmp_path, 2, str(tmp_path), runs, fsdp)
    print(time.time() - t)
    for name, settings in (runs | fsdp).items():
        alone = train(settings.model_copy(update={"fsdp": False}), tmp_path / "one" / name)
        print(name, time.time() - t)
        import subprocess, sys
        subprocess.run([sys.executable, "/tmp/launchw/cmp.py", str(tmp_path/"one"/name), str(tmp_path/"two"/name)])
