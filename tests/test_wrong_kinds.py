"""Public functions given something of another kind: one line that says what is wanted, never an error from inside."""

import copy
import itertools
import pathlib

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import tangora
from tangora import InputError
from tests.models import tiny_llama

pytestmark = [pytest.mark.messages, pytest.mark.filterwarnings("ignore")]

TOKENS = torch.arange(4, 16).reshape(2, 6)
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def base_model():
    return tiny_llama(num_hidden_layers=1)


def peft_model():
    return get_peft_model(base_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


WRONG = {
    "nothing": None,
    "a number": 3,
    "below zero": -1,
    "not a number": float("nan"),
    "a flag": True,
    "a word": "word",
    "no word": "",
    "bytes": b"word",
    "a path": pathlib.Path("/nowhere/at/all"),
    "nothings": [None],
    "an empty list": [],
    "a dict": {"a": 1},
    "a batch": BATCH,
    "a tensor": torch.ones(2),
    "parameters": (torch.nn.Parameter(torch.ones(2)) for _ in range(1)),
    "an optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0),
    "an object": object(),
    "a base model": base_model(),
    "a PEFT model": peft_model(),
    "a configuration": LoraConfig(),
    "a recipe": tangora.recipe("lora"),
}
MODULES = ("a base model", "a PEFT model")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What calls need and do not change, and a folder that each may write."""
    folder = tmp_path_factory.mktemp("wrong")
    tangora.save_adapter(peft_model(), folder / "adapter")
    hessian = tangora.curvature.Hessian(peft_model(), [BATCH])
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    names = (folder / f"out-{index}" for index in itertools.count())
    return {
        "adapter": folder / "adapter",
        "out": lambda: next(names),
        "hessian": hessian,
        "density": hessian.spectral_density(probes=2, steps=3),
        "settings": tangora.RunSettings(data="nowhere.csv"),
        "plan": tangora.CompareSettings(recipes=["lora"], data="nowhere.csv"),
        "trainer": {"args": arguments, "train_dataset": [BATCH]},
    }


def prepare(x, key, **options):
    given = {"r": 2, "lora_alpha": 2, "task_type": "CAUSAL_LM", "total_steps": 9} | options
    tangora.recipe("adalora").prepare(base_model(), **given | {key: x})


def prepare_model(x):
    tangora.recipe("lora").prepare(x, r=2, lora_alpha=2, task_type="CAUSAL_LM", total_steps=1)


def initialize(x, key, method="orthogonal", **options):
    batches = options.pop("batches", [BATCH] if method != "orthogonal" else None)
    tangora.initialize(peft_model(), method, batches, progress=False, **options, **{key: x})


def trainer(x, made, key):
    options = {"model": peft_model(), "recipe": "lora", **made["trainer"]}
    tangora.Trainer(**options | {key: x})


CALLS = {
    "find_pairs(model)": lambda x, _: tangora.find_pairs(x),
    "find_pairs(adapter_name)": lambda x, _: tangora.find_pairs(peft_model(), x),
    "initial_factors(model)": lambda x, _: tangora.initial_factors(x),
    "save_adapter(model)": lambda x, made: tangora.save_adapter(x, made["out"]()),
    "save_adapter(path)": lambda x, _: tangora.save_adapter(peft_model(), x),
    "save_adapter(rank)": lambda x, made: tangora.save_adapter(peft_model(), made["out"](), rank=x),
    "save_adapter(initial)": lambda x, made: tangora.save_adapter(peft_model(), made["out"](), initial=x),
    "save_adapter(card)": lambda x, made: tangora.save_adapter(peft_model(), made["out"](), card=x),
    "save_merged(model)": lambda x, made: tangora.save_merged(x, made["out"]()),
    "save_merged(path)": lambda x, _: tangora.save_merged(peft_model(), x),
    "load_adapter(base)": lambda x, made: tangora.load_adapter(x, made["adapter"]),
    "load_adapter(path)": lambda x, _: tangora.load_adapter(base_model(), x),
    "initialize(model)": lambda x, _: tangora.initialize(x, "orthogonal", progress=False),
    "initialize(method)": lambda x, _: tangora.initialize(peft_model(), x, [BATCH], progress=False),
    "initialize(batches)": lambda x, _: tangora.initialize(peft_model(), "lora-ga", x, progress=False),
    "initialize(loss_fn)": lambda x, _: initialize(x, "loss_fn", "lora-ga"),
    "initialize(seed)": lambda x, _: initialize(x, "seed"),
    "initialize(adapter_name)": lambda x, _: initialize(x, "adapter_name"),
    "initialize(size)": lambda x, _: initialize(x, "size"),
    "initialize(niter)": lambda x, _: initialize(x, "niter", "pissa"),
    "initialize(gamma)": lambda x, _: initialize(x, "gamma", "lora-one"),
    "initialize(scale)": lambda x, _: initialize(x, "scale", "lora-ga"),
    "initialize(oversampling)": lambda x, _: initialize(x, "oversampling", "lora-ga"),
    "initialize(one_pass)": lambda x, _: initialize(x, "one_pass", "lora-ga"),
    "initialize(held_out)": lambda x, _: initialize(x, "held_out", "one-step"),
    "diagnose(model)": lambda x, _: tangora.diagnose(x, [BATCH], progress=False),
    "diagnose(batches)": lambda x, _: tangora.diagnose(peft_model(), x, progress=False),
    "diagnose(loss_fn)": lambda x, _: tangora.diagnose(peft_model(), [BATCH], loss_fn=x, progress=False),
    "diagnose(starts)": lambda x, _: tangora.diagnose(peft_model(), [BATCH], starts=x, progress=False),
    "diagnose(seed)": lambda x, _: tangora.diagnose(peft_model(), [BATCH], seed=x, progress=False),
    "plan_ranks(spectra)": lambda x, _: tangora.plan_ranks(x, 2),
    "Hessian(model)": lambda x, _: tangora.curvature.Hessian(x, [BATCH]),
    "Hessian(batches)": lambda x, _: tangora.curvature.Hessian(peft_model(), x),
    "Hessian(over)": lambda x, _: tangora.curvature.Hessian(peft_model(), [BATCH], over=x),
    "Hessian(layers)": lambda x, _: tangora.curvature.Hessian(peft_model(), [BATCH], layers=x),
    "Hessian(dtype)": lambda x, _: tangora.curvature.Hessian(peft_model(), [BATCH], dtype=x),
    "Hessian(loss_fn)": lambda x, _: tangora.curvature.Hessian(peft_model(), [BATCH], loss_fn=x),
    "matvec": lambda x, made: made["hessian"].matvec(x),
    "block": lambda x, made: made["hessian"].block(x),
    "top_eigenpairs(seed)": lambda x, made: made["hessian"].top_eigenpairs(1, max_products=2, seed=x),
    "top_eigenpairs(method)": lambda x, made: made["hessian"].top_eigenpairs(1, max_products=2, method=x),
    "spectral_density(seed)": lambda x, made: made["hessian"].spectral_density(probes=1, steps=1, seed=x),
    "trace(seed)": lambda x, made: made["hessian"].trace(products=3, seed=x),
    "cdf": lambda x, made: made["density"].cdf(x),
    "smoothed": lambda x, made: made["density"].smoothed(x),
    "smoothed(width)": lambda x, made: made["density"].smoothed(0.0, x),
    "moment": lambda x, made: made["density"].moment(x),
    "grid(width)": lambda x, made: made["density"].grid(width=x),
    "hutchinson(operator)": lambda x, _: tangora.curvature.hutchinson(x),
    "recipe": lambda x, _: tangora.recipe(x),
    "prepare(model)": lambda x, _: prepare_model(x),
    "prepare(r)": lambda x, _: prepare(x, "r"),
    "prepare(lora_alpha)": lambda x, _: prepare(x, "lora_alpha"),
    "prepare(task_type)": lambda x, _: prepare(x, "task_type"),
    "prepare(total_steps)": lambda x, _: prepare(x, "total_steps"),
    "prepare(target_modules)": lambda x, _: prepare(x, "target_modules"),
    "prepare(rank_plan)": lambda x, _: prepare(x, "rank_plan"),
    "prepare(seed)": lambda x, _: prepare(x, "seed"),
    "create_optimizer(model)": lambda x, _: tangora.recipe("lora").create_optimizer(x, 1e-3),
    "create_optimizer(lr)": lambda x, _: tangora.recipe("lora").create_optimizer(peft_model(), x),
    "Trainer(model)": lambda x, made: trainer(x, made, "model"),
    "Trainer(args)": lambda x, made: trainer(x, made, "args"),
    "Trainer(recipe)": lambda x, made: trainer(x, made, "recipe"),
    "Trainer(learning_rate)": lambda x, made: trainer(x, made, "learning_rate"),
    "Trainer(peft_config)": lambda x, made: trainer(x, made, "peft_config"),
    "load_model(name)": lambda x, _: tangora.load_model(x, kind="causal"),
    "load_model(dtype)": lambda x, _: tangora.load_model("./no", kind="causal", dtype=x),
    "load_model(labels)": lambda x, _: tangora.load_model("./no", kind="classification", labels=x),
    "load_task(spec)": lambda x, _: tangora.load_task(x),
    "load_task(text_column)": lambda x, _: tangora.load_task("./no", text_column=x),
    "train(settings)": lambda x, made: tangora.train(x, made["out"]()),
    "train(output)": lambda x, made: tangora.train(made["settings"], x),
    "compare(settings)": lambda x, made: tangora.compare(x, made["out"]()),
    "compare(output)": lambda x, made: tangora.compare(made["plan"], x),
    "export(run)": lambda x, made: tangora.export(x, made["out"]()),
}
for _name in ("TangentAdam", "LoRAPro", "PreconditionedAdamW", "ODELoRA"):
    _made = getattr(tangora, _name)
    CALLS |= {
        f"{_name}(params)": lambda x, _, make=_made: make(x, lr=1e-3),
        f"{_name}(lr)": lambda x, _, make=_made: make(peft_model(), lr=x),
        f"{_name}(pairs)": lambda x, _, make=_made: make([{"pairs": x}], lr=1e-3),
        f"{_name}(params of a group)": lambda x, _, make=_made: make(
            [{"pairs": tangora.find_pairs(peft_model()), "params": x}], lr=1e-3
        ),
        f"{_name}.load_state_dict": lambda x, _, make=_made: make(peft_model(), lr=1e-3).load_state_dict(x),
    }
    if _name != "ODELoRA":
        CALLS[f"{_name}(betas)"] = lambda x, _, make=_made: make(peft_model(), lr=1e-3, betas=x)

# a module can be called, and how it fails is its own affair
CALLED = ("loss_fn", "matvec)")


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_what_is_of_another_kind_is_used_or_refused_in_one_line(made, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some calls may write where a word says
    messages = {}
    for name, value in WRONG.items():
        if name in MODULES and call.endswith((*CALLED, "loss_fn)")):
            continue
        try:
            CALLS[call](copy.deepcopy(value) if name in MODULES else value, made)
        except InputError as problem:
            messages[name] = str(problem)
        except Exception as problem:
            pytest.fail(f"{name}: {type(problem).__name__}: {problem}")
    assert len(messages) >= 8
    assert not [message for message in messages.values() if "\n" in message or len(message) > 800]


def test_points_may_be_numbers_lists_arrays_or_tensors(made):
    density = made["density"]
    low, high = density.range
    points = [low, (low + high) / 2, high]
    for evaluate in (lambda x: density.cdf(x).value, density.smoothed):
        expected = evaluate(torch.tensor(points, dtype=torch.float64))
        assert expected.shape == (3,)
        torch.testing.assert_close(evaluate(points), expected)
        torch.testing.assert_close(evaluate(torch.tensor(points, dtype=torch.float64).numpy()), expected)
        for point, value in zip(points, expected, strict=True):
            one = evaluate(point)
            assert one.shape == ()
            torch.testing.assert_close(one, value)
    assert density.cdf(high).value == 1.0


def test_an_adapter_for_another_base_is_named(made, tmp_path):
    with pytest.raises(InputError, match="belongs to another base"):
        tangora.load_adapter(torch.nn.Sequential(torch.nn.Linear(2, 2)), made["adapter"])
    with pytest.raises(InputError, match="belongs to another base"):
        tangora.load_adapter(tiny_llama(hidden_size=16), made["adapter"])


def test_layers_that_are_not_there_are_answered_by_those_that_are():
    for targets in ("query", ["query", "value"]):
        with pytest.raises(InputError, match=r"down_proj, gate_proj, k_proj, .*got 'query'"):
            prepare(targets, "target_modules")
