"""Whether data fits a model: cut texts are counted, and what leaves nothing to learn from is refused."""

import pytest

from tangora._checks import InputError
from tangora.training.data import Task
from tangora.training.data.fit import check_fit
from tests.models import WORDS, tiny_tokenizer

VOCABULARY = 4 + len(WORDS)


def task(kind, examples):
    return Task("own", kind, tuple(examples), (), ())


def labelled(texts):
    return task("classification", [{"text": text, "label": index % 2} for index, text in enumerate(texts)])


def pairs(prompts, completion="cat"):
    return task("causal", [{"prompt": prompt, "completion": completion} for prompt in prompts])


def notes(data, max_length, **options):
    return check_fit(data, tiny_tokenizer(), max_length=max_length, vocabulary=VOCABULARY, **options)


def test_what_fits_is_not_mentioned():
    assert notes(labelled(["1", "1 2", "1 2 3"]), 3) == []
    assert notes(pairs(["1", "2"]), 4) == []  # prompt, newline, completion, eos


def test_cut_texts_are_counted_in_every_split():
    first, second, third = (
        [{"text": f"{split} {number}" + " 7" * number, "label": number % 2} for number in range(6)]
        for split in ("red", "green", "blue")
    )
    data = Task("own", "classification", tuple(first), tuple(second), tuple(third[:3]))
    (told,) = notes(data, 5)
    assert "2 of 6 training and 2 of 6 validation examples are cut to 5 tokens (longest 7); the end" in told
    data = Task("own", "classification", tuple(first), tuple(second), tuple(third))
    (told,) = notes(data, 5)
    assert "2 of 6 training, 2 of 6 validation and 2 of 6 test examples" in told


def test_prompts_lose_their_beginning_before_completions_lose_their_end():
    (told,) = notes(pairs([f"1 2 3 {number}" for number in range(8)]), 5)
    assert "8 of 8 training examples are cut to 5 tokens (longest 7)" in told
    assert "the beginning of the prompt is lost" in told
    (told,) = notes(pairs([f"1 2 3 {number}" for number in range(8)], "1 2"), 5)
    assert "of the prompt is lost" in told
    answers = [{"prompt": f"{n}", "completion": "1 2 3 4 5 6" if n else "1"} for n in range(8)]
    (told,) = notes(task("causal", [{"prompt": "7 7", "completion": "1 2"}, *answers[:2]]), 5)
    assert "the beginning of the prompt, and of 1 the end of the completion, is lost" in told
    (told,) = notes(task("causal", [{"prompt": "", "completion": f"{n} 1 2 3 4"} for n in range(8)]), 5)
    assert "the end is lost" in told


@pytest.mark.messages
def test_cutting_that_leaves_the_same_of_all_is_refused():
    filler = " ".join(["red"] * 20)
    with pytest.raises(InputError, match=r"10 of 10 training .*longest 21\), so that only 1 different"):
        notes(labelled([f"{filler} {number}" for number in range(10)]), 8)
    with pytest.raises(InputError, match="only 1 different"):
        notes(pairs([f"{number} {filler}" for number in range(10)]), 8)
    with pytest.raises(InputError, match="only 1 different"):  # of the prompts nothing is left
        notes(pairs([f"{number} ?" for number in range(10)], filler), 8)
    assert notes(labelled([f"{number} {filler}" for number in range(10)]), 8)


@pytest.mark.messages
def test_a_tokenizer_that_does_not_know_the_words_is_refused():
    with pytest.raises(InputError, match="the words of the data: 100% of the training tokens"):
        notes(labelled([f"unheard of{number}" for number in "abcdef"]), 8)
    with pytest.raises(InputError, match=r"does not belong to the model: .* token \d+, .* 5 tokens"):
        check_fit(labelled(["1 2", "3"]), tiny_tokenizer(), max_length=8, vocabulary=5)
