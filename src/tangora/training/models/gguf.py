"""Dequantizes a GGUF model once and keeps it as safetensors in the user's cache folder."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tangora._checks import InputError, reason
from tangora.training.models.cache import cached_model

CACHE_FORMAT = 1
"""Raised when what is written changes, so that older caches are left alone."""

_log = logging.getLogger(__name__)


def dequantized(gguf: Path, *, version: str | None = None) -> Path:
    """Return a folder that holds a GGUF model as ordinary float32 safetensors, made at the first call."""
    return cached_model(_cache_key(gguf, version), lambda folder: _dequantize(gguf, folder))


def _cache_key(gguf: Path, version: str | None) -> str:
    """Return a name for one version of one file."""
    status = gguf.stat()
    if version is None:
        place = f"{gguf.resolve()}:{status.st_mtime_ns}"
        version = hashlib.sha256(place.encode()).hexdigest()[:12]
    return f"{gguf.stem}-{version}-{status.st_size}-v{CACHE_FORMAT}"


def _dequantize(gguf: Path, folder: Path) -> None:
    """Read a GGUF file and write it as safetensors."""
    _log.info("dequantizing %s once, into the cache", gguf.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file ends in any of them
        raise InputError(f"{gguf} cannot be read as a GGUF model: {reason(error)}") from error
    _forget_quantization(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _forget_quantization(model: Any) -> None:
    """Let transformers save the model: the weights are plain float32, but it refuses ("quantized with gguf")."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
