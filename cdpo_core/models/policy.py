"""The policy π: a causal language model, its tokenizer, and how prompts and responses become tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cdpo_core.errors import InputError
from cdpo_core.models.checkpoints import (
    check_model_folder,
    hub_options,
    is_local,
    not_loaded,
    quiet_transformers,
    scrub_folder,
    write_json,
)
from cdpo_core.models.template_date import freeze_date
from cdpo_core.models.text import (
    CHAT,
    PLAIN,
    TextWriter,
    Written,
    declared_ends,
    prompt_frames,
    turn_end,
)
from cdpo_core.randomness import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from cdpo_core.config import PolicyConfig
    from cdpo_core.stages import Slice

SETTINGS = ("template", "max_prompt_tokens", "max_response_tokens", "template_date")
# Below this width the fused attention kernels cost more to call than they save.
EAGER_WIDTH = 256


@dataclass(frozen=True)
class Policy:
    """A causal language model that answers prompts.

    Attributes:
        model: the model; its weights are trained in place.
        tokenizer: its tokenizer.
        template: text around the prompt with {prompt} in it once, or `chat` for the tokenizer's own.
        max_prompt_tokens: a longer prompt loses its words' left end, never the template around them; BOS included.
        max_response_tokens: responses are cut to this length, their end included.
        template_date: the day that a chat template writes which asks for the date; "" if it asks for none.
        ends: ids at which the model's own generate() stops, beside EOS and the end of a turn.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str
    max_prompt_tokens: int
    max_response_tokens: int
    template_date: str = ""
    ends: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def eos_id(self) -> int:
        """The token that a written response ends with: the chat template's end of a turn, else EOS."""
        return int(self.tokenizer.eos_token_id) if self._turn_end is None else self._turn_end

    @property
    def end_ids(self) -> list[int]:
        """All tokens that end a response when it is sampled, `eos_id` first."""
        return list(dict.fromkeys([self.eos_id, int(self.tokenizer.eos_token_id), *self.ends]))

    @property
    def pad_id(self) -> int:
        """The token that fills batches; always masked, so EOS serves where a tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else int(pad)

    def encode_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of each prompt within the template, BOS as the template or the tokenizer's own call writes it.

        Raises:
            InputError: a prompt is too long, and max_prompt_tokens leaves no room for any of its words.
        """
        return [written.tokens for written in self.write_prompts(prompts)]

    def write_prompts(self, prompts: Sequence[str]) -> list[Written]:
        """As `encode_prompts`, with what was cut of each."""
        frames = prompt_frames(self.tokenizer, self.template, prompts)
        rows = self._writer.write(frames, self.max_prompt_tokens, own_start=self.template != CHAT)
        for row in rows:
            if row.cut[0] and not row.words:
                raise InputError(
                    f"max_prompt_tokens = {self.max_prompt_tokens} leaves no room for a prompt's words: "
                    f"the template around them takes {len(row.tokens)} tokens",
                    where="policy.max_prompt_tokens",
                    fix=f"set it to {len(row.tokens) + 1} at the least, better to what most prompts need",
                )
        # A model cannot begin with nothing.
        return [row if row.tokens else row._replace(tokens=[self.eos_id]) for row in rows]

    def encode_responses(self, responses: Sequence[str]) -> list[list[int]]:
        """Tokens of each response, apart from its prompt so that none merge at the border.

        One end at the end, unless the response had to be cut to max_response_tokens.
        """
        return [[*ids, self.eos_id][: self.max_response_tokens] for ids in self._writer.words(responses)]

    def count_cut(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, int]:
        """How many of distinct prompts and responses the lengths cut: {prompts, prompts_cut, responses, …_cut}."""
        asked, said = list(dict.fromkeys(prompts)), list(dict.fromkeys(responses))
        return {
            "prompts": len(asked),
            "prompts_cut": sum(row.cut[0] > 0 for row in self.write_prompts(asked)),
            "responses": len(said),
            "responses_cut": sum(len(ids) >= self.max_response_tokens for ids in self._writer.words(said)),
        }

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a response's tokens, without its end and without special tokens."""
        ids = list(tokens)
        if ids and ids[-1] in self.end_ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    @cached_property
    def _writer(self) -> TextWriter:
        return TextWriter(self.tokenizer, "" if self.template == CHAT else self.template, self.ends)

    @cached_property
    def _turn_end(self) -> int | None:
        return turn_end(self.tokenizer) if self.template == CHAT else None


def new_policy(config: PolicyConfig | Slice, tokenizer: PreTrainedTokenizerBase, seed: int) -> Policy:
    """A policy from scratch: a small Llama with tied embeddings and random float32 or bfloat16 weights.

    Args:
        config: the `policy` section; hidden_size, layers, heads, template, max_prompt_tokens,
            max_response_tokens and dtype are read.
        tokenizer: its tokenizer, which sets the vocabulary's size.
        seed: the weights come from the stream (seed, "policy").

    Raises:
        InputError: hidden_size is not a multiple of 2 × heads, or the template has no {prompt}.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if config.hidden_size % (2 * config.heads):
        raise InputError(
            f"hidden_size {config.hidden_size} cannot be split over {config.heads} heads of even width",
            where="policy.hidden_size",
            fix=f"take a multiple of {2 * config.heads}",
        )
    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=-(-config.hidden_size * 8 // 3 // 16) * 16,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_prompt_tokens + config.max_response_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=_attention(config.hidden_size),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "policy"))
        model = LlamaForCausalLM(architecture)
    model = model.to(getattr(torch, config.dtype)).eval()
    return _policy(model, tokenizer, {name: getattr(config, name, "") for name in SETTINGS})


def load_policy(
    base: str | Path,
    *,
    config_policy: PolicyConfig | Slice | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Policy:
    """Load a policy from a folder of this project's, any other Hugging Face folder, or a hub id.

    Args:
        base: a path (see `is_local`) or a hub id; both go through transformers' Auto classes.
        config_policy: the `policy` section or a slice of it. The fields it has win over the folder's
            policy.json; revision and trust_remote_code are read from it where present.
        device: where the weights go.
        dtype: number format; None takes config_policy's, else the one the weights were saved in.

    Raises:
        InputError: no such model, no safetensors, damaged weights, no EOS token, no chat template for
            `chat`, or neither policy.json nor config_policy says how prompts are written.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if is_local(base):
        base = Path(base).expanduser()
        check_model_folder(base)
    quiet_transformers()
    settings = _settings(base, config_policy)
    trusted = bool(getattr(config_policy, "trust_remote_code", False))
    options = hub_options(base, getattr(config_policy, "revision", ""), trusted)
    saved_as = getattr(config_policy, "dtype", "auto")
    try:
        architecture = AutoConfig.from_pretrained(base, **options)
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
        model = AutoModelForCausalLM.from_pretrained(
            base,
            config=architecture,
            dtype=dtype or saved_as,
            use_safetensors=True,
            attn_implementation=_attention(width(architecture)),
            **options,
        )
    except (OSError, ValueError) as error:
        raise not_loaded(base, error) from error
    ends = declared_ends(model.generation_config, tokenizer) if model.can_generate() else ()
    return _policy(model.to(device).eval(), tokenizer, settings, ends)


def save_policy(policy: Policy, folder: Path) -> None:
    """Write a policy as a Hugging Face folder with policy.json: equal weights give equal bytes.

    Adapters are merged into the weights first. Its generation config ends responses where sampling does.
    """
    quiet_transformers()
    policy = merged(policy)
    folder.mkdir(parents=True, exist_ok=True)
    ends = policy.end_ids
    if policy.model.generation_config is not None:
        policy.model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    scrub_folder(folder)
    write_json(folder / "policy.json", {name: getattr(policy, name) for name in SETTINGS} | {"ends": ends})


def with_lora(policy: Policy, rank: int, seed: int) -> Policy:
    """The policy with trainable LoRA adapters of `rank` on all linear layers and its own weights frozen.

    The adapters start at zero effect; their random half comes from the stream (seed, "lora").
    """
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "lora"))
        model = get_peft_model(policy.model, adapters)
    return replace(policy, model=model.eval())


def merged(policy: Policy) -> Policy:
    """The policy with its LoRA adapters merged into the weights; itself when it has none."""
    if not hasattr(policy.model, "merge_and_unload"):
        return policy
    return replace(policy, model=policy.model.merge_and_unload())


def width(architecture: PreTrainedConfig) -> int:
    """The hidden size of a model's text part."""
    return int(architecture.get_text_config().hidden_size)


def _attention(hidden_size: int) -> str | None:
    return "eager" if hidden_size <= EAGER_WIDTH else None


def _settings(base: str | Path, config: PolicyConfig | Slice | None) -> dict[str, Any]:
    path = Path(base) / "policy.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    settings = {name: getattr(config, name, saved.get(name)) for name in SETTINGS}
    settings["template_date"] = settings["template_date"] or ""
    missing = [name for name, value in settings.items() if value is None]
    if missing:
        raise InputError(
            f"nothing says the policy's {', '.join(missing)}",
            where=str(base),
            fix="set them in the config's policy section; only policies saved by cdpo carry a policy.json",
        )
    return settings


def _policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    ends: tuple[int, ...] = (),
) -> Policy:
    day = settings["template_date"] if freeze_date(tokenizer, settings["template_date"]) else ""
    check_text(tokenizer, settings["template"])
    return Policy(model, tokenizer, **{**settings, "template_date": day}, ends=ends)


def check_text(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Check that prompts can be written with a template, and that responses end.

    Raises:
        InputError: the template does not hold {prompt} once, there is no chat template for `chat`, or it ends turns
            with text; or the tokenizer has no EOS token.
    """
    if template != CHAT and template.count(PLAIN) != 1:
        raise InputError(
            f"the template {template!r} does not hold {{prompt}} once", where="policy.template", fix="write {prompt}"
        )
    if template == CHAT and not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template", where="policy.template", fix="write one with {prompt} in it"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token", where="policy.base", fix="choose a model that can end a text"
        )
    if template == CHAT:
        turn_end(tokenizer)
