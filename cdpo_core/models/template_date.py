"""The date that a chat template writes: one for a policy's whole life, not the day on which a stage happens to run."""

from __future__ import annotations

import json
from datetime import date
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FROZEN = "{#- the date of every prompt: {date} #}\n"
DIRECTIVES = "aAbBcdDeFgGhHIjmMnprRSTuUVwWxXyYZ%"
# The environment of chat templates drops the first newline after a block.
_MACRO_END = "{%- endmacro %}\n"


def freeze_date(tokenizer: PreTrainedTokenizerBase, day: str) -> bool:
    """Make the chat template write one date on every day: `strftime_now` becomes a macro in front of it.

    Saved with the tokenizer, it also holds for whoever loads the model with transformers. Templates that never ask
    for the time stay as they are.

    Args:
        tokenizer: is changed.
        day: YYYY-MM-DD; "" keeps the date of a template that was frozen before.

    Returns:
        Whether the template writes dates.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _frozen(text, day) for name, text in template.items()}
        return tokenizer.chat_template != template or any("strftime_now" in text for text in template.values())
    if not template or "strftime_now" not in template:
        return False
    tokenizer.chat_template = _frozen(template, day)
    return True


def _frozen(template: str, day: str) -> str:
    if "strftime_now" not in template or not day:
        return template
    before, _, after = FROZEN.partition("{date}")
    if template.startswith(before):
        template = template.split(_MACRO_END, 1)[1]
    when = date.fromisoformat(day)
    filters = "".join(
        f"|replace({json.dumps(spelling)}, {json.dumps(when.strftime(spelling), ensure_ascii=False)})"
        for letter in DIRECTIVES
        for spelling in (f"%-{letter}", f"%{letter}")
    )
    return f"{before}{day}{after}{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{_MACRO_END}{template}"
