"""Reward and cost models: a backbone that reads prompt and response, and one linear score head for each quantity.

Scores come out in calibrated units, `scale · head + shift`: rewards in units in which annotators prefer
by Bradley–Terry times the data's sharpness, costs likewise with 0 at the border of safe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from cdpo_core.chunks import NOTHING_KEPT, Chunks
from cdpo_core.errors import InputError
from cdpo_core.models.checkpoints import (
    check_model_folder,
    check_safetensors,
    hub_options,
    own_code,
    read_model_config,
    scrub_folder,
    write_json,
)
from cdpo_core.models.logprobs import has_expandable_cache, pad_right
from cdpo_core.models.policy import EAGER_WIDTH, Policy, width
from cdpo_core.models.scorer_text import Encoded, EncodedText, encode_chats, encode_conversations, encode_pairs
from cdpo_core.models.text import TextWriter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

HEADS_FILE, SCORER_FILE = "heads.safetensors", "scorer.json"
# Most tokens (padding included) of one forward pass without gradient when no micro-batch is given.
SCORING_TOKENS = 16384


@dataclass(frozen=True)
class ScorerText:
    """How a scorer reads a prompt with its response.

    Attributes:
        form: `policy` as the policy writes them (template, BOS, EOS), `beaver` as Beaver models,
            `chat` by the tokenizer's chat template, `pair` as the tokenizer's sentence pair.
        template: of the `policy` form.
        max_prompt_tokens: prompts are cut to this length from the left (`policy`).
        max_response_tokens: responses are cut to this length; other forms cut both to the sum, the prompt first.
    """

    form: Literal["policy", "beaver", "chat", "pair"]
    template: str
    max_prompt_tokens: int
    max_response_tokens: int


class Scorer(nn.Module):
    """One backbone with a linear head for each of its quantities (reward, costs by name).

    Attributes:
        backbone: gives hidden states; or a sequence classifier whose one logit is taken as a hidden
            state of width 1 (`pooled`), for encoders that bring a head of their own.
        heads: hidden -> len(names), float32.
        names: what the heads measure: `reward`, or the name of a cost.
        scale, shift: [len(names)] float64 buffers, the calibration.
        ceiling: [len(names)] float64 buffer, the largest score in calibrated units that counts; inf for none.
        text: how prompt and response are read.
        pooled: whether the backbone pools by itself.
    """

    scale: Tensor
    shift: Tensor
    ceiling: Tensor

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        heads: nn.Linear,
        names: Sequence[str],
        text: ScorerText,
        *,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.heads = backbone, tokenizer, heads
        self.names, self.text, self.pooled = list(names), text, pooled
        self.register_buffer("scale", torch.ones(len(self.names), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(len(self.names), dtype=torch.float64))
        self.register_buffer("ceiling", torch.full((len(self.names),), math.inf, dtype=torch.float64))
        # The policy owns the way texts become tokens; its model is not called through here.
        self.writer = Policy(backbone, tokenizer, text.template, text.max_prompt_tokens, text.max_response_tokens)
        self._shares_prompts = text.form == "policy" and not pooled and has_expandable_cache(backbone)

    @property
    def pad_id(self) -> int:
        """The token that fills batches; always masked."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.writer.eos_id)

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[EncodedText]:
        """Tokens of each (prompt, response): the part that belongs to the prompt alone, and the rest."""
        return self.encode_counted(prompts, responses).texts

    def encode_counted(self, prompts: Sequence[str], responses: Sequence[str]) -> Encoded:
        """As `encode`, with how many of the texts were cut."""
        if self.text.form == "policy":
            firsts = _each_once(self.writer.write_prompts, prompts)
            seconds = _each_once(self.writer.encode_responses, responses)
            texts = [
                (tuple(firsts[prompt].tokens), tuple(seconds[text]))
                for prompt, text in zip(prompts, responses, strict=True)
            ]
            early = sum(firsts[prompt].cut[0] > 0 for prompt in prompts)
            return Encoded(texts, early, sum(seconds[text][-1] != self.writer.eos_id for text in responses))
        writer = TextWriter(self.tokenizer)
        if self.text.form == "beaver":
            return encode_conversations(writer, prompts, responses)
        room = self.text.max_prompt_tokens + self.text.max_response_tokens
        limit = min(room, getattr(self.backbone.config, "max_position_embeddings", room))
        if self.text.form == "chat":
            return encode_chats(writer, prompts, responses, limit)
        return encode_pairs(writer, prompts, responses, limit)

    def forward(self, texts: Sequence[EncodedText]) -> Tensor:
        """Raw scores [N, heads] float32 of encoded texts, differentiable, before calibration.

        In the `policy` form each distinct prompt of the batch passes through the backbone once.
        """
        hidden = self._shared_prompt_hidden(texts) if self._shares_prompts else self._plain_hidden(texts)
        return self.heads(hidden.float())

    def calibrated(self, raw: Tensor) -> Tensor:
        """Raw scores [..., heads] in calibrated units, float64, at most the ceiling."""
        return torch.minimum(raw.double() * self.scale + self.shift, self.ceiling)

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        micro_batch: int = 0,
        progress: Callable[[int, int], None] | None = None,
        chunks: Chunks = NOTHING_KEPT,
    ) -> Tensor:
        """The scores that `score_counted` gives."""
        return self.score_counted(prompts, responses, micro_batch, progress, chunks)[0]

    @torch.no_grad()
    def score_counted(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        micro_batch: int = 0,
        progress: Callable[[int, int], None] | None = None,
        chunks: Chunks = NOTHING_KEPT,
    ) -> tuple[Tensor, dict[str, int]]:
        """Calibrated scores [N, heads] float64 on the CPU of N texts; equal texts are read once.

        Args:
            prompts: N prompts, repeated for each of their responses.
            responses: N responses.
            micro_batch: most texts in one forward pass; 0 fills a fixed number of tokens.
            progress: called with (texts done, distinct texts).
            chunks: where finished batches are kept and found again.

        Returns:
            The scores, and {texts, prompts_cut, responses_cut}: the distinct texts and how many of them were cut.
        """
        places: dict[tuple[str, str], int] = {}
        inverse = [places.setdefault(pair, len(places)) for pair in zip(prompts, responses, strict=True)]
        encoded = self.encode_counted([prompt for prompt, _ in places], [response for _, response in places])
        texts = encoded.texts
        scores = torch.zeros(len(texts), len(self.names), dtype=torch.float64)
        # A prompt's texts stay together and share its pass; like lengths leave little to pad.
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i][0]), texts[i][0], len(texts[i][1])))
        batches = _batches(order, texts, micro_batch)
        ends = np.cumsum([0, *map(len, batches)])

        def scored(batch: list[int]) -> dict[str, np.ndarray]:
            return {"scores": self.calibrated(self([texts[i] for i in batch])).cpu().numpy()}

        def report(batches_done: int) -> None:
            if progress is not None:
                progress(int(ends[batches_done]), len(order))

        for batch, arrays in zip(batches, chunks.compute(batches, scored, report), strict=True):
            scores[batch] = torch.from_numpy(arrays["scores"])
        cut = {"prompts_cut": encoded.prompts_cut, "responses_cut": encoded.responses_cut}
        return scores[inverse], {"texts": len(texts), **cut}

    def _shared_prompt_hidden(self, texts: Sequence[EncodedText]) -> Tensor:
        """Last hidden state [N, H]: the distinct prompts once, their keys and values for every response."""
        from transformers import DynamicCache

        device = self.heads.weight.device
        distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(first for first, _ in texts))}
        prompts, prompt_lengths = pad_right(list(distinct), self.pad_id, device)
        rows = torch.tensor([distinct[first] for first, _ in texts], device=device)
        tokens, lengths = pad_right([second for _, second in texts], self.pad_id, device)
        padded = bool((prompt_lengths < prompts.shape[1]).any())
        mask = (torch.arange(prompts.shape[1], device=device) < prompt_lengths[:, None]).long() if padded else None
        cache = DynamicCache()
        self.backbone(input_ids=prompts, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(rows)
        # Filling tokens come last in a row, where no real token sees them: only prompts need the mask.
        mask = None if mask is None else torch.cat([mask[rows], mask.new_ones(tokens.shape)], 1)
        positions = prompt_lengths[rows, None] + torch.arange(tokens.shape[1], device=device)
        hidden = self.backbone(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return hidden[torch.arange(len(texts), device=device), lengths - 1]

    def _plain_hidden(self, texts: Sequence[EncodedText]) -> Tensor:
        """Last hidden state [N, H] (the logit [N, 1] if pooled), prompt and response as one text."""
        device = self.heads.weight.device
        tokens, lengths = pad_right([[*first, *second] for first, second in texts], self.pad_id, device)
        places = torch.arange(tokens.shape[1], device=device)
        inputs = {"input_ids": tokens, "attention_mask": (places < lengths[:, None]).long()}
        if self.text.form == "pair" and "token_type_ids" in self.tokenizer.model_input_names:
            firsts = torch.tensor([len(first) for first, _ in texts], device=device)
            inputs["token_type_ids"] = ((places >= firsts[:, None]) & (places < lengths[:, None])).long()
        output = self.backbone(**inputs)
        if self.pooled:
            return output.logits[:, :1]
        return output.last_hidden_state[torch.arange(len(texts), device=device), lengths - 1]


def _each_once(encode: Callable[[list[str]], list[T]], texts: Sequence[str]) -> dict[str, T]:
    """Each distinct text as tokens; prompts, and on small grammars responses, come many times."""
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, encode(distinct), strict=True))


def _batches(order: Sequence[int], texts: Sequence[EncodedText], micro_batch: int) -> list[list[int]]:
    """The texts in order, cut into passes."""
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        batches.append(_next_batch(order, start, texts, micro_batch))
        start += len(batches[-1])
    return batches


def _next_batch(order: Sequence[int], start: int, texts: Sequence[EncodedText], micro_batch: int) -> list[int]:
    """The texts from `start` that fit one pass: `micro_batch` of them, or SCORING_TOKENS with padding."""
    if micro_batch:
        return list(order[start : start + micro_batch])
    longest = end = 0
    for end, place in enumerate(order[start:]):
        longest = max(longest, sum(map(len, texts[place])))
        if end and (end + 1) * longest > SCORING_TOKENS:
            return list(order[start : start + end])
    return list(order[start : start + end + 1])


def save_scorer(scorer: Scorer, folder: Path) -> None:
    """Write a scorer: a Hugging Face folder, heads.safetensors and scorer.json; equal scorers give equal bytes."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    scorer.backbone.save_pretrained(folder)
    scorer.tokenizer.save_pretrained(folder)
    scrub_folder(folder)
    heads = {name: tensor.detach().cpu().contiguous() for name, tensor in scorer.heads.state_dict().items()}
    save_file(heads, folder / HEADS_FILE)
    content = {"heads": scorer.names, "scale": scorer.scale.tolist(), "shift": scorer.shift.tolist()}
    content["ceiling"] = [value if math.isfinite(value) else None for value in scorer.ceiling.tolist()]
    write_json(folder / SCORER_FILE, {**content, **asdict(scorer.text), "pooled": scorer.pooled})


def is_scorer_folder(folder: Path) -> bool:
    """Whether a folder was written by `save_scorer`."""
    return (folder / SCORER_FILE).is_file()


def check_scorer_folder(folder: Path) -> list[str]:
    """Check a folder that `save_scorer` wrote, without loading it; returns the names of its heads.

    Raises:
        InputError: a file is missing or damaged.
    """
    check_model_folder(folder)
    try:
        content = json.loads((folder / SCORER_FILE).read_text())
        fields = {"heads", "scale", "shift", "pooled", *ScorerText.__dataclass_fields__}
        missing = sorted(fields.difference(content))
        if missing:
            raise KeyError(missing[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the scorer's {SCORER_FILE} cannot be read: {type(error).__name__}: {error}",
            where=str(folder / SCORER_FILE),
            fix="copy the scorer's folder again, whole",
        ) from error
    check_safetensors(folder / HEADS_FILE)
    return list(content["heads"])


def load_scorer(folder: str | Path, device: str | torch.device = "cpu", *, trust_remote_code: bool = False) -> Scorer:
    """Load a scorer that `save_scorer` wrote.

    Raises:
        InputError: the folder is no scorer, or its weights are missing or damaged.
    """
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    names = check_scorer_folder(folder)
    content = json.loads((folder / SCORER_FILE).read_text())
    weights = load_file(folder / HEADS_FILE)
    text, pooled = ScorerText(*(content[name] for name in ScorerText.__dataclass_fields__)), content["pooled"]
    backbone, tokenizer = load_backbone(folder, pooled=pooled, trust_remote_code=trust_remote_code)
    heads = nn.Linear(weights["weight"].shape[1], len(names))
    heads.load_state_dict(weights)
    scorer = Scorer(backbone, tokenizer, heads, names, text, pooled=pooled)
    scorer.scale.copy_(torch.tensor(content["scale"], dtype=torch.float64))
    scorer.shift.copy_(torch.tensor(content["shift"], dtype=torch.float64))
    ceiling = [math.inf if value is None else value for value in content.get("ceiling") or [None] * len(names)]
    scorer.ceiling.copy_(torch.tensor(ceiling, dtype=torch.float64))
    return scorer.to(device).eval()


def load_backbone(
    folder: Path, *, pooled: bool = False, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model folder's body without its language model head (its classifier's head kept if `pooled`).

    Raises:
        InputError: no such model, no safetensors, damaged weights, or code of its own that may not run.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    check_model_folder(folder)
    options = hub_options(folder, trust_remote_code=trust_remote_code)
    auto = AutoModelForSequenceClassification if pooled else AutoModel
    try:
        architecture = AutoConfig.from_pretrained(folder, **options)
        attention = "eager" if width(architecture) <= EAGER_WIDTH else None
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        backbone = auto.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            attn_implementation=attention,
            **options,
        )
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise own_code(folder) from error
        raise InputError(
            f"the scorer's model cannot be loaded: {str(error).splitlines()[0]}",
            where=str(folder),
            fix="check that transformers knows this architecture and the folder is whole",
        ) from error
    return backbone.eval(), tokenizer


def is_classifier_folder(folder: Path) -> bool:
    """Whether a model folder's config.json names a sequence classifier."""
    names = read_model_config(folder).get("architectures") or []
    return any(str(name).endswith("ForSequenceClassification") for name in names)
