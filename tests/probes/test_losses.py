"""Uneven batches add up to the big one for the losses of many kinds of models; where none can, they are refused."""

import pytest
import torch
import transformers as T
from torch import Tensor

from tangora import InputError
from tangora.probes import mean_loss
from tests.sizes import AUDIO_MODEL, BART, CLIP, GPT2, IMAGE_MODEL, SEGFORMER, TEXT_MODEL, VOCABULARY, XLM

ROWS, LENGTH = 5, 8

_draw = torch.Generator().manual_seed(0)
TOKENS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=_draw)
IMAGES = torch.randn(ROWS, 3, 16, 16, generator=_draw, dtype=torch.float64)
SOUNDS = torch.randn(ROWS, 160, generator=_draw, dtype=torch.float64)
CLASSES = torch.randint(0, 3, (ROWS,), generator=_draw)
MAPS = torch.randint(0, 3, (ROWS, 16, 16), generator=_draw)
MASKS = torch.rand(ROWS, 16, generator=_draw) < torch.tensor([0.2, 0.9, 0.5, 0.3, 0.7])[:, None]
SERIES = torch.randn(ROWS, 16, 2, generator=_draw, dtype=torch.float64)


def partly(labels: Tensor, ignored: int = -100) -> Tensor:
    """Rows with very different numbers of labels."""
    labels = labels.clone()
    for row, left_out in enumerate((0, 5, 2, 6, 3)):
        labels[row, : left_out * labels.shape[1] // LENGTH] = ignored
    return labels


TEXT = {"input_ids": TOKENS, "labels": partly(TOKENS)}
SPANS = {"start_positions": torch.tensor([0, 1, 9, 3, 7]), "end_positions": torch.tensor([1, 2, 12, 4, 7])}
SPOKEN = {"input_values": SOUNDS, "labels": partly(TOKENS % 11 + 1).flip(1)}
ADD_UP = {
    "question answering": (
        T.BertForQuestionAnswering,
        T.BertConfig(**TEXT_MODEL),
        {"input_ids": TOKENS} | SPANS,
    ),
    "causal questions": (
        T.LlamaForQuestionAnswering,
        T.LlamaConfig(num_key_value_heads=2, **TEXT_MODEL),
        {"input_ids": TOKENS} | SPANS,
    ),
    "masked tokens": (T.BertForMaskedLM, T.BertConfig(**TEXT_MODEL), TEXT),
    "causal": (
        T.GPT2LMHeadModel,
        T.GPT2Config(**GPT2),
        TEXT,
    ),
    "causal by name only": (T.BartForCausalLM, T.BartConfig(**BART), TEXT),
    "XLM": (T.XLMWithLMHeadModel, T.XLMConfig(embed_init_std=0.5, **XLM), TEXT),
    "XLNet": (
        T.XLNetLMHeadModel,
        T.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24),
        TEXT,
    ),
    "encoder-decoder": (T.BartForConditionalGeneration, T.BartConfig(**BART), TEXT),
    "tokens": (
        T.BertForTokenClassification,
        T.BertConfig(num_labels=3, **TEXT_MODEL),
        {**TEXT, "labels": partly(TOKENS % 3)},
    ),
    "sound classes": (
        T.Wav2Vec2ForSequenceClassification,
        T.Wav2Vec2Config(num_labels=3, classifier_proj_size=8, **AUDIO_MODEL),
        {"input_values": SOUNDS, "labels": CLASSES},
    ),
    "CTC": (T.Wav2Vec2ForCTC, T.Wav2Vec2Config(ctc_loss_reduction="mean", **AUDIO_MODEL), SPOKEN),
    "segmentation": (
        T.SegformerForSemanticSegmentation,
        T.SegformerConfig(**SEGFORMER),
        {"pixel_values": IMAGES, "labels": partly(MAPS, 255)},
    ),
    "masked images": (
        T.ViTForMaskedImageModeling,
        T.ViTConfig(encoder_stride=4, **IMAGE_MODEL),
        {"pixel_values": IMAGES, "bool_masked_pos": MASKS},
    ),
    "time series": (
        T.PatchTSTForPrediction,
        T.PatchTSTConfig(
            num_input_channels=2,
            context_length=12,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=24,
            prediction_length=4,
            loss="mse",
        ),
        {"past_values": SERIES[:, :12], "future_values": SERIES[:, 12:]},
    ),
}
REFUSED = {
    "summed CTC": (T.Wav2Vec2ForCTC, T.Wav2Vec2Config(ctc_loss_reduction="sum", **AUDIO_MODEL), SPOKEN),
    "two means": (
        T.BertForPreTraining,
        T.BertConfig(**TEXT_MODEL),
        {**TEXT, "next_sentence_label": CLASSES % 2},
    ),
    "contrast": (
        T.CLIPModel,
        T.CLIPConfig(**CLIP),
        {"input_ids": TOKENS, "pixel_values": IMAGES, "return_loss": True},
    ),
    "random masks": (
        T.ViTMAEForPreTraining,
        T.ViTMAEConfig(
            decoder_hidden_size=16,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=1,
            **{"decoder_intermediate_size": 24, **IMAGE_MODEL},
        ),
        {"pixel_values": IMAGES},
    ),
    "spans cut off on one side": (
        T.BertForQuestionAnswering,
        T.BertConfig(**TEXT_MODEL),
        {
            "input_ids": TOKENS,
            "start_positions": torch.arange(5),
            "end_positions": torch.tensor([1, 2, 9, 4, 5]),
        },
    ),
}


def made(model_class, config):
    torch.manual_seed(0)
    return model_class(config).double().eval()


def split(batch, sizes):
    parts = {
        key: value.split(sizes) if isinstance(value, Tensor) else [value] * len(sizes)
        for key, value in batch.items()
    }
    return [{key: rows[index] for key, rows in parts.items()} for index in range(len(sizes))]


@pytest.mark.parametrize("kind", ADD_UP)
def test_uneven_batches_add_up(kind):
    *what, big = ADD_UP[kind]
    model = made(*what)
    expected = model(**big).loss.item()
    # these compute the loss in float32; the mean over masked pixels adds 1e-5 to their number
    tolerance = 1e-6 if kind in ("causal", "CTC", "masked images") else 1e-12
    for sizes in ([ROWS], [2, 3], [1, 2, 2], [1] * ROWS):
        assert mean_loss(model, split(big, sizes)) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("kind", REFUSED)
def test_losses_that_do_not_add_up_need_batches_of_equal_size(kind):
    *what, big = REFUSED[kind]
    model = made(*what)
    with pytest.raises(InputError, match=what[0].__name__):
        mean_loss(model, split(big, [1, 2, 2]))
    torch.manual_seed(1)
    expected = model(**big).loss.item()
    torch.manual_seed(1)
    assert mean_loss(model, [big]) == pytest.approx(expected, rel=1e-12)
    user_loss = mean_loss(model, split(big, [2, 3]), loss_fn=lambda model, batch: model(**batch).loss)
    assert user_loss > 0


def test_batches_of_equal_size_that_do_not_add_up_weigh_alike_with_a_warning():
    *what, big = REFUSED["two means"]
    model, parts = made(*what), split(big, [2, 2, 1])[:2]
    with pytest.warns(UserWarning, match="equal weight"):
        found = mean_loss(model, parts)
    assert found == pytest.approx(sum(model(**part).loss.item() for part in parts) / 2, rel=1e-12)


def test_labels_of_sequences_of_other_lengths():
    model, rows = made(*ADD_UP["XLM"][:2]), split(TEXT, [1] * ROWS)
    cut = [{key: value[:, : 8 - index // 2] for key, value in row.items()} for index, row in enumerate(rows)]
    counts = [int((row["labels"] != -100).sum()) for row in cut]
    sums = [n * model(**row).loss.item() for n, row in zip(counts, cut, strict=True) if n]
    assert mean_loss(model, cut) == pytest.approx(sum(sums) / sum(counts), rel=1e-12)
