"""Texts to token numbers, in the plain format or by a chat template; images to pixels; both to padded batches."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from tangora._checks import InputError, check_choice, check_whole, reason
from tangora.probes.losses import IGNORED
from tangora.training.data.images import IMAGE, PIXELS, holds_image
from tangora.training.models import KINDS, ImageScaler, Kind

Encoding: TypeAlias = dict[str, Any]
"""``input_ids`` and ``attention_mask`` or ``pixel_values`` of one example, and ``labels``: one, or one per token."""

Collator: TypeAlias = Callable[[Any], Mapping[str, Tensor]]
"""Makes a padded batch of a list of encodings."""


class _Piece(NamedTuple):
    """A part of a text, and whether the loss counts it."""

    tokens: list[int]
    trained: bool


def encode(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | ImageScaler,
    *,
    kind: Kind,
    max_length: int,
    chat_template: bool = False,
) -> Sequence[Encoding]:
    """Turn examples into token numbers, or images into scaled pixels: encoded ones each time that they are asked for.

    A causal example becomes ``prompt + newline + completion + eos``, so that base and instruct models are trained on
    the same text, or what the tokenizer's chat template makes of it; the loss counts completions (with their eos)
    only. One that is too long loses its beginning, then the end of its last completion.
    """
    check_choice("kind", kind, KINDS)
    check_whole("max_length", max_length, low=2)
    if not examples:
        raise InputError("examples must hold at least one example; got none")
    if isinstance(tokenizer, ImageScaler) or holds_image(examples[0]):
        return _encode_images(examples, tokenizer)
    if kind == "classification":
        return _encode_labelled(examples, tokenizer, max_length)
    turns = encode_turns(examples, tokenizer, chat_template=chat_template)
    return [_join(pieces, max_length) for pieces in turns]


def collator(tokenizer: PreTrainedTokenizerBase | ImageScaler, kind: Kind) -> Collator:
    """Return what pads encodings to the longest of a batch, and the labels of causal ones with -100."""
    check_choice("kind", kind, KINDS)
    if isinstance(tokenizer, ImageScaler):
        return default_collate
    if kind == "classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def labelled_texts(examples: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str] | None]:
    """Return the texts of a classification, and of pairs the second texts."""
    pairs = [example["text_pair"] for example in examples] if "text_pair" in examples[0] else None
    return [example["text"] for example in examples], pairs


def _encode_labelled(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoding]:
    texts, pairs = labelled_texts(examples)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, verbose=False)
    keys = ["input_ids", "attention_mask"]
    if pairs is not None and "token_type_ids" in encoded:  # which of the two a token belongs to
        keys.append("token_type_ids")
    return [
        {key: encoded[key][index] for key in keys} | {"labels": example["label"]}
        for index, example in enumerate(examples)
    ]


def _join(pieces: Sequence[_Piece], max_length: int) -> Encoding:
    """Return prompts and completions within ``max_length`` tokens."""
    completion = pieces[-1].tokens[:max_length]
    tokens = [token for piece in pieces[:-1] for token in piece.tokens]
    labels = [token if piece.trained else IGNORED for piece in pieces[:-1] for token in piece.tokens]
    first = max(0, len(tokens) + len(completion) - max_length)
    tokens, labels = tokens[first:] + completion, labels[first:] + completion
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def encode_turns(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, chat_template: bool
) -> list[list[_Piece]]:
    """Turn examples into token numbers of prompts and completions in turn; the last piece is a completion."""
    if chat_template:
        texts = [_rendered(example, tokenizer) for example in examples]
        flat = iter(_tokenize([text for pieces in texts for text, _ in pieces], tokenizer))
        return [[_Piece(next(flat), trained) for _, trained in pieces] for pieces in texts]
    eos: Any = tokenizer.eos_token_id
    ending = [] if eos is None else [eos]
    prompts = encode_prompts(examples, tokenizer, chat_template=False)
    completions = _tokenize([example["completion"] for example in examples], tokenizer)
    return [
        [_Piece(prompt, False), _Piece(completion + ending, True)]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def encode_prompts(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, chat_template: bool
) -> list[list[int]]:
    """Turn prompts into the token numbers after which a completion begins."""
    if chat_template:
        texts = [_template(_messages(example)[:-1], tokenizer, True) for example in examples]
        return _tokenize(texts, tokenizer)
    # what the tokenizer puts around a text, without the end that some add
    beginning = [
        token for token in _tokenize([""], tokenizer, special=True)[0] if token == tokenizer.bos_token_id
    ]
    texts = [f"{example['prompt']}\n" if example["prompt"] else "" for example in examples]
    return [beginning + tokens for tokens in _tokenize(texts, tokenizer)]


def check_chat_template(tokenizer: Any) -> None:
    """Raise unless a tokenizer has a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "chat_template needs a tokenizer with a chat template, but this model's tokenizer has "
            "none; omit it, or set it to false for the plain format"
        )


def _rendered(example: Mapping[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """Return a conversation in pieces: what stands before an assistant's turn, and the turn, which is trained."""
    messages = _messages(example)
    whole, pieces, done = _template(messages, tokenizer, False), [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or not index:
            continue
        last = index == len(messages) - 1
        before = _template(messages[:index], tokenizer, True)
        after = whole if last else _template(messages[: index + 1], tokenizer, False)
        # a template may write earlier turns otherwise once others follow, such as without their thoughts
        if done <= len(before) < len(after) and whole.startswith(before) and whole.startswith(after):
            pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
        elif last:
            raise InputError(
                "the tokenizer's chat template is not usable for training: an answer does not follow "
                "its generation prompt "
                f"{before[-40:]!r}; set chat_template to false for the plain format"
            )
    return pieces


def _messages(example: Mapping[str, Any]) -> list[dict[str, str]]:
    if "messages" in example:
        return example["messages"]
    if not example["prompt"]:
        raise InputError("chat_template needs prompts or messages; plain text has none: omit chat_template")
    turns = (("user", example["prompt"]), ("assistant", example["completion"]))
    return [{"role": role, "content": content} for role, content in turns]


def _template(messages: list[dict[str, str]], tokenizer: Any, opened: bool) -> str:
    """Return messages written with the tokenizer's template, ready for an answer or not."""
    check_chat_template(tokenizer)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    except Exception as error:  # templates are programs, which raise what they like
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the tokenizer's chat template refuses a conversation of {roles or 'no messages'}: {reason(error)}"
        ) from error


def _tokenize(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, *, special: bool = False
) -> list[list[int]]:
    """Return token numbers; without a warning of what is too long for the model, as it is cut later."""
    encoded: Any = tokenizer(texts, add_special_tokens=special, verbose=False)
    return encoded["input_ids"]


class _Pictures(Sequence[Encoding]):
    """Images that are decoded when they are looked up, as all of them together may not fit into memory."""

    def __init__(self, examples: Sequence[Mapping[str, Any]], scaler: ImageScaler):
        self._examples, self._scaler = examples, scaler

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Encoding: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoding]: ...
    def __getitem__(self, index: int | slice) -> Encoding | list[Encoding]:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        image, label = self._examples[index][IMAGE], self._examples[index]["label"]
        pixels = self._scaler.prepared(image.decoded())
        _check_shape(image.where, pixels, self._scaler)
        return {"pixel_values": pixels, "labels": label}

    def __getitems__(self, indices: Sequence[int]) -> list[Encoding]:
        # torch's loader asks for a batch in this way; Pillow decodes and resizes without Python's lock
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(self.__getitem__, indices))


def lengths_of(dataset: Sequence[Encoding]) -> list[int]:
    """Count the tokens of each encoding; an image counts as one, and is not decoded for that."""
    if isinstance(dataset, _Pictures):
        return [1] * len(dataset)
    return [len(encoding.get("input_ids", (None,))) for encoding in dataset]


def encodings_at(dataset: Sequence[Encoding], indices: Sequence[int]) -> list[Encoding]:
    """Return some encodings."""
    together = isinstance(dataset, _Pictures)
    return dataset.__getitems__(indices) if together else [dataset[index] for index in indices]


def _check_shape(where: str, image: Tensor, scaler: ImageScaler) -> None:
    if image.shape != scaler.shape:
        raise InputError(
            f"{where} must have the model's {_written(scaler.shape)} pixels; got {_written(image.shape)}"
        )


def _encode_images(examples: Sequence[Mapping[str, Any]], scaler: Any) -> Sequence[Encoding]:
    if not isinstance(scaler, ImageScaler):
        raise InputError("image data need an image model, such as vit-digits; this is a text model")
    if not all(map(holds_image, examples)):
        raise InputError("an image model needs image data, such as digits; these data are text")
    if IMAGE in examples[0]:
        return _Pictures(examples, scaler)
    images = []
    for number, example in enumerate(examples):
        image = torch.tensor(example[PIXELS], dtype=torch.float32)
        _check_shape(f"image {number}", image, scaler)
        images.append(image)
    scaled = scaler(torch.stack(images))
    return [
        {"pixel_values": image, "labels": example["label"]}
        for image, example in zip(scaled, examples, strict=True)
    ]


def _written(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
