"""Tiny models, a tiny tokenizer and tiny tasks, made on the fly: no file, no hub, milliseconds."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
WORDS = ["red", "green", "blue", "cat", "dog", "sun", "sea", "####", "+", "-", "=", "\n", *"0123456789"]


def tiny_tokenizer(*, pad=True):
    """One token per word or digit; the newline is a word."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        **({"pad_token": "<pad>"} if pad else {}),
    )


def tiny_llama(seed=0, **overrides):
    """A causal model with random weights, large enough that its answers differ."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "attention_dropout": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()


def tiny_bert(seed=0, num_labels=3, **overrides):
    """A classifier with random weights and dropout."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "num_labels": num_labels,
    }
    return BertForSequenceClassification(BertConfig(**settings | overrides)).eval()


def labelled_examples(count=11):
    """Texts of different lengths with one of three labels."""
    words = WORDS[:7]
    return [
        {"text": " ".join(words[(index + step) % 7] for step in range(1 + index % 5)), "label": index % 3}
        for index in range(count)
    ]


def causal_examples(count=7):
    """Sums of different lengths."""
    return [
        {"prompt": f"{index} + {index * index} =", "completion": f"{index + index * index}"}
        for index in range(count)
    ]


def rng_state_unchanged(action):
    """Run an action and say whether torch's random state is as before."""
    before = torch.get_rng_state()
    action()
    return torch.equal(before, torch.get_rng_state())


def labelled_rows(count=20):
    """Rows of different texts with two labels."""
    return [{"text": f"text {index}", "label": ["yes", "no"][index % 2]} for index in range(count)]


def reviews(count=200):
    """Cells of different texts with two labels."""
    return [[f"film {index}", ["bad", "good"][index % 2]] for index in range(count)]


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def write_csv(path, header, lines):
    path.write_text("".join(",".join(line) + "\n" for line in [header, *lines]))
    return str(path)
