"""Generated answers: with the cache, in any batch, up to a stop string, and turn after turn."""

import pytest
import torch

from tangora.training.answers import answer_conversations, generate_completions
from tangora.training.data.chat_templates import use_chat_template
from tests.models import randomize, tiny_llama, tiny_tokenizer, with_lora
from tests.training.tiny import causal_examples

CONVERSATIONS = [["red cat", "blue dog"], ["sun"], ["green sea 1 2 3", "dog", "cat"]]


def adapted():
    return randomize(with_lora(tiny_llama()), seed=0)


def test_the_cache_is_used_whatever_the_training_was():
    model = adapted().train()
    model.base_model.model.gradient_checkpointing_enable()
    model.config.use_cache = model.base_model.model.generation_config.use_cache = (
        False  # as the Trainer leaves them
    )
    lengths = []
    llama = model.base_model.model.model
    llama.register_forward_pre_hook(
        lambda _, __, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    generate_completions(model, tiny_tokenizer(), causal_examples(3), max_new_tokens=5)
    assert lengths[0] > 1
    assert set(lengths[1:]) == {1}


@pytest.mark.parametrize("stop", [["red"], ["red", "blue dog"], ["never"]])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_end_before_the_first_stop_string(stop, batch_size):
    model, tokenizer, examples = adapted(), tiny_tokenizer(), causal_examples(12)
    whole = generate_completions(model, tokenizer, examples, max_new_tokens=24)
    expected = [min((text.split(each)[0] for each in stop), key=len) for text in whole]
    if stop != ["never"]:
        assert expected != whole
    assert expected == generate_completions(
        model, tokenizer, examples, max_new_tokens=24, stop=stop, batch_size=batch_size
    )


def test_generation_ends_when_all_have_met_a_stop_string():
    model, tokenizer, examples = adapted(), tiny_tokenizer(), causal_examples(1)
    (text,) = generate_completions(model, tokenizer, examples, max_new_tokens=24)
    passes = []
    model.base_model.model.model.register_forward_hook(lambda *_: passes.append(1))
    generate_completions(model, tokenizer, examples, max_new_tokens=24, stop=[text.split()[2]])
    assert len(passes) <= 3


@pytest.mark.parametrize("template", [None, "alpaca"])
def test_each_turn_is_answered_after_the_answers_before(template):
    model, tokenizer = adapted(), tiny_tokenizer()
    use_chat_template(tokenizer, template)
    options = {"max_new_tokens": 6, "chat_template": template is not None}
    answers = answer_conversations(model, tokenizer, CONVERSATIONS, batch_size=4, **options)
    assert [len(each) for each in answers] == [2, 1, 3]
    for turns, given in zip(CONVERSATIONS, answers, strict=True):
        for turn, answer in enumerate(given):
            said = [text for pair in zip(turns, given[:turn], strict=False) for text in pair] + [turns[turn]]
            if template is None:
                text = "\n".join(said) + "\n"
            else:
                messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(said)]
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                more = model.generate(input_ids=tokens, max_new_tokens=6, do_sample=False)
            assert answer == tokenizer.decode(more[0, tokens.shape[1] :], skip_special_tokens=True)
