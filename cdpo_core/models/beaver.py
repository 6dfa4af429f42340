"""Beaver score checkpoints: the published reward and cost models of Safe RLHF (arXiv:2310.12773).

A Llama backbone and a linear head whose score is read at the last token. A cost above 0 means unsafe.
The weights must be safetensors; their licence is non-commercial.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cdpo_core.errors import InputError
from cdpo_core.models.checkpoints import (
    check_model_folder,
    hub_options,
    local_folder,
    quiet_transformers,
    read_model_config,
    weight_files,
)
from cdpo_core.models.logprobs import pad_right
from cdpo_core.models.text import Frame, TextWriter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 512
HEAD, BIAS, NORMALIZER = "score_head.weight", "score_head.bias", "normalizer."
# What a reward, a cost and a critic subtract and divide by when the checkpoint asks for it.
CENTRED, SCALED = ("reward",), ("reward", "cost")


class BeaverModel(nn.Module):
    """A Beaver reward or cost model.

    Attributes:
        body: the Llama backbone.
        head: hidden -> 1, float32; with a bias only if the checkpoint has one, since the bias moves
            the border c = 0.
        tokenizer: the checkpoint's tokenizer.
        score_type: reward, cost or critic.
        end_token: whether the last answer is followed by the end-of-text token, as in training.
        shift, scale: what is subtracted from a score and what divides it, 0 and 1 in the published use.
    """

    def __init__(
        self,
        body: PreTrainedModel,
        head: nn.Linear,
        tokenizer: PreTrainedTokenizerBase,
        score_type: str,
        end_token: bool,
    ) -> None:
        super().__init__()
        self.body, self.head, self.tokenizer = body, head, tokenizer
        self.score_type, self.end_token = score_type, end_token
        self.shift, self.scale = 0.0, 1.0

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Scores [N] float32 at the last token of right-padded tokens [N, L] of the given lengths [N]."""
        mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()
        hidden = self.body(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1].float()
        return (self.head(last)[:, 0] - self.shift) / self.scale

    @torch.no_grad()
    def score(self, prompts: Sequence[str], responses: Sequence[str], micro_batch: int = 16) -> Tensor:
        """Scores [N] float32 of single-turn conversations, in the checkpoint's own units."""
        end = str(self.tokenizer.eos_token)
        turns = zip(prompts, responses, strict=True)
        frames = [conversation_frame(*turn, end if self.end_token else "") for turn in turns]
        written = TextWriter(self.tokenizer).write(frames, MAX_TOKENS, own_start=True)
        encoded = [row.tokens for row in written]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        device = self.head.weight.device
        scores = torch.zeros(len(encoded), device=device)
        for start in range(0, len(order), micro_batch):
            batch = order[start : start + micro_batch]
            tokens, lengths = pad_right([encoded[i] for i in batch], int(self.tokenizer.eos_token_id), device)
            scores[torch.tensor(batch, device=device)] = self(tokens, lengths)
        return scores


def beaver_text(turns: Sequence[tuple[str, str]], end: str, *, ended: bool) -> str:
    """The conversation as Beaver models read it.

    Args:
        turns: (prompt, response) pairs, oldest first.
        end: the end-of-text token; it follows every answer before the last.
        ended: whether it follows the last answer too.
    """
    text = "BEGINNING OF CONVERSATION: "
    text += end.join(f"USER: {prompt} ASSISTANT:{response}" for prompt, response in turns)
    return text + end if ended else text


def conversation_frame(prompt: str, response: str, end: str) -> Frame:
    """One turn as Beaver models read it, in pieces; `end` follows the answer."""
    first, second = "\ue001", "\ue002"
    before, _, rest = beaver_text([(first, second)], end, ended=True).partition(first)
    middle, _, after = rest.partition(second)
    return before, prompt, middle, response, after


def is_beaver_folder(folder: Path) -> bool:
    """Whether a model folder's config.json is that of a Beaver score model."""
    names = read_model_config(folder).get("architectures") or []
    return any(str(name).endswith("ForScore") for name in names)


def load_beaver(
    base: str | Path,
    *,
    revision: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    end_token: bool = True,
) -> BeaverModel:
    """Load a Beaver reward or cost model from a folder or a hub id.

    Args:
        base: a path or a hub id.
        revision: hub revision; "" takes the newest.
        device: where it goes.
        dtype: the backbone's number format; None keeps the saved one. The head is float32.
        end_token: append the end-of-text token, as in the models' training; several published
            evaluations leave it out.

    Raises:
        InputError: as `check_model_folder`, or the weights hold what a Beaver model does not have, or
            lack what it has.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = local_folder(base, revision)
    check_model_folder(folder)
    quiet_transformers()
    options = hub_options(folder)
    body, report = AutoModel.from_pretrained(
        folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **options
    )
    extra = _head_tensors(folder)
    unknown = sorted(key for key in report["unexpected_keys"] if key not in extra and "inv_freq" not in key)
    missing = sorted([*report["missing_keys"], *({HEAD} - set(extra))])
    if unknown or missing:
        raise InputError(
            f"these are not a Beaver score model's weights: unknown {unknown[:3]}, missing {missing[:3]}",
            where=str(base),
            fix="give a PKU-Alignment beaver reward or cost model, whole",
        )
    model = BeaverModel(
        body, _head(extra), AutoTokenizer.from_pretrained(folder, **options), _score_type(folder), end_token
    )
    _set_normalizer(model, read_model_config(folder), extra)
    return model.to(device).eval()


def _head_tensors(folder: Path) -> dict[str, Tensor]:
    """The score head's and the normalizer's tensors, float32; the backbone's are left on disk."""
    from safetensors import safe_open

    tensors = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            keys = file.keys()
            for key in keys:
                if key in (HEAD, BIAS) or key.startswith(NORMALIZER):
                    tensors[key] = file.get_tensor(key).float()
    return tensors


def _head(extra: dict[str, Tensor]) -> nn.Linear:
    outputs, width = extra[HEAD].shape
    head = nn.Linear(width, outputs, bias=BIAS in extra)
    head.load_state_dict({key.removeprefix("score_head."): extra[key] for key in (HEAD, BIAS) if key in extra})
    return head


def _score_type(folder: Path) -> str:
    return str(read_model_config(folder).get("score_type", "reward"))


def _set_normalizer(model: BeaverModel, config: dict[str, Any], extra: dict[str, Tensor]) -> None:
    """A normalizing checkpoint's running mean and variance, from its weights or else its config."""
    if not config.get("do_normalize", False):
        return
    statistics = {}
    for name in ("mean", "var"):
        value = extra.get(NORMALIZER + name, config.get(name))
        if value is None:
            raise InputError(f"the checkpoint normalizes but holds no {name}", where="config.json", fix="copy it again")
        statistics[name] = float(torch.as_tensor(value).reshape(-1)[0])
    if model.score_type in CENTRED:
        model.shift = statistics["mean"]
    if model.score_type in SCALED:
        model.scale = statistics["var"] ** 0.5
