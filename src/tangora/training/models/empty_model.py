"""Models without weights, from their configurations alone: nothing is downloaded, nothing written, no memory taken."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPConfig, LlamaConfig, PretrainedConfig, PreTrainedModel, T5Config
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from tangora._checks import InputError, no_such_path, reason
from tangora._names import Kind
from tangora.training.models.base_model import AUTO_MODELS, PACKAGED_MODELS
from tangora.training.models.clip import classifier_config
from tangora.training.models.digits import VIT_DIGITS, vit_config
from tangora.training.paths import is_model_path, local_path, locate


def _llama_2_7b() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        pad_token_id=0,
    )


def _t5_base() -> PretrainedConfig:
    config = T5Config(vocab_size=32128, d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    config.decoder_start_token_id = 0
    return config


_PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": _llama_2_7b,
    "google-t5/t5-base": _t5_base,
    "openai/clip-vit-base-patch16": lambda: CLIPConfig(vision_config={"patch_size": 16}),
}
"""Sizes in the published config.json of models that the presets of papers name."""


def read_config(name: str) -> PretrainedConfig:
    """Read the configuration of a model without its weights and without the hub.

    Args:
        name: As for `load_model`. Of the hub's models those in its cache and those that presets name are known.

    Raises:
        InputError: If it cannot be read here.
    """
    if name in _PUBLISHED:
        return _PUBLISHED[name]()
    if name == VIT_DIGITS:  # would be pretrained first
        return vit_config(2)
    path = locate(name, PACKAGED_MODELS[name]) if name in PACKAGED_MODELS else local_path(name)
    if path is None and is_model_path(name):
        raise InputError(f"model {name!r}: {no_such_path(name)}")
    try:
        return _from_files(name if path is None else path)
    except Exception as error:  # a damaged file ends in any of them
        raise InputError(
            f"the configuration of model {name!r} cannot be read here: {reason(error)}"
        ) from error


def _from_files(place: Path | str) -> PretrainedConfig:
    inside: dict[str, Any] = {}
    if isinstance(place, Path) and place.is_file():
        place, inside = place.parent, {"gguf_file": place.name}
    return transformers.AutoConfig.from_pretrained(place, local_files_only=True, **inside)


def reads_images(config: PretrainedConfig) -> bool:
    """Tell whether a model of a configuration classifies images."""
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def empty_model(
    config: PretrainedConfig, kind: Kind, num_labels: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Make a model of a configuration on the meta device, as `load_model` would load it."""
    auto = AUTO_MODELS["images" if reads_images(config) and kind == "classification" else kind]
    if isinstance(config, CLIPConfig):
        labels = tuple(map(str, range(num_labels)))
        config = classifier_config(config, str(config.name_or_path), labels, None, named=True) or config
    elif kind == "classification":
        config.num_labels = num_labels
    if getattr(config, "pad_token_id", None) is None:  # decoders need one to classify
        config.pad_token_id = 0
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return auto.from_config(config, dtype=dtype)
