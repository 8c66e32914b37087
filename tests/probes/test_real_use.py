"""Models and batches as they come in real use: compiled, checkpointed, streamed, with layers that cannot be read."""

import copy

import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

import tangora
from tangora import InputError, find_pairs
from tangora.curvature import Hessian
from tangora.probes import GradientProbe, Request, gradient_norms, gradient_svds, mean_loss, probed_layers
from tests.models import Holder, inputs_of, loss_of
from tests.probes.models import adapted, batches_of, dense_gradients, model_of
from tests.probes.test_losses import CLASSES, IMAGES, SOUNDS, made
from tests.sizes import AUDIO_MODEL, CLIP, IMAGE_MODEL, SEGFORMER
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # losses in float32, convolutions with groups, traced graphs


def everything(model, batches, **options):
    """Numbers of all kinds that tangora reads of a model."""
    norms = gradient_norms(model, batches, progress=False, **options)
    start = tangora.initialize(model, "lora-ga", batches, progress=False, **options)
    found = {f"norm {name.replace('_orig_mod.', '')}": norm for name, norm in norms.items()}
    found |= {"loss": mean_loss(model, batches, **options), "started": len(start.names)}
    for pair in find_pairs(model):
        found[f"start {pair.name.replace('_orig_mod.', '')}"] = float(pair.delta_weight().norm())
    diagnosis = tangora.diagnose(model, batches, progress=False, **options)
    found["captured"] = diagnosis.totals.starts["lora-ga"]
    hessian = Hessian(model, batches, **options)
    found["product"] = float(hessian.matvec(torch.ones(hessian.size, dtype=hessian.dtype)).norm())
    return found


# --- compiled ---


def compiled_in_place(model, backend):
    model.compile(backend=backend)
    return model


def compiled_around(model, backend):
    return torch.compile(model, backend=backend)


def compiled_inside(model, backend):
    layers = model.base_model.model.transformer.h
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend=backend)
    return model


@pytest.mark.parametrize("how", [compiled_in_place, compiled_around, compiled_inside])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_is_read_as_the_plain_one(how, backend):
    batches = batches_of("gpt2", 2)
    expected = everything(adapted("gpt2"), batches)
    model = how(adapted("gpt2"), backend)
    before = mean_loss(model, batches)
    assert everything(model, batches) == pytest.approx(expected, rel=1e-6)
    assert mean_loss(model, batches) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "gpt2"))]
)
def test_a_graph_that_was_traced_before_is_neither_used_nor_lost(name):
    batches = batches_of(name, 2)
    model = adapted(name)
    expected = gradient_norms(model, batches, progress=False)
    traced = []

    def backend(graph, _):
        traced.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.compile(backend=backend)
    model(**batches[0])
    count = len(traced)
    assert gradient_norms(model, batches, progress=False) == pytest.approx(expected, rel=1e-10)
    assert len(traced) == count > 0
    model(**batches[0])
    assert len(traced) == count


# --- checkpointing ---

SPOKEN, SHOWN = (
    {key: value, "labels": CLASSES} for key, value in (("input_values", SOUNDS), ("pixel_values", IMAGES))
)
HEARING = {"num_labels": 3, "classifier_proj_size": 8, **AUDIO_MODEL}
WITHOUT_EMBEDDINGS = {
    "wav2vec2": (T.Wav2Vec2ForSequenceClassification, T.Wav2Vec2Config(**HEARING), SPOKEN, ["q_proj"]),
    "hubert": (T.HubertForSequenceClassification, T.HubertConfig(**HEARING), SPOKEN, ["v_proj"]),
    "vit": (T.ViTForImageClassification, T.ViTConfig(**IMAGE_MODEL), SHOWN, ["q_proj", "query"]),
    "clip": (T.CLIPForImageClassification, T.CLIPConfig(num_labels=3, **CLIP), SHOWN, ["q_proj"]),
    "segformer": (
        T.SegformerForImageClassification,
        T.SegformerConfig(**SEGFORMER),
        SHOWN,
        ["query", "q_proj"],
    ),
}


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [*((name, False) for name in WITHOUT_EMBEDDINGS), ("wav2vec2", True), ("vit", True)],
)
def test_checkpointing_changes_nothing_without_input_embeddings(name, reentrant):
    model_class, config, batch, targets = WITHOUT_EMBEDDINGS[name]
    base = made(model_class, copy.deepcopy(config))
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets), autocast_adapter_dtype=False).eval()
    plain = everything(copy.deepcopy(model), [batch])
    inner = model.get_base_model()
    if not inner.supports_gradient_checkpointing:
        pytest.skip("the model has no checkpointing")
    inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert everything(model, [batch]) == pytest.approx(plain, rel=1e-8)
    assert all(norm > 0 for name, norm in plain.items() if name.startswith("norm"))


def test_a_reentrant_checkpoint_of_ones_own():
    class Own(Holder):
        def forward(self, x):
            return checkpoint(self.it, x, use_reentrant=True)

    torch.manual_seed(0)
    model, batch = Own(nn.Linear(7, 5).double()), inputs_of("linear")
    (G,) = dense_gradients(Holder(model.it), probed_layers(model), lambda m: loss_of(m(*batch))).values()
    norms = gradient_norms(model, [batch], loss_fn=lambda m, b: loss_of(m(*b)), progress=False)
    assert norms["it"] == pytest.approx(float(G.norm()), rel=1e-12)


# --- streams ---


class Stream(IterableDataset):
    """Rows of a batch, one after the other, perhaps others at the second time."""

    def __init__(self, batches, change=lambda rows, time: rows):
        self.rows = [{key: value[0] for key, value in batch.items()} for batch in batches]
        self.change, self.times = change, 0

    def __iter__(self):
        self.times += 1
        yield from self.change(self.rows, self.times)


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "gpt2"))]
)
def test_a_stream_is_read_as_its_list(name):
    batches = batches_of(name, 3)
    expected = everything(adapted(name), list(DataLoader(Stream(batches))))
    assert everything(adapted(name), DataLoader(Stream(batches))) == pytest.approx(expected, rel=1e-12)


CHANGES = {
    "empty": lambda rows, time: rows if time == 1 else [],
    "shorter": lambda rows, time: rows if time == 1 else rows[:2],
    "longer": lambda rows, time: rows[:2] if time == 1 else rows,
    "other": lambda rows, time: rows if time == 1 else [*rows[:2], rows[0]],
}


def product(model, batches):
    hessian = Hessian(model, batches)
    for _ in range(2):
        found = hessian.matvec(torch.ones(hessian.size, dtype=hessian.dtype))
    return found


READINGS = {
    "initialize": lambda model, batches: tangora.initialize(
        model, "lora-ga", batches, power_iterations=1, progress=False
    ),
    "diagnose": lambda model, batches: tangora.diagnose(model, batches, progress=False),
    "spectra": lambda model, batches: gradient_svds(model, batches, 2, progress=False),
    "Hessian": product,
}


@pytest.mark.parametrize(
    ("read", "change"),
    [
        *(("initialize", change) for change in CHANGES),
        *((read, "other") for read in READINGS if read != "initialize"),
    ],
)
def test_a_stream_that_changes_is_refused(read, change):
    loader = DataLoader(Stream(batches_of("bert", 3), CHANGES[change]))
    model = adapted("bert")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match="same batches in every pass"):
        READINGS[read](model, loader)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# --- layers that cannot be read ---


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 5, 3, padding="same"),
        nn.Conv1d(3, 5, 4, padding="same", dilation=2),
        nn.Conv1d(3, 5, 3, padding="valid", stride=2),
    ],
)
def test_padding_by_name(layer):
    torch.manual_seed(0)
    model, batch = Holder(copy.deepcopy(layer).double()), inputs_of("conv1d")
    loss_fn = lambda m, b: loss_of(m(*b))  # noqa: E731
    (G,) = dense_gradients(model, probed_layers(model), lambda m: loss_fn(m, batch)).values()
    draw = torch.Generator().manual_seed(0)
    right = torch.randn(G.shape[1], 2, dtype=torch.float64, generator=draw)
    left = torch.randn(G.shape[0], 2, dtype=torch.float64, generator=draw)
    with GradientProbe(model, probed_layers(model), loss_fn=loss_fn) as probe:
        reading = probe.read([batch], {"it": Request(right, left, dense=True)})["it"]
    assert_close(reading.dense, G)
    assert_close(reading.right, G @ right)
    assert_close(reading.left, left.T @ G)


class Odd(nn.Module):
    """One readable layer behind others."""

    def __init__(self, odd):
        super().__init__()
        self.odd, self.out, self.kind = odd, nn.Linear(6, 2), type(odd)

    def forward(self, x):
        if self.kind is nn.Linear:
            return self.out(x)
        if self.kind is nn.MultiheadAttention:
            return self.out(self.odd(x, x, x, need_weights=False)[0])
        return self.out(self.odd(x))


ODD = {
    "circular": lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"),
    "groups": lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2),
    "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    "never called": lambda: nn.Linear(6, 6),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_layer_that_cannot_be_read_is_named_and_keeps_the_plain_start(kind):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["odd", "out"])
    model = get_peft_model(Odd(ODD[kind]()).double(), config, autocast_adapter_dtype=False)
    batch = torch.randn(3, 4, 6, dtype=torch.float64)
    loss_fn = lambda m, x: m(x).square().mean()  # noqa: E731
    # PEFT's layer has no place for an offset in these two
    method = "lora-one" if kind in ("groups", "attention") else "lora-ga"
    with pytest.warns(UserWarning, match="odd"):
        start = tangora.initialize(model, method, [batch], loss_fn=loss_fn, progress=False)
    assert start.names == ("base_model.model.out",)
    assert next(iter(start.skipped)) == "base_model.model.odd"
    odd = model.base_model.model.odd
    assert (odd.lora_B["default"].weight == 0).all()
    diagnosis = tangora.diagnose(model, [batch], loss_fn=loss_fn, progress=False)
    assert [layer.name for layer in diagnosis.layers] == ["out"]
    assert "base_model.model.odd" in diagnosis.skipped


def test_unreadable_layers_of_a_plain_model_are_named():
    model = Odd(nn.Conv1d(4, 4, 3, padding=1, groups=2)).double()
    batch = torch.randn(3, 4, 6, dtype=torch.float64)
    diagnosis = tangora.diagnose(
        model,
        [batch],
        target_modules=["odd", "out"],
        rank=1,
        loss_fn=lambda m, x: m(x).square().mean(),
        progress=False,
    )
    assert list(diagnosis.skipped) == ["odd"]


def test_layers_of_a_compiled_plain_model_are_listed_once():
    model = model_of("bert")
    names = [layer.name for layer in probed_layers(model)]
    model.classifier = torch.compile(model.classifier, backend="eager")
    found = [layer.name.replace("._orig_mod", "") for layer in probed_layers(model)]
    assert found == names
