"""Tiny tokenizers in the layouts that users bring, and random models that read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

THINGS = ("bread", "soup", "tents", "bikes", "chess")
TEXTS = [f"How do I {verb} {thing}?\nPlease, be brief." for verb in ("bake", "store", "clean") for thing in THINGS]

_TURNS = "{% for m in messages %}"
CHATML = _TURNS + (
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + CHATML[:-11]
    + "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}" + _TURNS + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + "
    "'<|eot_id|>' }}"
    + _TURNS
    + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
    "'<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + _TURNS + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = _TURNS + (
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ZEPHYR = _TURNS + (
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_SAID = _TURNS + "{{ m['role'] + ': ' + m['content'] + '\n"
TEXTUAL = _SAID + "### End\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
ENDLESS = _SAID + "' }}{% endfor %}{{ 'assistant: ' }}"


class Shape(NamedTuple):
    """A layout: how its tokenizer is made, and the ends that its generation config declares."""

    special: tuple[str, ...]
    bos: str = ""
    eos: str = ""
    chat: str = ""
    own_bos: bool = False
    ends: tuple[str, ...] = ()
    pieces: str = "bytes"
    words: tuple[str, ...] = ()
    """Tokens that are added but not special."""


SHAPES: dict[str, Shape] = {
    "llama3": Shape(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>", "<|eot_id|>", LLAMA3, True, ("<|end_of_text|>", "<|eot_id|>"),
    ),
    "chatml": Shape(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "", "<|im_end|>", CHATML, False, ("<|im_end|>",)),
    "qwen base": Shape(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "", "<|endoftext|>", QWEN, False,
        ("<|endoftext|>",), words=("<think>", "</think>"),
    ),
    "gemma": Shape(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>", "<eos>", GEMMA, True, ("<eos>", "<end_of_turn>"), "metaspace",
    ),
    "gpt2": Shape(("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    "opt": Shape(("<s>", "<pad>", "</s>"), "</s>", "</s>", "", True),
    "mistral": Shape(("<unk>", "<s>", "</s>"), "<s>", "</s>", MISTRAL, True, ("</s>",), "metaspace"),
    "mistral, unigram": Shape(("<unk>", "<s>", "</s>"), "<s>", "</s>", MISTRAL, True, ("</s>",), "unigram"),
    "mistral, first": Shape(("<unk>", "<s>", "</s>"), "<s>", "</s>", MISTRAL, True, ("</s>",), "first"),
    "phi3": Shape(
        ("<s>", "<|endoftext|>"), "<s>", "<|endoftext|>", PHI3, False, ("<|endoftext|>", "<|end|>"), "metaspace",
        ("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "zephyr": Shape(("<s>", "</s>"), "<s>", "</s>", ZEPHYR, True, ("</s>",)),
    "no end in the template": Shape(("<s>", "</s>"), "", "</s>", ENDLESS),
}  # fmt: skip


@cache
def _backend(name: str) -> str:
    shape = SHAPES[name]
    tokenizer = Tokenizer(models.Unigram() if shape.pieces == "unigram" else models.BPE(unk_token=None))
    trainer: Any
    special = list(shape.special)
    if shape.pieces == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        scheme = "first" if shape.pieces == "first" else "always"
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=shape.pieces != "first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        if shape.pieces == "unigram":
            trainer = trainers.UnigramTrainer(
                vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
            )
        else:
            trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "<>|_/[]:.,?QAINST abcdefghijklmnopqrstuvwxyz" * 3], trainer)
    if shape.own_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{shape.bos} $A",
            pair=f"{shape.bos} $A {shape.bos} $B",
            special_tokens=[(shape.bos, tokenizer.token_to_id(shape.bos))],
        )
    tokenizer.add_tokens([AddedToken(word, normalized=False, rstrip=word == "<|user|>") for word in shape.words])
    return tokenizer.to_str()


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of SHAPES."""
    shape = SHAPES[name]
    named = {key: value for key, value in (("bos_token", shape.bos), ("eos_token", shape.eos)) if value}
    if "<unk>" in shape.special:
        named["unk_token"] = "<unk>"
    others = [word for word in shape.special if word not in named.values()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(name)),
        additional_special_tokens=others,
        clean_up_tokenization_spaces=False,
        **named,
    )
    if shape.chat:
        tokenizer.chat_template = shape.chat
    return tokenizer


def model_of(tokenizer: PreTrainedTokenizerFast, ends: tuple[str, ...], seed: int = 0) -> LlamaForCausalLM:
    """A tiny random model whose generation config declares the given ends."""
    torch.manual_seed(seed)
    size: dict[str, Callable[..., Any] | int] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=256, **size, **ids)
    model = LlamaForCausalLM(config).eval()
    if ends:
        numbers = [tokenizer.convert_tokens_to_ids(word) for word in ends]
        model.generation_config = GenerationConfig(eos_token_id=numbers if len(numbers) > 1 else numbers[0])
    return model
