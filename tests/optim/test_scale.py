"""What docs/guides/scale.md says of memory and messages, held against small real runs in float32."""

import json
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import formulas
import scale
from fake_steps import fake_memory, meta_model, passes_peak, step_peak
from record import rounded
from tangora import find_pairs, initialize, recipe
from tangora.experiments.run.estimate import LiveTensors, materialize, nf4_bytes
from tangora.optim import gathering, layerwise
from tangora.probes import GradientProbe
from tangora.recipes import recipes
from tests.models import randomize, transformer, with_lora
from tests.optim.parallel import shard
from tests.processes import in_processes

ROOT = Path(__file__).parents[2]
RANK = 3  # over two processes it is cut unevenly
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 256}
CONFIG = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2)
BATCH = (2, 32)


def adapted(r=RANK):
    return randomize(with_lora(transformer("llama", seed=0, use_cache=False), r=r), seed=1).train()


def shapes(model):
    return [pair.shape for pair in find_pairs(model)]


def backward(model):
    tokens = torch.arange(16).view(2, 8)
    model(input_ids=tokens, labels=tokens).loss.backward()


def made(name, model):
    return recipe(name).create_optimizer(model, 1e-4)


# ---- memory ----


def on_shapes(dtype=torch.float32, *, rank=RANK):
    """A model as the counted ones are made; random, but for fake tensors."""
    model = meta_model(CONFIG, rank, dtype)
    materialize(model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" not in name:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=generator)
    return model


def held_in_a_step(model, optimizer):
    """Bytes at the peak of a step beside what is there before; after steps that look at every branch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(5):
        for parameter in trained:
            parameter.grad = 1e-2 * torch.randn_like(parameter)
        states = [value for kept in optimizer.state.values() for value in kept.values()]
        with LiveTensors([*trained, *(p.grad for p in trained), *states]) as tensors:
            optimizer.step()
    return tensors.peak


@pytest.mark.parametrize("name", formulas.STATES)
def test_states_are_what_the_formulas_say(name):
    model = adapted()
    optimizer = made(name, model)
    backward(model)
    optimizer.step()
    numbers = sum(v.numel() for kept in optimizer.state.values() for k, v in kept.items() if k != "step")
    assert numbers == formulas.state(name, shapes(model))


def test_every_recipe_with_an_adapter_has_a_formula_or_one_with_another_start():
    known = {(recipe(name).make_optimizer, recipe(name).start) for name in formulas.STATES}
    known = {str(maker) for maker, _ in known}  # `functools.partial` has no equality
    left = {each.name for each in recipes() if each.adapter and str(each.make_optimizer) not in known}
    # AdamW with two rates; schemes of ODELoRA, which keep nothing
    assert left == {"lora+", "odelora-heun", "odelora-rk4", "odelora-bug"}


def test_counted_steps_hold_what_real_ones_do():
    """On a CPU that stacks and guesses as a GPU does; the counted steps look at no number."""
    with fake_memory():
        fake = on_shapes()
        counted = {
            name: step_peak(fake, lambda model, name=name: made(name, model)) for name in scale.COUNTED
        }
    held = {}
    with (
        mock.patch.object(gathering, "_CPU_STACK_NUMBERS", gathering._STACK_NUMBERS),
        mock.patch.object(layerwise, "_waiting_costs", return_value=True),
    ):
        for name in scale.COUNTED:
            model = on_shapes()
            randomize(model, scale=0.1, seed=1)
            held[name] = held_in_a_step(model, made(name, model))
    assert counted == pytest.approx(held, rel=3e-3)


def test_torch_adamw_copies_the_factors_once_or_not_at_all():
    model = on_shapes()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert held_in_a_step(model, torch.optim.AdamW(trained, fused=True)) == 0
    copied = held_in_a_step(model, torch.optim.AdamW(trained, foreach=True))
    assert copied == formulas.FLOAT * formulas.trained(shapes(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_counted_passes_hold_little_more_than_real_ones(dtype, checkpointing):
    with fake_memory():
        counted = passes_peak(on_shapes(dtype), BATCH, checkpointing=checkpointing)
    held = passes_peak(on_shapes(dtype), BATCH, checkpointing=checkpointing)
    assert held <= counted <= 1.1 * held


def test_nf4_layers_take_the_bytes_of_the_formula():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for rows in (64, 300):
        layer = bitsandbytes.nn.Linear4bit(256, rows, bias=False, quant_type="nf4", compress_statistics=True)
        weight = layer.to("cpu").weight
        of_blocks = weight.quant_state
        kept = [weight, of_blocks.absmax, of_blocks.code, of_blocks.offset]
        kept += [of_blocks.state2.absmax, of_blocks.state2.code]
        assert sum(each.numel() * each.element_size() for each in kept) == nf4_bytes(256 * rows)


def test_lora_ga_reads_what_the_formula_says(monkeypatch):
    read, sizes = GradientProbe.read, []

    def counting(self, *arguments):
        readings = read(self, *arguments)
        sizes.append(sum(each.numel() for one in readings.values() for each in one.tensors()))
        return readings

    monkeypatch.setattr(GradientProbe, "read", counting)
    model = on_shapes(rank=1)
    tokens = torch.arange(64).view(BATCH)
    initialize(model, "lora-ga", [{"input_ids": tokens, "labels": tokens}], progress=False)
    assert sizes[0] == formulas.read_by_start(shapes(model)) < sum(m * n for m, n, _ in shapes(model))


@pytest.mark.slow
def test_counts_of_few_blocks_go_on_in_a_straight_line(monkeypatch):
    monkeypatch.setattr(scale, "COUNTED", ("tangent", "lora-pro"))
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 6}, num_attention_heads=4, num_key_value_heads=2)
    for count in (
        partial(scale.counted_steps, rank=RANK),
        partial(scale.counted_passes, rank=RANK, batch=BATCH),
    ):
        assert scale.counted(config, count) == pytest.approx(count(config), rel=1e-3)


# ---- messages ----


class Sent(TorchDispatchMode):
    """Counts the numbers of all messages between processes."""

    def __init__(self):
        super().__init__()
        self.gathered = self.reduced = self.scattered = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "c10d":
            match name:
                case "_allgather_base_":
                    self.gathered += args[0].numel()
                case "allreduce_":
                    self.reduced += sum(each.numel() for each in args[0])
                case "_reduce_scatter_base_":
                    self.scattered += args[1].numel()
                case _:
                    raise AssertionError(name)
        assert space != "_c10d_functional", name
        return func(*args, **(kwargs or {}))

    def counted(self):
        return formulas.Messages(self.gathered, self.reduced, self.scattered)


def messages(rank, folder):
    """What two processes send in the passes and in steps where all is sharded, and where gradients are averaged."""
    from transformers.distributed.configuration_utils import DistributedConfig

    model = shard(adapted())
    with Sent() as passes:
        backward(model)
    found = {"passes": passes.counted()}
    for name in scale.SHARDED:
        optimizer = made(name, model)
        with Sent() as step:
            optimizer.step()
        found[name] = step.counted()
    inside = {id(p) for layer in model.base_model.model.model.layers for p in layer.parameters()}
    found["parameters"] = [(tuple(p.shape), p.requires_grad, id(p) in inside) for p in model.parameters()]

    def hook(_, bucket):
        found["averaged"] = found.get("averaged", 0) + bucket.buffer().numel()
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    model = DistributedDataParallel(adapted())
    model.register_comm_hook(None, hook)
    backward(model)
    config = DistributedConfig(fsdp_size=2)
    model = with_lora(AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)).train()
    with Sent() as passes:
        backward(model)
    found["base"] = passes.counted()
    return found


@pytest.mark.slow
def test_processes_send_what_the_formulas_say(tmp_path):
    layers, base = shapes(adapted()), transformer("llama")
    base.save_pretrained(tmp_path / "base")
    of_base = formulas.sharded_base(base.num_parameters(), base.get_input_embeddings().weight.numel())
    for found in in_processes(messages, tmp_path, 2, str(tmp_path / "base")):
        assert found["base"].gathered == pytest.approx(of_base.gathered, rel=0.01)
        assert found["base"].reduced == found["base"].scattered == 0
        assert found["passes"] == formulas.sharded_pass(found["parameters"], 2)
        assert found["averaged"] == formulas.averaged(layers).reduced
        for name in scale.SHARDED:
            assert found[name] == formulas.sharded_step(name, layers, 2), name


# ---- the page ----


def test_the_page_has_the_tables_of_the_record():
    record = json.loads((ROOT / "benchmarks" / "scale.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "guides" / "scale.md").read_text(encoding="utf-8")
    for name, table in scale.tables(record).items():
        assert table in page, name
    weights = [each["weights"] for each in record["models"].values()]
    assert weights == [6_738_415_616, 8_030_261_248, 70_553_706_496]  # as published
    settings = record["settings"]
    config = LlamaConfig(**scale.PUBLISHED["Llama-3-8B"])
    today = scale.computed(config, settings["ranks"], settings["processes"])
    recorded = record["models"]["Llama-3-8B"]
    assert {key: recorded[key] for key in today} == rounded(today)
