"""Causal examples as token numbers: in the plain format, or by the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tangora._checks import InputError, reason


class Piece(NamedTuple):
    """A part of a text, and whether the loss counts it."""

    tokens: list[int]
    trained: bool


def encode_turns(
    examples: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, chat_template: bool
) -> list[list[Piece]]:
    """Turn examples into token numbers of prompts and completions in turn; the last piece is a completion."""
    if chat_template:
        texts = [_rendered(example, tokenizer) for example in examples]
        flat = iter(_tokenize([text for pieces in texts for text, _ in pieces], tokenizer))
        return [[Piece(next(flat), trained) for _, trained in pieces] for pieces in texts]
    eos: Any = tokenizer.eos_token_id
    ending = [] if eos is None else [eos]
    prompts = encode_prompts(examples, tokenizer, chat_template=False)
    completions = _tokenize([example["completion"] for example in examples], tokenizer)
    return [
        [Piece(prompt, False), Piece(completion + ending, True)]
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
            "chat_template needs a tokenizer with a chat template, and the model's has none; leave it out, or set it "
            "to false for the plain format"
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
                "the tokenizer's chat template cannot be trained with: an answer does not follow its generation prompt "
                f"{before[-40:]!r}; set chat_template to false for the plain format"
            )
    return pieces


def _messages(example: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return an example as a conversation."""
    if "messages" in example:
        return example["messages"]
    if not example["prompt"]:
        raise InputError(
            "chat_template needs prompts or messages; plain text has none: leave chat_template out"
        )
    return [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["completion"]},
    ]


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
