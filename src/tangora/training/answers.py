"""Lets a causal model answer, and compares its final answers with the right ones."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tangora._checks import InputError, check_whole
from tangora.training.data.encoding import encode_prompts
from tangora.training.data.generated import ANSWER_MARKER, PROBLEM
from tangora.training.metrics import device_of, length_batches, observed
from tangora.training.ranks import dealt_alike, gathered, num_ranks

_SPOKEN_MARKER = "The answer is:"


def generate_completions(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    chat_template: bool = False,
) -> list[str]:
    """Let a causal model answer prompts, greedily; processes share the batches, and all get the answers.

    An answer ends at its end token, or before the first of the ``stop`` strings. By default it may be a little longer
    than the longest completion.
    """
    if not examples or not all(example.get("prompt") for example in examples):
        raise InputError("examples must each have a prompt to complete; plain text has none")
    if max_new_tokens is None:
        completions = [example["completion"] for example in examples]
        max_new_tokens = 8 + max(map(len, tokenizer(completions, verbose=False)["input_ids"]))
    check_whole("max_new_tokens", max_new_tokens, low=1)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,  # the Trainer switches it off in the model's configuration
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    prompts = encode_prompts(examples, tokenizer, chat_template=chat_template)
    answered: list[tuple[int, str]] = []
    with observed(model):
        batches = length_batches([len(prompt) for prompt in prompts], batch_size)
        for indices, counts in dealt_alike(list(batches)):
            batch = _pad_left([prompts[index] for index in indices], tokenizer.pad_token_id, device_of(model))
            # a sharded model's processes generate until all have ended
            length = batch["input_ids"].shape[1]
            tokens = model.generate(
                **batch,
                generation_config=settings,
                synced_gpus=num_ranks() > 1,
                stopping_criteria=StoppingCriteriaList([_Stopped(stop, tokenizer, length)] if stop else []),
            )
            if counts:
                answers = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
                answered += zip(indices, (_before(stop, answer) for answer in answers), strict=True)
    return [text for _, text in sorted(itertools.chain.from_iterable(gathered(answered)))]


def conversation(turns: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Return an example that goes on after so many answers to the user's turns."""
    said = [text for pair in itertools.zip_longest(turns, answers) for text in pair if text is not None]
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)
    ]
    return {
        "prompt": "\n".join(said),
        "completion": "",
        "messages": [*messages, {"role": "assistant", "content": ""}],
    }


def answer_conversations(
    model: Any, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[str]], **options: Any
) -> list[list[str]]:
    """Let a model answer the user's turns one after another, each after its own answers to those before.

    Options are those of `generate_completions`.
    """
    answers: list[list[str]] = [[] for _ in conversations]
    for turn in range(max(map(len, conversations))):
        open_ones = [number for number, turns in enumerate(conversations) if turn < len(turns)]
        examples = [conversation(conversations[number][: turn + 1], answers[number]) for number in open_ones]
        texts = generate_completions(model, tokenizer, examples, **options)
        for number, text in zip(open_ones, texts, strict=True):
            answers[number].append(text)
    return answers


class _Stopped(StoppingCriteria):
    """Ends every answer that holds a stop string.

    transformers' ``stop_strings`` also match across the prompt's end, and know no tokenizers of whole words.
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int):
        self._stop, self._tokenizer, self._length = stop, tokenizer, length

    def __call__(self, input_ids: Int[Tensor, "b t"], scores: Any, **kwargs: Any) -> Any:
        """Tell which rows are done."""
        del scores, kwargs
        texts = self._tokenizer.batch_decode(input_ids[:, self._length :], skip_special_tokens=True)
        ended = [any(each in text for each in self._stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _before(stop: Sequence[str], text: str) -> str:
    ends = [index for each in stop if (index := text.find(each)) >= 0]
    return text[: min(ends)] if ends else text


def summarize_answers(texts: Sequence[str], right: Bool[Tensor, " n"]) -> dict[str, float]:
    """Measure how often final answers are right, and how often there is one."""
    answered = sum(bool(final_answer(text)) for text in texts) / len(texts)
    return {"exact_match": right.double().mean().item(), "answered": answered}


def answers_match(texts: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> Bool[Tensor, " n"]:
    """Compare generated texts with the examples' answers.

    Generated problems are judged by the data set that made them, so that 15.0 is right where 15 is.
    """
    return torch.tensor([_is_right(text, example) for text, example in zip(texts, examples, strict=True)])


def final_answer(text: str) -> str:
    r"""Extract the final answer.

    That is the line after the first ``####`` (GSM8K), or after the last ``The answer is:`` (MetaMathQA), or else the
    last line that is not empty.

    Examples:
        >>> final_answer("Half of 84 is 42.\n#### 42")
        '42'
    """
    _, marker, after = text.partition(ANSWER_MARKER)
    if not marker:
        _, marker, after = text.rpartition(_SPOKEN_MARKER)
    lines = [line.strip() for line in after.split("\n") if line.strip()]
    if not lines:
        return ""
    return lines[0] if marker else lines[-1]


def _number(text: str) -> float | None:
    """Return a number as people write it: $1,234.50 is 1234.5; nothing for other text."""
    plain = text.strip().rstrip(".").removeprefix("$").replace(",", "")
    return float(plain) if re.fullmatch(r"-?\d+(\.\d+)?", plain) else None


def _is_right(text: str, example: Mapping[str, Any]) -> bool:
    """Return whether an answer is right; one of several lines, such as a grid, is compared as a whole."""
    expected = (example.get("answer") or "").strip()
    if not expected or ANSWER_MARKER in expected:  # GSM8K calls its whole solution the answer
        expected = final_answer(example["completion"])
    answer = text.strip() if "\n" in expected else final_answer(text)
    if answer == expected:
        return True
    # where the answer is "answer2", the completion may be the sentence that says so
    if answer and "\n" not in expected and answer == final_answer(example["completion"]):
        return True
    if (number := _number(expected)) is not None and _number(answer) == number:
        return True
    problem = example.get(PROBLEM)
    return bool(answer) and problem is not None and problem.accepts(answer)


def _pad_left(
    sequences: Sequence[list[int]], pad: Any, device: torch.device
) -> dict[str, Int[Tensor, "b t"]]:
    """Return prompts padded on their left, so that what is generated follows them at once."""
    tokens = [torch.tensor(sequence) for sequence in sequences]
    mask = [torch.ones_like(sequence) for sequence in tokens]
    return {
        "input_ids": pad_sequence(tokens, True, pad, "left").to(device),
        "attention_mask": pad_sequence(mask, True, 0, "left").to(device),
    }
