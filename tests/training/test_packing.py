"""Packed batches have the losses and gradients of padded ones, and models that mix examples are refused."""

import pytest
import torch
from torch import nn

from tangora._checks import InputError
from tangora.training.data import collator, encode
from tangora.training.data.packing import check_packing, packing_collator
from tests.models import tiny_llama, tiny_tokenizer, transformer
from tests.training.tiny import causal_examples

ENCODINGS = encode(causal_examples(6), tiny_tokenizer(), kind="causal", max_length=16)


def model_of(family, attention):
    sizes = {"vocab_size": 40, "attn_implementation": attention}
    made = tiny_llama(**sizes) if family == "llama" else transformer(family, seed=0, **sizes)
    return made.double()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_and_gradient_are_those_of_the_padded_batch(family, attention):
    found = []
    for collate in (packing_collator(), collator(tiny_tokenizer(), "causal")):
        model = model_of(family, attention)
        batch = collate(ENCODINGS)
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters()]))
    (packed, gradients), (padded, expected) = found
    assert packed == pytest.approx(padded, rel=1e-6)  # transformers takes the loss in float32
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_with_separate_examples_may_pack(family):
    with torch.no_grad():
        check_packing(model_of(family, "sdpa"), ENCODINGS, family)


def test_with_a_cache_examples_would_see_each_other():
    # why the collator forbids it
    model = model_of("llama", "sdpa")
    batch = packing_collator()(ENCODINGS)
    kept = model(**batch).loss.item()
    assert abs(model(**batch | {"use_cache": True}).loss.item() - kept) > 1e-3


class Mixing(nn.Module):
    """Adds to each token the mean of all before it, whoever's they are."""

    def __init__(self, share):
        super().__init__()
        self.inner, self.share = model_of("llama", "sdpa"), share

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, **inputs):
        output = self.inner(input_ids, **inputs)
        counts = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        output.logits = output.logits + self.share * output.logits.cumsum(1) / counts
        return output


@pytest.mark.parametrize("model", [Mixing(0.1), transformer("t5", seed=0, vocab_size=40)])
@pytest.mark.messages
def test_a_model_that_mixes_examples_is_refused(model):
    with torch.no_grad(), pytest.raises(InputError, match="packing cannot be used with model 'it'"):
        check_packing(model, ENCODINGS, "it")
