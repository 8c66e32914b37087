"""Losses, answers and forgetting against naive loops; nothing about the model changes."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tangora._checks import InputError
from tangora.training.answers import answers_match, final_answer, generate_completions, summarize_answers
from tangora.training.data import collator, encode, load_task
from tangora.training.metrics import evaluate, forgetting_loss, metrics_of, predictions, unrelated_texts
from tests.models import WORDS, tiny_bert, tiny_llama, tiny_tokenizer
from tests.training.tiny import causal_examples, labelled_examples, rng_state_unchanged


@pytest.fixture(params=["classification", "causal"])
def setting(request):
    """Model, data set, collator and kind."""
    kind = request.param
    examples, model = {
        "classification": (labelled_examples(), tiny_bert()),
        "causal": (causal_examples(), tiny_llama()),
    }[kind]
    tokenizer = tiny_tokenizer()
    dataset = encode(examples, tokenizer, kind=kind, max_length=32)
    return model, dataset, collator(tokenizer, kind), kind


def naive(model, dataset, kind):
    """One example at a time, without padding."""
    losses, correct = [], []
    for row in dataset:
        logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
        targets = torch.tensor(row["labels"]).reshape(-1)
        if kind == "causal":
            logits, targets = logits[:-1], targets[1:]
            logits, targets = logits[targets != -100], targets[targets != -100]
        else:
            logits = logits[None]
        losses += cross_entropy(logits, targets, reduction="none").tolist()
        correct += (logits.argmax(-1) == targets).tolist()
    return sum(losses) / len(losses), sum(correct) / len(correct)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluate_equals_the_unbatched_loop(setting, batch_size):
    model, dataset, collate, kind = setting
    loss, accuracy = naive(model, dataset, kind)
    measured = evaluate(model, dataset, collate, kind=kind, batch_size=batch_size)
    assert measured["loss"] == pytest.approx(loss, rel=1e-6)
    if kind == "causal":
        assert measured["token_accuracy"] == accuracy
        assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    else:
        assert measured["accuracy"] == accuracy
    assert all(type(value) is float for value in measured.values())


def test_evaluate_agrees_with_the_models_own_loss(setting):
    model, dataset, collate, kind = setting
    own = model(**collate([dataset[index] for index in range(len(dataset))])).loss.item()
    assert evaluate(model, dataset, collate, kind=kind, batch_size=4)["loss"] == pytest.approx(own, rel=1e-5)


def test_predictions_are_in_the_data_sets_order(setting):
    model, dataset, collate, kind = setting
    together = predictions(model, dataset, collate, kind=kind, batch_size=4)
    for index in range(len(dataset)):
        alone = predictions(model, [dataset[index]], collate, kind=kind, batch_size=1)
        for name, values in together.items():
            assert values[index].item() == pytest.approx(alone[name].item(), rel=1e-5), name


def test_nothing_is_left_behind(setting):
    model, dataset, collate, kind = setting
    model.train()
    next(model.children()).eval()  # a mixture of modes
    modes = [module.training for module in model.modules()]
    expected = evaluate(model, dataset, collate, kind=kind, batch_size=4)
    assert rng_state_unchanged(lambda: evaluate(model, dataset, collate, kind=kind, batch_size=4))
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    assert evaluate(model.eval(), dataset, collate, kind=kind, batch_size=4) == expected


def test_mode_is_restored_after_an_error(setting):
    model, dataset, _, kind = setting
    model.train()
    with pytest.raises(TypeError):
        evaluate(model, dataset, None, kind=kind, batch_size=4)
    assert model.training


def test_loss_is_the_mean_over_tokens_not_batches():
    per_example = {"loss": [1.0, 9.0], "correct": [1.0, 0.0], "tokens": [1.0, 3.0]}
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in per_example.items()}
    assert metrics_of(tensors) == {
        "loss": 2.5,
        "perplexity": pytest.approx(math.exp(2.5)),
        "token_accuracy": 0.25,
    }


def test_perplexity_of_a_hopeless_model_is_finite():
    tensors = {
        name: torch.tensor([value]) for name, value in {"loss": 1e5, "correct": 0.0, "tokens": 1.0}.items()
    }
    assert math.isfinite(metrics_of(tensors)["perplexity"])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_generation_equals_a_greedy_loop(batch_size):
    model, tokenizer, examples = tiny_llama(), tiny_tokenizer(), causal_examples()
    texts = generate_completions(model, tokenizer, examples, max_new_tokens=5, batch_size=batch_size)
    for text, example in zip(texts, examples, strict=True):
        tokens = tokenizer(f"{example['prompt']}\n")["input_ids"]
        length = len(tokens)
        for _ in range(5):
            tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
            if tokens[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(tokens[length:], skip_special_tokens=True)


def test_generation_leaves_nothing_behind():
    model, tokenizer, examples = tiny_llama().train(), tiny_tokenizer(), causal_examples(3)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    assert rng_state_unchanged(lambda: generate_completions(model, tokenizer, examples, max_new_tokens=3))
    assert all(module.training for module in model.modules())


def test_exact_match_of_a_model_that_knows_some_answers():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    examples = causal_examples(6)
    texts = generate_completions(model, tokenizer, examples, max_new_tokens=4)
    known = [
        example | ({"answer": final_answer(text)} if index < 2 else {"answer": "never"})
        for index, (example, text) in enumerate(zip(examples, texts, strict=True))
    ]
    assert final_answer(texts[0])
    found = summarize_answers(texts, answers_match(texts, known))
    assert found == {
        "exact_match": pytest.approx(2 / 6),
        "answered": pytest.approx(sum(map(bool, texts)) / 6),
    }


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("so 6 times 7\n 42 \n\n", "42"),
        ("first 6\n#### 42\nand on\n#### 43", "42"),
        ("so\nThe answer is: 6 or\nThe answer is: 42\n", "42"),
        ("#### ", ""),
        ("", ""),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "example", "right"),
    [
        (" 42\n", {"completion": "42"}, True),
        ("421", {"completion": "42"}, False),
        ("because\n#### 42", {"completion": "as\n#### 42"}, True),
        ("because\n#### 42", {"completion": "as\n#### 41", "answer": "42"}, True),
        ("1 2\n3 4", {"completion": "1 2\n3 4", "answer": "1 2\n3 4"}, True),
        ("9 9\n3 4", {"completion": "1 2\n3 4", "answer": "1 2\n3 4"}, False),
        ("", {"completion": "42"}, False),
        ("$1,234.", {"completion": "1234"}, True),
        ("-7.0", {"completion": "-7"}, True),
        ("7", {"completion": "-7"}, False),
        ("1,2", {"completion": "x = 1,2"}, False),
        ("The answer is: 42", {"completion": "as\n#### 42", "answer": "as\n#### 42"}, True),
    ],
)
def test_answers_match(text, example, right):
    assert answers_match([text], [example]).tolist() == [right]


TEXTS = [" ".join(WORDS[:length]) for length in (3, 7, 5, 2)]


def test_forgetting_is_the_mean_loss_over_all_tokens():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    rows = encode([{"prompt": "", "completion": t} for t in TEXTS], tokenizer, kind="causal", max_length=5)
    expected, _ = naive(model, rows, "causal")
    for batch_size in (1, 4):
        loss = forgetting_loss(model, tokenizer, TEXTS, max_length=5, batch_size=batch_size)
        assert loss == pytest.approx(expected, rel=1e-6)


def test_classifiers_have_no_forgetting():
    assert forgetting_loss(tiny_bert(), tiny_tokenizer(), TEXTS) is None


def test_unrelated_texts_are_not_the_tasks():
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
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(InputError, match="must each have a prompt"):
        generate_completions(model, tokenizer, [{"prompt": "", "completion": "sun"}])
    with pytest.raises(InputError, match="dataset must hold at least one example"):
        evaluate(model, [], collator(tokenizer, "causal"), kind="causal", batch_size=2)
    with pytest.raises(InputError, match="batch_size must be"):
        generate_completions(model, tokenizer, causal_examples(), batch_size=0)
    single = encode([{"prompt": "", "completion": ""}], tokenizer, kind="causal", max_length=8)
    with pytest.raises(InputError, match="at least one token to predict"):
        evaluate(model, single, collator(tokenizer, "causal"), kind="causal", batch_size=2)
    with pytest.raises(InputError, match="count must be"):
        unrelated_texts("digits", 0)
    with pytest.raises(InputError, match="at least one text"):
        forgetting_loss(model, tokenizer, [])
