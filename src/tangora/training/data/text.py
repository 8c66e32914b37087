"""Text to token numbers, and token numbers to padded batches. Images take the same way."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerBase

from tangora._checks import InputError, check_choice, check_whole
from tangora.training.data.images import collate_images, encode_images
from tangora.training.data.prompts import Piece, encode_turns
from tangora.training.models import KINDS, ImageScaler, Kind

IGNORED = -100
"""Label of a token that counts for no loss; what torch's and transformers' losses skip."""

Encoding: TypeAlias = dict[str, Any]
"""``input_ids`` and ``attention_mask`` or ``pixel_values`` of one example, and ``labels``: one, or one per token."""

Collator: TypeAlias = Callable[[Any], Mapping[str, Tensor]]
"""Makes a padded batch of a list of encodings."""


class EncodedDataset(Dataset[Encoding]):
    """Examples as token numbers or pixels; for a DataLoader, for transformers' Trainer and for `evaluate`."""

    def __init__(self, encodings: Sequence[Encoding]):
        self.encodings = list(encodings)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.encodings)

    def __getitem__(self, index: int) -> Encoding:
        """Return one example, unpadded."""
        return self.encodings[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example; 1 for an image."""
        return [len(encoding.get("input_ids", (None,))) for encoding in self.encodings]


def encode(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | ImageScaler,
    *,
    kind: Kind,
    max_length: int,
    chat_template: bool = False,
) -> EncodedDataset:
    """Turn examples into token numbers, or images into scaled pixels.

    A causal example becomes ``prompt + newline + completion + eos``, so that base and instruct models are trained on
    the same text, or what the tokenizer's chat template makes of it; the loss counts completions (with their eos)
    only. One that is too long loses its beginning, then the end of its last completion.
    """
    check_choice("kind", kind, KINDS)
    check_whole("max_length", max_length, low=2)
    if not examples:
        raise InputError("examples must hold at least one example; got none")
    if isinstance(tokenizer, ImageScaler) or "pixels" in examples[0]:
        return EncodedDataset(encode_images(examples, tokenizer))
    if kind == "classification":
        return EncodedDataset(_encode_labelled(examples, tokenizer, max_length))
    turns = encode_turns(examples, tokenizer, chat_template=chat_template)
    return EncodedDataset([_join(pieces, max_length) for pieces in turns])


def collator(tokenizer: PreTrainedTokenizerBase | ImageScaler, kind: Kind) -> Collator:
    """Return what pads encodings to the longest of a batch, and the labels of causal ones with -100."""
    check_choice("kind", kind, KINDS)
    if isinstance(tokenizer, ImageScaler):
        return collate_images
    if kind == "classification":
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def _encode_labelled(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoding]:
    """Return encoded texts with one label each."""
    texts = [example["text"] for example in examples]
    pairs = [example["text_pair"] for example in examples] if "text_pair" in examples[0] else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length, verbose=False)
    keys = ["input_ids", "attention_mask"]
    if pairs is not None and "token_type_ids" in encoded:  # which of the two a token belongs to
        keys.append("token_type_ids")
    return [
        {key: encoded[key][index] for key in keys} | {"labels": example["label"]}
        for index, example in enumerate(examples)
    ]


def _join(pieces: Sequence[Piece], max_length: int) -> Encoding:
    """Return prompts and completions within ``max_length`` tokens."""
    completion = pieces[-1].tokens[:max_length]
    tokens = [token for piece in pieces[:-1] for token in piece.tokens]
    labels = [token if piece.trained else IGNORED for piece in pieces[:-1] for token in piece.tokens]
    first = max(0, len(tokens) + len(completion) - max_length)
    tokens, labels = tokens[first:] + completion, labels[first:] + completion
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}
