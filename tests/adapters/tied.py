"""Tiny models of the kinds whose weights several modules share, and of kinds without input embeddings."""

import torch
import transformers as T
from torch import nn

IDS = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
TOKENS = [3, 4, 5]

_BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "init_std": 0.3,
    "decoder_start_token_id": 2,
}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "initializer_factor": 2.0,
}
_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
_SPEECH = {
    **_BERT,
    "vocab_size": 12,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_CLIP = {**_BERT, "image_size": 8, "patch_size": 4}

SHARING = {
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(vocab_size=40, **_BART)),
    "mbart": lambda: T.MBartForConditionalGeneration(T.MBartConfig(vocab_size=40, **_BART)),
    "marian": lambda: T.MarianMTModel(T.MarianConfig(vocab_size=40, pad_token_id=1, **_BART)),
    "t5": lambda: T.T5ForConditionalGeneration(T.T5Config(vocab_size=40, **_T5)),
    "t5-untied-head": lambda: T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=40, tie_word_embeddings=False, **_T5)
    ),
    "umt5": lambda: T.UMT5ForConditionalGeneration(T.UMT5Config(vocab_size=40, **_T5)),
    "llama": lambda: T.LlamaForCausalLM(
        T.LlamaConfig(vocab_size=40, num_key_value_heads=2, tie_word_embeddings=True, **_BERT)
    ),
    "gemma2": lambda: T.Gemma2ForCausalLM(
        T.Gemma2Config(vocab_size=40, num_key_value_heads=2, head_dim=8, **_BERT)
    ),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.3)
    ),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(
            vocab_size=40,
            hidden_size=16,
            word_embed_proj_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=32,
            init_std=0.3,
        )
    ),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(vocab_size=40, **_BERT)),
}
"""Makers of language models with tied tables."""
TABLES = {
    "bart": ["encoder.embed_tokens", "decoder.embed_tokens", "shared", "embed_tokens", "lm_head"],
    "mbart": ["decoder.embed_tokens", "shared", "lm_head"],
    "marian": ["encoder.embed_tokens", "shared", "lm_head"],
    "t5": ["encoder.embed_tokens", "shared", "embed_tokens", "lm_head"],
    "t5-untied-head": ["encoder.embed_tokens", "shared"],
    "umt5": ["encoder.embed_tokens", "shared", "lm_head"],
    "llama": ["embed_tokens", "lm_head"],
    "gemma2": ["embed_tokens", "lm_head"],
    "gpt2": ["wte", "lm_head"],
    "opt": ["embed_tokens", "lm_head"],
    "bert": ["word_embeddings", "decoder"],
}
"""Modules of each that hold a shared weight."""

WITHOUT_EMBEDDINGS = {
    "wav2vec2": (lambda: T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**_SPEECH)), {"input_values": (2, 120)}),
    "hubert": (lambda: T.HubertForCTC(T.HubertConfig(**_SPEECH)), {"input_values": (2, 120)}),
    "clip-vision": (
        lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(projection_dim=4, **_CLIP)),
        {"pixel_values": (2, 3, 8, 8)},
    ),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**_CLIP)), {"pixel_values": (2, 3, 8, 8)}),
    "convnext": (
        lambda: T.ConvNextForImageClassification(
            T.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, image_size=8, patch_size=2)
        ),
        {"pixel_values": (2, 3, 8, 8)},
    ),
    "patchtst": (
        lambda: T.PatchTSTForPrediction(
            T.PatchTSTConfig(
                num_input_channels=2,
                context_length=16,
                patch_length=4,
                patch_stride=4,
                prediction_length=4,
                d_model=8,
                num_attention_heads=2,
                num_hidden_layers=1,
                ffn_dim=8,
            )
        ),
        {"past_values": (2, 16, 2)},
    ),
}
"""Makers of models that read no tokens, and the shapes of their inputs."""


def made(name: str) -> nn.Module:
    """Return a model in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    return SHARING[name]().eval()


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return token inputs, for the decoder too where there is one."""
    both = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    return both if getattr(model.config, "is_encoder_decoder", False) else {"input_ids": IDS}


@torch.no_grad()
def output(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """Return logits, or the first output that there is."""
    return model.eval()(**(inputs or inputs_of(model)))[0]


def trained(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move all trainable parameters, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Compare up to float32's rounding, relative to the largest entry."""
    assert float((one - other).detach().abs().max()) <= 3e-5 * float(other.detach().abs().max())
