"""Whether examples fit a model: how many are cut to its length, and whether its tokenizer knows their words."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from tangora._checks import InputError
from tangora.probes.losses import IGNORED
from tangora.training.data.encoding import encode, encode_turns, labelled_texts
from tangora.training.data.task import Task
from tangora.training.models import ImageScaler, Kind

_MOST_UNKNOWN = 0.5


def check_fit(
    task: Task, tokenizer: Any, *, max_length: int, vocabulary: int, chat_template: bool = False
) -> list[str]:
    """Check that a model can read a task's texts, and count those that are too long."""
    if isinstance(tokenizer, ImageScaler):
        return []
    cut, longest, affected = [], 0, []
    for name, examples in (("training", task.train), ("validation", task.validation), ("test", task.test)):
        if not examples:
            continue
        turns = _turns(examples, tokenizer, task.kind, chat_template)
        texts = [[*chain.from_iterable(pieces)] for pieces in turns]
        if name == "training":
            _check_known(texts, tokenizer, vocabulary)
        long = [len(tokens) for tokens in texts if len(tokens) > max_length]
        if not long:
            continue
        told = f"{len(long)} of {len(texts)} {name}"
        if name == "training":
            how = {"kind": task.kind, "max_length": max_length, "chat_template": chat_template}
            kept = {_seen(encoding) for encoding in encode(examples, tokenizer, **how)}
            if len(kept) < len({*map(tuple, texts)}) / 2:
                raise InputError(
                    f"{told} examples are cut to {max_length} tokens (longest {max(long)}), so that only {len(kept)} "
                    "different examples remain; increase --max-length, or shorten the texts"
                )
        cut.append(told)
        longest = max(longest, *long)
        affected += turns
    if not cut:
        return []
    lost = _lost(affected, tokenizer, task.kind, max_length)
    splits = " and ".join(filter(None, [", ".join(cut[:-1]), cut[-1]]))
    told = f"{splits} examples are cut to {max_length} tokens (longest {longest}); {lost} is lost"
    return [f"{told}; increase --max-length"]


def _turns(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, kind: Kind, chat_template: bool
) -> list[list[list[int]]]:
    """Return the token numbers of each example, uncut: of a text, or of prompts and completions in turn."""
    if kind == "causal":
        turns = encode_turns(examples, tokenizer, chat_template=chat_template)
        return [[piece.tokens for piece in pieces] for pieces in turns]
    return [[tokens] for tokens in tokenizer(*labelled_texts(examples), verbose=False)["input_ids"]]


def _seen(encoding: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens by which a model can tell an example from others: without what it has to say itself."""
    tokens, labels = encoding["input_ids"], encoding["labels"]
    if not isinstance(labels, list):  # of a class
        return tuple(tokens)
    asked = [token for token, label in zip(tokens, labels, strict=True) if label == IGNORED]
    return tuple(asked or tokens)


def _lost(turns: list[list[list[int]]], tokenizer: Any, kind: Kind, max_length: int) -> str:
    if kind == "classification":
        return "the beginning" if getattr(tokenizer, "truncation_side", "right") == "left" else "the end"
    cut = sum(len(pieces[-1]) > max_length for pieces in turns)
    if not any(tokens for pieces in turns for tokens in pieces[:-1]):
        return "the end"
    return "the beginning of the prompt" + (f", and of {cut} the end of the completion," if cut else "")


def _check_known(texts: Sequence[Sequence[int]], tokenizer: Any, vocabulary: int) -> None:
    """Raise if a tokenizer does not belong to the texts or to the model."""
    total, unknown = sum(map(len, texts)), tokenizer.unk_token_id
    if (largest := max(map(max, filter(None, texts)), default=0)) >= vocabulary:
        raise InputError(
            f"the tokenizer does not belong to the model: it produces token {largest}, but the model's "
            f"vocabulary has {vocabulary} tokens"
        )
    share = sum(tokens.count(unknown) for tokens in map(list, texts)) / max(total, 1)
    if unknown is not None and unknown != tokenizer.eos_token_id and share > _MOST_UNKNOWN:
        raise InputError(
            f"the model's tokenizer does not contain the words of the data: {share:.0%} of the training "
            "tokens are "
            f"{tokenizer.unk_token!r}; use a model whose tokenizer contains them"
        )
