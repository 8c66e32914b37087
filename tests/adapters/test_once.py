"""Two processes that save the same adapter: one writes, the other waits, and neither hangs."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from tangora import InputError
from tangora.adapters import load_adapter, save_adapter, save_merged
from tests.adapters.tied import assert_same, made, output, trained

RANKS = 2


def adapted():
    return trained(get_peft_model(made("llama"), LoraConfig(r=2, target_modules=["q_proj"])))


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["TANGORA_RANK_TIMEOUT"] = "20"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    try:
        found, model, path = {}, adapted(), Path(folder)
        for wrapped in (model, DistributedDataParallel(model)):
            for _ in range(10):  # at once, into one folder
                saved = save_adapter(wrapped, path / "together")
                assert_same(output(load_adapter(made("llama"), saved)), output(model))
        found["saved"] = saved
        save_merged(wrapped, path / "merged")
        assert_same(output(type(made("llama")).from_pretrained(path / "merged")), output(model))
        if rank == 0:
            save_adapter(model, path / "alone")  # as many scripts do; waits for nobody
        dist.barrier()
        (path / "taken").mkdir(exist_ok=True)
        (path / "taken" / "notes.txt").write_text("mine")
        dist.barrier()
        with pytest.raises(InputError) as caught:
            save_adapter(model, path / "taken")
        found["failure"] = str(caught.value)
        dist.barrier()
        os.environ["TANGORA_RANK_TIMEOUT"] = "1"
        if rank == 1:
            with pytest.raises(InputError, match="call save_adapter on every rank, or on rank 0 alone"):
                save_adapter(model, path / "never")
        dist.barrier()
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_one_rank_writes(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=RANKS)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS))
    assert one["saved"] == other["saved"]
    assert other["failure"].startswith("rank 0 could not write")
    assert one["failure"] in other["failure"]
    names = {entry.name for entry in tmp_path.iterdir()} - {"meet"}
    assert names == {"together", "merged", "alone", "taken", "0.pt", "1.pt"}  # nothing half-written is left
