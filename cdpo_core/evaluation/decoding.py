"""How responses are drawn: part of what a certificate speaks of, since another temperature is another policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GENERATION = "generation_config.json"
# In an exported folder: how the policy was certified to be decoded.
DECODING = "decoding.json"
# What transformers' generate() may read of a model's file without changing what is drawn; all else it would apply.
NAMES_OF_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Decoding:
    """The settings of a draw.

    Attributes:
        temperature: of the distribution, > 0; no other truncation (top-k, top-p) is ever made.
        max_new_tokens: longest response in tokens, its end included; it is cut there.
        max_prompt_tokens: prompts are cut to this length from the left.
        template: text around the prompt, or `chat` for the tokenizer's own.
        ends: the tokens that end a response.
        template_date: the day that a chat template writes which asks for the date; "" where none does.
    """

    temperature: float
    max_new_tokens: int
    max_prompt_tokens: int
    template: str
    ends: tuple[int, ...] = ()
    template_date: str = ""

    def record(self) -> dict[str, Any]:
        """As certificates and results hold it."""
        return {**asdict(self), "ends": list(self.ends)}


def decoding_of(folder: Path, temperature: float, max_new_tokens: int, *, trust_remote_code: bool = False) -> Decoding:
    """The settings that responses of the policy in a folder of this project's are drawn with.

    Args:
        folder: with policy.json and the tokenizer.
        temperature, max_new_tokens: of the draw.
        trust_remote_code: whether a tokenizer's own code may run.
    """
    settings = json.loads((folder / "policy.json").read_text())
    ends = settings.get("ends")
    if not ends:
        from transformers import AutoTokenizer

        ends = [int(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code).eos_token_id)]
    return Decoding(
        temperature,
        max_new_tokens,
        settings["max_prompt_tokens"],
        settings["template"],
        tuple(ends),
        settings.get("template_date", ""),
    )


def decoding_words(record: Mapping[str, Any]) -> str:
    """A decoding's record in one line: `temperature 1, at most 32 tokens`."""
    ends = ", ".join(map(str, record["ends"]))
    said = f"temperature {record['temperature']:g}, at most {record['max_new_tokens']} tokens"
    said += f", prompts cut to {record['max_prompt_tokens']}, template {record['template']!r}"
    said += f" with date {record['template_date']}" if record.get("template_date") else ""
    return said + (f", ended by token {ends}" if ends else "")


def departures(record: Mapping[str, Any], used: Mapping[str, Any]) -> list[str]:
    """What of the settings in use is not as certified, in words.

    Args:
        record: the certified decoding.
        used: settings in use by their names in a decoding; those that are not named are as certified.
    """
    return [
        f"{name} {value} instead of {record[name]}"
        for name, value in used.items()
        if name in record and value != record[name]
    ]


def exported_decoding(folder: Path) -> dict[str, Any] | None:
    """The decoding that an exported policy's folder carries (`DECODING`), or None."""
    path = folder / DECODING
    return json.loads(path.read_text()) if path.is_file() else None


def generation_settings(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """A generation_config that makes transformers' generate() draw from the certified distribution.

    What a base model brought along (top-p, penalties, forced or forbidden tokens) is left out, and top-k is switched
    off by 0: generate() takes 50 where it is not said.

    Args:
        folder: the policy's, whose generation_config names its tokens.
        record: the certified decoding.
    """
    path = folder / GENERATION
    saved = json.loads(path.read_text()) if path.is_file() else {}
    tokens = {name: saved[name] for name in NAMES_OF_TOKENS if saved.get(name) is not None}
    if record["ends"]:
        tokens["eos_token_id"] = record["ends"][0] if len(record["ends"]) == 1 else list(record["ends"])
    return tokens | {
        "do_sample": True,
        "temperature": record["temperature"],
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": record["max_new_tokens"],
    }
