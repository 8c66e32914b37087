"""Forgetting: how well a language model still predicts text that has nothing to do with what it was trained on."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tangora._checks import InputError, check_whole
from tangora.training.data import collator, encode, load_task
from tangora.training.evaluation import evaluate

NEWS = "bbc-news"
PROBLEMS = "reasoning-gym:gsm_symbolic"


def unrelated_texts(task_name: str, count: int) -> list[str]:
    """Return texts to measure forgetting with, always the same ones.

    Articles of BBC News; where these are the task themselves, word problems of ``gsm_symbolic`` with their solutions.
    Both are what `load_task` gives as test examples with its default seed.
    """
    check_whole("count", count, low=1)
    source = PROBLEMS if task_name == NEWS else NEWS
    task = load_task(source, kind="causal", num_train=1, num_validation=0, num_test=count)
    return [f"{example['prompt']}\n{example['completion']}".strip() for example in task.test]


def forgetting_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | Any,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 16,
) -> float | None:
    """Measure how well a model predicts texts; measured before and after training, the rise is what it forgot."""
    if not texts:
        raise InputError("texts must hold at least one text; got none")
    if model.get_output_embeddings() is None:
        return None
    data = encode(
        [{"prompt": "", "completion": text} for text in texts],
        tokenizer,
        kind="causal",
        max_length=max_length,
    )
    collate = collator(tokenizer, "causal")
    return evaluate(model, data, collate, kind="causal", batch_size=batch_size)["loss"]
