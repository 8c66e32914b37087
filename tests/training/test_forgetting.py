"""Forgetting: always the same texts, never the task's own, and no number for what has no language head."""

import pytest

from tangora._checks import InputError
from tangora.training.data import load_task
from tangora.training.forgetting import forgetting_loss, unrelated_texts
from tests.training.test_evaluation import naive
from tests.training.tiny import WORDS, rng_state_unchanged, tiny_bert, tiny_llama, tiny_tokenizer

TEXTS = [" ".join(WORDS[:length]) for length in (3, 7, 5, 2)]


def test_loss_is_the_mean_over_all_tokens():
    from tangora.training.data import encode

    model, tokenizer = tiny_llama(), tiny_tokenizer()
    rows = encode([{"prompt": "", "completion": t} for t in TEXTS], tokenizer, kind="causal", max_length=5)
    expected, _ = naive(model, rows, "causal")
    for batch_size in (1, 4):
        loss = forgetting_loss(model, tokenizer, TEXTS, max_length=5, batch_size=batch_size)
        assert loss == pytest.approx(expected, rel=1e-6)


def test_nothing_is_left_behind():
    model, tokenizer = tiny_llama().train(), tiny_tokenizer()
    assert rng_state_unchanged(lambda: forgetting_loss(model, tokenizer, TEXTS))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_classifiers_have_no_number():
    assert forgetting_loss(tiny_bert(), tiny_tokenizer(), TEXTS) is None


def test_texts_are_not_the_tasks():
    pytest.importorskip("reasoning_gym")
    news = unrelated_texts("digits", 5)
    assert news == unrelated_texts("reasoning-gym:chain_sum", 5)
    assert len(set(news)) == 5
    own = load_task("bbc-news", kind="causal")
    articles = {example["completion"].strip() for example in own.train + own.validation + own.test}
    assert set(news) <= articles
    problems = unrelated_texts("bbc-news", 5)
    assert len(set(problems)) == 5
    assert not set(problems) & articles
    assert all("####" in text for text in problems)


@pytest.mark.messages
def test_messages():
    with pytest.raises(InputError, match="count must be"):
        unrelated_texts("digits", 0)
    with pytest.raises(InputError, match="at least one text"):
        forgetting_loss(tiny_llama(), tiny_tokenizer(), [])
