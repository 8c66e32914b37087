"""Token numbers, masks, truncation and padding."""

import pytest
import torch
from torch.utils.data import DataLoader

from tangora._checks import InputError
from tangora.training.data import collator, encode
from tests.training.tiny import causal_examples, labelled_examples, tiny_tokenizer


def words(tokenizer, tokens):
    return tokenizer.convert_ids_to_tokens(tokens)


def test_causal_format():
    tokenizer = tiny_tokenizer()
    row = encode([{"prompt": "1 + 1 =", "completion": "2"}], tokenizer, kind="causal", max_length=32)[0]
    assert words(tokenizer, row["input_ids"]) == ["1", "+", "1", "=", "\n", "2", "</s>"]
    assert row["labels"] == [-100] * 5 + row["input_ids"][5:]
    assert row["attention_mask"] == [1] * 7


def test_plain_text_has_no_prompt_and_no_newline():
    tokenizer = tiny_tokenizer()
    row = encode([{"prompt": "", "completion": "red sun"}], tokenizer, kind="causal", max_length=32)[0]
    assert words(tokenizer, row["input_ids"]) == ["red", "sun", "</s>"]
    assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(5, "= \n 2 3 </s>"), (4, "\n 2 3 </s>"), (3, "2 3 </s>"), (2, "2 3")],
)
def test_prompt_is_cut_from_its_left_then_the_completion_from_its_right(max_length, expected):
    tokenizer = tiny_tokenizer()
    example = {"prompt": "1 + 2 2 =", "completion": "23"}
    row = encode([example], tokenizer, kind="causal", max_length=max_length)[0]
    assert words(tokenizer, row["input_ids"]) == expected.split(" ")
    assert len(row["labels"]) == len(row["attention_mask"]) == max_length


def test_beginning_token_is_kept_where_the_tokenizer_has_one():
    tokenizer = tiny_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    row = encode([{"prompt": "1 =", "completion": "1"}], tokenizer, kind="causal", max_length=32)[0]
    assert words(tokenizer, row["input_ids"]) == ["<s>", "1", "=", "\n", "1", "</s>"]


def test_classification_is_truncated():
    tokenizer = tiny_tokenizer()
    dataset = encode(labelled_examples(), tokenizer, kind="classification", max_length=3)
    assert max(len(row["input_ids"]) for row in dataset) == 3
    assert [row["labels"] for row in dataset] == [example["label"] for example in labelled_examples()]


def test_collator_pads_each_batch_to_its_longest(caplog):
    tokenizer = tiny_tokenizer()
    dataset = encode(causal_examples(), tokenizer, kind="causal", max_length=32)
    batch = collator(tokenizer, "causal")([dataset[0], dataset[4]])
    lengths = [len(dataset[0]["input_ids"]), len(dataset[4]["input_ids"])]
    assert lengths[0] < lengths[1]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, lengths[1])
    padding = slice(lengths[0], None)
    assert (batch["input_ids"][0, padding] == tokenizer.pad_token_id).all()
    assert (batch["labels"][0, padding] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert not caplog.records


def test_works_in_a_data_loader():
    tokenizer = tiny_tokenizer()
    dataset = encode(labelled_examples(), tokenizer, kind="classification", max_length=8)
    batches = list(DataLoader(dataset, batch_size=4, collate_fn=collator(tokenizer, "classification")))
    labels = torch.cat([batch["labels"] for batch in batches]).tolist()
    assert labels == [example["label"] for example in labelled_examples()]


@pytest.mark.messages
def test_messages():
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match="at least one example"):
        encode([], tokenizer, kind="causal", max_length=8)
    with pytest.raises(InputError, match=r"max_length must be a number in \[2"):
        encode(causal_examples(), tokenizer, kind="causal", max_length=1)
    with pytest.raises(InputError, match="kind must be one of"):
        collator(tokenizer, "casual")
