"""Models that are made once, by one process or another, and kept in the user's cache: here those of GGUF files."""

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tangora._checks import InputError, reason

_FORMAT = 1  # raised when other files are written, so that older caches are left alone

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return ``$TANGORA_CACHE``, ``$XDG_CACHE_HOME/tangora`` or ``~/.cache/tangora``."""
    if own := os.environ.get("TANGORA_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tangora"


def cached_model(key: str, make: Callable[[Path], object]) -> Path:
    """Return a folder of the cache that holds a model, made at the first call."""
    folder = cache_folder() / "models" / key
    # the folder appears under this name only when it is complete
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as temporary:
            complete = Path(temporary) / "model"
            make(complete)
            # a process beside this one may have been first: its copy is as good
            with contextlib.suppress(FileExistsError):
                _rename(complete, folder)
    except PermissionError as error:
        raise InputError(f"cannot write the model cache {folder}; set TANGORA_CACHE to a folder") from error
    return folder


def _rename(source: Path, target: Path) -> None:
    """Rename a folder; a full target is a `FileExistsError` on every system."""
    try:
        source.rename(target)
    except OSError:
        if target.is_dir():
            raise FileExistsError(target) from None
        raise


def dequantized(gguf: Path, *, version: str | None = None) -> Path:
    """Return a folder that holds a GGUF model as ordinary float32 safetensors, made at the first call."""
    return cached_model(_cache_key(gguf, version), lambda folder: _dequantize(gguf, folder))


def _cache_key(gguf: Path, version: str | None) -> str:
    status = gguf.stat()
    if version is None:
        place = f"{gguf.resolve()}:{status.st_mtime_ns}"
        version = hashlib.sha256(place.encode()).hexdigest()[:12]
    return f"{gguf.stem}-{version}-{status.st_size}-v{_FORMAT}"


def _dequantize(gguf: Path, folder: Path) -> None:
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
