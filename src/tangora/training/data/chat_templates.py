"""Chat templates for tokenizers of base models, which have none."""

from collections.abc import Mapping
from typing import Any

from tangora._checks import check_choice

# what Stanford's Alpaca writes without an input, and LoRA-GA's code for WizardLM; further turns follow
_ALPACA = r"""
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] + '\n\n' }}
    {%- elif message['role'] == 'user' %}
        {%- if loop.first %}
            {{- 'Below is an instruction that describes a task. ' }}
            {{- 'Write a response that appropriately completes the request.\n\n' }}
        {%- elif loop.previtem['role'] == 'assistant' %}
            {{- '\n\n' }}
        {%- endif %}
        {{- '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

_TEMPLATES: Mapping[str, str] = {"alpaca": _ALPACA}


def use_chat_template(tokenizer: Any, chosen: bool | str | None) -> None:
    """Give a tokenizer the chat template of that name; nothing changes where its own one is wanted, or none."""
    if isinstance(chosen, str):
        check_choice("chat_template", chosen, tuple(_TEMPLATES))
        tokenizer.chat_template = _TEMPLATES[chosen]
