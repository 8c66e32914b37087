"""Token numbers, masks, truncation and padding, in the plain format and by chat templates."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader

from tangora._checks import InputError
from tangora.training.answers import generate_completions
from tangora.training.data import collator, encode
from tangora.training.data.encoding import encode_prompts, encode_turns
from tests.models import tiny_llama, tiny_tokenizer
from tests.training.tiny import causal_examples, labelled_examples

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


LONG = conversation("s cat", "u 1", "a 2", "u 3", "a 4 5")
SUM = {"prompt": "1 + 1 =", "completion": "2"}


def row(example, tokenizer, max_length=64, *, chat=True):
    return encode([example], tokenizer, kind="causal", max_length=max_length, chat_template=chat)[0]


def plain(prompt, completion, max_length=32):
    return row({"prompt": prompt, "completion": completion}, tiny_tokenizer(), max_length, chat=False)


def written(tokens, tokenizer=None):
    return " ".join((tokenizer or tiny_tokenizer()).convert_ids_to_tokens(tokens))


def trained(encoding):
    return written([label for label in encoding["labels"] if label != -100])


def test_plain_format():
    encoding = plain("1 + 1 =", "2")
    assert written(encoding["input_ids"]) == "1 + 1 = \n 2 </s>"
    assert encoding["labels"] == [-100] * 5 + encoding["input_ids"][5:]
    assert encoding["attention_mask"] == [1] * 7
    text = plain("", "red sun")  # no prompt and no newline
    assert written(text["input_ids"]) == written(text["labels"]) == "red sun </s>"
    assert written(plain("cat\n1", "2")["input_ids"]) == "cat \n 1 \n 2 </s>"


@pytest.mark.parametrize(
    ("max_length", "expected"), [(5, "= \n 2 3 </s>"), (4, "\n 2 3 </s>"), (3, "2 3 </s>"), (2, "2 3")]
)
def test_prompt_is_cut_from_its_left_then_the_completion_from_its_right(max_length, expected):
    encoding = plain("1 + 2 2 =", "23", max_length)
    assert written(encoding["input_ids"]) == expected
    assert len(encoding["labels"]) == len(encoding["attention_mask"]) == max_length


def test_beginning_token_is_kept_where_the_tokenizer_has_one():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    encoding = row(SUM, tokenizer, chat=False)
    assert written(encoding["input_ids"], tokenizer) == "<s> 1 + 1 = \n 2 </s>"


def test_classification_is_truncated_and_works_in_a_data_loader():
    tokenizer = tiny_tokenizer()
    dataset = encode(labelled_examples(), tokenizer, kind="classification", max_length=3)
    assert max(len(encoding["input_ids"]) for encoding in dataset) == 3
    batches = DataLoader(dataset, batch_size=4, collate_fn=collator(tokenizer, "classification"))
    labels = torch.cat([batch["labels"] for batch in batches]).tolist()
    assert labels == [example["label"] for example in labelled_examples()]


def test_collator_pads_each_batch_to_its_longest(caplog):
    tokenizer = tiny_tokenizer()
    dataset = encode(causal_examples(), tokenizer, kind="causal", max_length=32)
    batch = collator(tokenizer, "causal")([dataset[0], dataset[4]])
    lengths = [len(dataset[0]["input_ids"]), len(dataset[4]["input_ids"])]
    assert lengths[0] < lengths[1]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, lengths[1])
    assert (batch["input_ids"][0, lengths[0] :] == tokenizer.pad_token_id).all()
    assert (batch["labels"][0, lengths[0] :] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert not caplog.records


def test_a_prompt_and_its_completion_are_two_turns():
    encoding = row(SUM, chat_tokenizer())
    assert written(encoding["input_ids"]) == "<s> red 1 + 1 = </s> green 2 </s>"
    assert trained(encoding) == "2 </s>"


def test_the_loss_counts_every_turn_of_the_assistant():
    tokenizer = chat_tokenizer()
    encoding = row(LONG, tokenizer)
    tokens = encoding["input_ids"]
    assert written(tokens) == "<s> blue cat </s> red 1 </s> green 2 </s> red 3 </s> green 4 5 </s>"
    assert trained(encoding) == "2 </s> 4 5 </s>"
    assert tokens == tokenizer.apply_chat_template(LONG["messages"], return_dict=True)["input_ids"]


def test_turns_that_the_template_writes_otherwise_later_are_not_trained():
    encoding = row(conversation("u 1", "a 2", "u 3", "a 4"), chat_tokenizer(FORGETFUL))
    assert written(encoding["input_ids"]).endswith("green 4 </s>")
    assert trained(encoding) == "4 </s>"


def test_long_conversations_lose_their_beginning():
    encoding = row(LONG, chat_tokenizer(), max_length=6)
    assert written(encoding["input_ids"]) == "3 </s> green 4 5 </s>"
    assert encoding["labels"][:3] == [-100] * 3


@pytest.mark.parametrize("example", [SUM, LONG])
def test_prompts_are_all_before_the_last_answer(example):
    (pieces,) = encode_turns([example], chat_tokenizer(), chat_template=True)
    (asked,) = encode_prompts([example], chat_tokenizer(), chat_template=True)
    assert asked == [token for piece in pieces[:-1] for token in piece.tokens]


def test_answers_are_generated_from_the_template():
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_llama()

        def generate(self, input_ids, **options):
            seen.extend(input_ids.tolist())
            return self.inner.generate(input_ids, **options)

    examples = [{"prompt": f"{number} + 1 =", "completion": "2"} for number in range(3)]
    assert len(generate_completions(Model(), chat_tokenizer(), examples, chat_template=True)) == 3
    assert set(map(written, seen)) == {f"<s> red {number} + 1 = </s> green" for number in range(3)}


TWO_TURNS = conversation("u 1", "a 2")
OTHER_PROMPT = TEMPLATE.replace("green {% endif %}", "green sun{% endif %}")


@pytest.mark.messages
@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (None, TWO_TURNS, "needs a tokenizer with a chat template"),
        (TEMPLATE, {"prompt": "", "completion": "news"}, "plain text has none"),
        ("{{ raise_exception('no system') }}", conversation("s 1", "u 1", "a 2"), "refuses a conversation"),
        (OTHER_PROMPT, TWO_TURNS, "an answer does not follow its generation prompt"),
    ],
)
def test_templates_that_cannot_be_used(template, example, message):
    with pytest.raises(InputError, match=message) as caught:
        row(example, chat_tokenizer(template))
    assert "\n" not in str(caught.value)


@pytest.mark.messages
def test_messages():
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match="at least one example"):
        encode([], tokenizer, kind="causal", max_length=8)
    with pytest.raises(InputError, match=r"max_length must be a number in \[2"):
        encode(causal_examples(), tokenizer, kind="causal", max_length=1)
    with pytest.raises(InputError, match="kind must be one of"):
        collator(tokenizer, "casual")
