"""Two processes want one folder: the first one writes it, alone or in company."""

import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from tangora import InputError
from tangora.adapters import load_adapter, merged_model, save_adapter, save_merged
from tests.adapters.models import logits, tiny_llama
from tests.models import randomize
from tests.processes import in_processes
from tests.tolerances import assert_close


def adapted():
    return randomize(get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])))


def work(rank, folder):
    """What both ranks do, in the same order; rank 0 does more by itself in between."""
    folder, found = Path(folder), {}
    model = DistributedDataParallel(adapted(), broadcast_buffers=False)
    for _ in range(10):  # without a barrier in between
        last = save_adapter(model, folder / "adapter", rank=1)
    found["saved"] = (str(last.path), last.rank, last.relative_error)
    found["held"] = sorted(os.listdir(folder / "adapter"))
    dist.barrier()
    if rank == 0:  # alone, into the same folder: nobody waits, and nobody takes it for the next one
        save_adapter(model, folder / "adapter", rank=2)
    dist.all_reduce(torch.ones(1))
    found["after"] = save_adapter(model, folder / "adapter", rank=1).rank
    found["merged"] = str(save_merged(model, folder / "merged"))
    dist.barrier()
    (folder / "thesis").mkdir(exist_ok=True)
    (folder / "thesis" / "chapter.tex").write_text("years")
    for name, save in (("adapter", save_adapter), ("merged", save_merged)):
        with pytest.raises(InputError) as caught:
            save(model, folder / "thesis")
        found["refused", name] = str(caught.value)
    dist.barrier()
    if rank == 1:  # alone: it would wait for ever
        store = dist.distributed_c10d._get_default_store()
        store.set_timeout(datetime.timedelta(seconds=1))
        with pytest.raises(InputError) as caught:
            save_adapter(model, folder / "lonely")
        found["lonely"] = str(caught.value)
        store.set_timeout(datetime.timedelta(seconds=20))
    dist.barrier()
    return found


@pytest.mark.slow
def test_one_rank_writes_and_the_others_get_its_answer(tmp_path):
    first, second = in_processes(work, tmp_path, 2, str(tmp_path))
    assert first["saved"] == second["saved"]
    assert first["saved"][1] == 1
    assert first["saved"][2] > 0
    assert first["held"] == second["held"]
    assert first["after"] == second["after"] == 1
    assert first["merged"] == second["merged"]
    for name in ("adapter", "merged"):
        assert "is no" in first["refused", name]
        assert first["refused", name] in second["refused", name]
    assert "lonely" in second["lonely"]
    assert "rank 0" in second["lonely"]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    loaded = load_adapter(tiny_llama(), tmp_path / "adapter")
    assert loaded.peft_config["default"].r == 1


WRAPPERS = {
    "data-parallel": torch.nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled-in-data-parallel": lambda model: torch.nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_are_saved_and_merged_like_the_model_inside(wrapper, tmp_path):
    model = adapted()
    expected = logits(model)
    wrapped = WRAPPERS[wrapper](model)
    assert_close(logits(load_adapter(tiny_llama(), save_adapter(wrapped, tmp_path / "a"))), expected, 1e-6)
    assert_close(logits(merged_model(wrapped)), expected, 1e-5)
    assert_close(logits(load_adapter(WRAPPERS[wrapper](tiny_llama()), tmp_path / "a")), expected, 1e-6)


@pytest.mark.parametrize("part", [None, pytest.param("model", marks=pytest.mark.slow)])
def test_an_adapter_over_a_compiled_base_fits_the_plain_one(part, tmp_path):
    base = tiny_llama()
    if part is None:
        base = torch.compile(base, backend="eager")
    else:
        base.model = torch.compile(base.model, backend="eager")
    model = randomize(
        get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    )
    expected = logits(model)
    assert_close(logits(load_adapter(tiny_llama(), save_adapter(model, tmp_path / "a"))), expected, 1e-6)
    assert_close(logits(merged_model(model)), expected, 1e-5)
