"""Token numbers, masks, truncation and padding, in the plain format and by chat templates."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from tangora._checks import InputError
from tangora.training.answers import generate_completions
from tangora.training.data import collator, encode
from tangora.training.data.encoding import encode_prompts, encode_turns
from tests.training.tiny import causal_examples, labelled_examples, tiny_llama, tiny_tokenizer

# turns begin with a colour and end with </s>; an answer begins after "green"
TEMPLATE = (
    "<s>{% for message in messages %}"
    "{{ {'system': 'blue', 'user': 'red', 'assistant': 'green'}[message.role] }} {{ message.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}green {% endif %}"
)
FORGETFUL = TEMPLATE.replace(
    "{{ message.content }}",
    "{{ 'sea' if message.role == 'assistant' and not loop.last else message.content }}",
)


def chat_tokenizer(template=TEMPLATE):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns):
    roles = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]
    return {"prompt": "plain", "completion": turns[-1][2:], "messages": messages}


def written(tokenizer, tokens):
    return " ".join(tokenizer.convert_ids_to_tokens(tokens))


def row(example, tokenizer, max_length=64):
    return encode([example], tokenizer, kind="causal", max_length=max_length, chat_template=True)[0]


def test_a_prompt_and_its_completion_are_two_turns():
    tokenizer = chat_tokenizer()
    encoding = row({"prompt": "1 + 1 =", "completion": "2"}, tokenizer)
    assert written(tokenizer, encoding["input_ids"]) == "<s> red 1 + 1 = </s> green 2 </s>"
    assert [label for label in encoding["labels"] if label != -100] == encoding["input_ids"][-2:]


def test_the_loss_counts_every_turn_of_the_assistant():
    tokenizer = chat_tokenizer()
    encoding = row(conversation("s cat", "u 1", "a 2", "u 3", "a 4 5"), tokenizer)
    tokens = encoding["input_ids"]
    assert written(tokenizer, tokens) == "<s> blue cat </s> red 1 </s> green 2 </s> red 3 </s> green 4 5 </s>"
    trained = [token for token, label in zip(tokens, encoding["labels"], strict=True) if label == token]
    assert written(tokenizer, trained) == "2 </s> 4 5 </s>"
    example = conversation("s cat", "u 1", "a 2", "u 3", "a 4 5")
    assert tokens == tokenizer.apply_chat_template(example["messages"], return_dict=True)["input_ids"]


def test_turns_that_the_template_writes_otherwise_later_are_not_trained():
    tokenizer = chat_tokenizer(FORGETFUL)
    encoding = row(conversation("u 1", "a 2", "u 3", "a 4"), tokenizer)
    assert written(tokenizer, encoding["input_ids"]).endswith("green 4 </s>")
    assert written(tokenizer, [t for t in encoding["labels"] if t != -100]) == "4 </s>"


def test_long_conversations_lose_their_beginning():
    tokenizer = chat_tokenizer()
    example = conversation("s cat", "u 1", "a 2", "u 3", "a 4 5")
    encoding = row(example, tokenizer, max_length=6)
    assert written(tokenizer, encoding["input_ids"]) == "3 </s> green 4 5 </s>"
    assert encoding["labels"][:3] == [-100] * 3


def test_what_is_asked_is_what_stands_before_the_last_answer():
    tokenizer = chat_tokenizer()
    for example in (
        {"prompt": "1 + 1 =", "completion": "2"},
        conversation("s cat", "u 1", "a 2", "u 3", "a 4"),
    ):
        (pieces,) = encode_turns([example], tokenizer, chat_template=True)
        (asked,) = encode_prompts([example], tokenizer, chat_template=True)
        assert asked == [token for piece in pieces[:-1] for token in piece.tokens]


def test_answers_are_generated_from_the_template():
    tokenizer, seen = chat_tokenizer(), []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()

        def generate(self, input_ids, **options):
            seen.extend(input_ids.tolist())
            return self.inner.generate(input_ids, **options)

    examples = [{"prompt": f"{number} + 1 =", "completion": "2"} for number in range(3)]
    texts = generate_completions(Model(), tokenizer, examples, chat_template=True)
    assert len(texts) == 3
    assert {written(tokenizer, tokens) for tokens in seen} == {
        f"<s> red {number} + 1 = </s> green" for number in range(3)
    }


def test_plain_conversations_are_joined_by_newlines():
    tokenizer = tiny_tokenizer()
    example = {"prompt": "cat\n1", "completion": "2", "messages": []}
    encoding = encode([example], tokenizer, kind="causal", max_length=32)[0]
    assert written(tokenizer, encoding["input_ids"]) == "cat \n 1 \n 2 </s>"


@pytest.mark.messages
@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (
            None,
            conversation("u 1", "a 2"),
            "needs a tokenizer with a chat template, and the model's has none",
        ),
        (TEMPLATE, {"prompt": "", "completion": "news"}, "needs prompts or messages; plain text has none"),
        (
            "{{ raise_exception('no system') }}",
            conversation("s 1", "u 1", "a 2"),
            "refuses a conversation of",
        ),
        (
            TEMPLATE.replace("green {% endif %}", "green sun{% endif %}"),
            conversation("u 1", "a 2"),
            "an answer does not follow its generation prompt",
        ),
    ],
)
def test_templates_that_cannot_be_used(template, example, message):
    with pytest.raises(InputError, match=message) as caught:
        row(example, chat_tokenizer(template))
    assert "\n" not in str(caught.value)


def test_causal_format():
    tokenizer = tiny_tokenizer()
    encoding = encode([{"prompt": "1 + 1 =", "completion": "2"}], tokenizer, kind="causal", max_length=32)[0]
    assert tokenizer.convert_ids_to_tokens(encoding["input_ids"]) == ["1", "+", "1", "=", "\n", "2", "</s>"]
    assert encoding["labels"] == [-100] * 5 + encoding["input_ids"][5:]
    assert encoding["attention_mask"] == [1] * 7


def test_plain_text_has_no_prompt_and_no_newline():
    tokenizer = tiny_tokenizer()
    encoding = encode([{"prompt": "", "completion": "red sun"}], tokenizer, kind="causal", max_length=32)[0]
    assert tokenizer.convert_ids_to_tokens(encoding["input_ids"]) == ["red", "sun", "</s>"]
    assert encoding["labels"] == encoding["input_ids"]


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(5, "= \n 2 3 </s>"), (4, "\n 2 3 </s>"), (3, "2 3 </s>"), (2, "2 3")],
)
def test_prompt_is_cut_from_its_left_then_the_completion_from_its_right(max_length, expected):
    tokenizer = tiny_tokenizer()
    example = {"prompt": "1 + 2 2 =", "completion": "23"}
    encoding = encode([example], tokenizer, kind="causal", max_length=max_length)[0]
    assert tokenizer.convert_ids_to_tokens(encoding["input_ids"]) == expected.split(" ")
    assert len(encoding["labels"]) == len(encoding["attention_mask"]) == max_length


def test_beginning_token_is_kept_where_the_tokenizer_has_one():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    encoding = encode([{"prompt": "1 =", "completion": "1"}], tokenizer, kind="causal", max_length=32)[0]
    assert tokenizer.convert_ids_to_tokens(encoding["input_ids"]) == ["<s>", "1", "=", "\n", "1", "</s>"]


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
