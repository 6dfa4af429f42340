"""Scorers made from what others trained: ready reward and cost models, and backbones to start from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from cdpo_core.errors import InputError
from cdpo_core.models.beaver import is_beaver_folder, load_beaver
from cdpo_core.models.checkpoints import check_model_folder
from cdpo_core.models.policy import width
from cdpo_core.models.scorer import (
    Scorer,
    ScorerText,
    check_scorer_folder,
    is_classifier_folder,
    is_scorer_folder,
    load_backbone,
    load_scorer,
)
from cdpo_core.models.template_date import freeze_date
from cdpo_core.randomness import stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def new_scorer(
    folder: Path,
    names: Sequence[str],
    max_prompt_tokens: int,
    max_response_tokens: int,
    *,
    scratch_seed: int | None = None,
    trust_remote_code: bool = False,
    template_date: str = "",
) -> Scorer:
    """A scorer to train: the folder's body in float32 with a head of zeros for each name.

    Args:
        folder: a policy of this project's, or any Hugging Face model.
        names: what the heads will measure.
        max_prompt_tokens: prompts are cut to this length from the left.
        max_response_tokens: responses are cut to this length.
        scratch_seed: draw the body's weights anew from this seed's stream; None keeps the folder's.
        trust_remote_code: allow code that comes with the model to run.
        template_date: the day that a chat template writes which asks for the date; "" leaves it as it is.

    Raises:
        InputError: as `load_backbone`.
    """
    backbone, tokenizer = load_backbone(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if scratch_seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(scratch_seed, "scorer"))
            backbone = type(backbone)(backbone.config).float().eval()
    freeze_date(tokenizer, template_date)
    heads = nn.Linear(width(backbone.config), len(names))
    nn.init.zeros_(heads.weight)
    nn.init.zeros_(heads.bias)
    text = _text_of(folder, tokenizer, max_prompt_tokens, max_response_tokens)
    return Scorer(backbone, tokenizer, heads, names, text)


def load_ready_scorer(
    folder: Path,
    names: Sequence[str],
    max_prompt_tokens: int,
    max_response_tokens: int,
    *,
    flip: bool = False,
    trust_remote_code: bool = False,
    template_date: str = "",
) -> Scorer:
    """A ready reward or cost model: a scorer of this project's, a Beaver model, or a one-label classifier.

    Args:
        folder: its Hugging Face folder.
        names: what its heads measure; one name unless the folder is a scorer of this project's.
        max_prompt_tokens: with max_response_tokens, the length texts are cut to.
        max_response_tokens: see max_prompt_tokens.
        flip: a larger score means what a smaller one should.
        trust_remote_code: allow code that comes with the model to run.
        template_date: the day that a chat template writes which asks for the date; "" leaves it as it is.

    Raises:
        InputError: as `check_ready_scorer`, or its weights cannot be loaded.
    """
    check_ready_scorer(folder, names)
    if is_scorer_folder(folder):
        scorer = _with_heads(load_scorer(folder, trust_remote_code=trust_remote_code), names)
    elif is_beaver_folder(folder):
        scorer = _from_beaver(folder, names)
    else:
        scorer = _from_classifier(folder, names, max_prompt_tokens, max_response_tokens, trust_remote_code)
    freeze_date(scorer.tokenizer, template_date)
    if flip:
        scorer.scale.neg_()
        scorer.shift.neg_()
        # What was the most harmful score is now the least: nothing bounds the other side.
        scorer.ceiling.fill_(math.inf)
    return scorer


def check_ready_scorer(folder: Path, names: Sequence[str]) -> None:
    """Check, without loading it, that a model folder can score as it is.

    Args:
        folder: its Hugging Face folder.
        names: what its heads are to measure.

    Raises:
        InputError: as `check_model_folder`, or the folder holds no score head, too few, or none of a name asked for.
    """
    check_model_folder(folder)
    if is_scorer_folder(folder):
        heads = check_scorer_folder(folder)
        unknown = [name for name in names if name not in heads]
        if unknown:
            raise InputError(
                f"the scorer has no head named {unknown[0]!r}, but {', '.join(heads)}",
                where=str(folder),
                fix="name the constraint as the scorer's head",
            )
    elif len(names) > 1:
        raise InputError(
            f"one ready model cannot give {len(names)} scores ({', '.join(names)})",
            where=str(folder),
            fix="give each constraint a base of its own",
        )
    elif not (is_beaver_folder(folder) or is_classifier_folder(folder)):
        raise InputError(
            "the model has no score head, so it cannot be used without training",
            where=str(folder),
            fix="give a reward or cost model (a one-label sequence classifier or a Beaver model), or set train: true",
        )


def _with_heads(scorer: Scorer, names: Sequence[str]) -> Scorer:
    rows = [scorer.names.index(name) for name in names]
    heads = nn.Linear(scorer.heads.in_features, len(names))
    heads.load_state_dict({"weight": scorer.heads.weight[rows], "bias": scorer.heads.bias[rows]})
    chosen = Scorer(scorer.backbone, scorer.tokenizer, heads, names, scorer.text, pooled=scorer.pooled)
    chosen.scale.copy_(scorer.scale[rows])
    chosen.shift.copy_(scorer.shift[rows])
    chosen.ceiling.copy_(scorer.ceiling[rows])
    return chosen.eval()


def _from_beaver(folder: Path, names: Sequence[str]) -> Scorer:
    beaver = load_beaver(folder)
    bias = beaver.head.bias if beaver.head.bias is not None else torch.zeros(1)
    heads = nn.Linear(beaver.head.in_features, 1)
    heads.load_state_dict({"weight": beaver.head.weight, "bias": bias})
    scorer = Scorer(beaver.body, beaver.tokenizer, heads, names, ScorerText("beaver", "{prompt}", 0, 0))
    scorer.scale.fill_(1 / beaver.scale)
    scorer.shift.fill_(-beaver.shift / beaver.scale)
    return scorer.eval()


def _from_classifier(
    folder: Path, names: Sequence[str], max_prompt_tokens: int, max_response_tokens: int, trust_remote_code: bool
) -> Scorer:
    model, tokenizer = load_backbone(folder, pooled=True, trust_remote_code=trust_remote_code)
    if model.config.num_labels != 1:
        raise InputError(
            f"the classifier has {model.config.num_labels} labels, a scorer needs one",
            where=str(folder),
            fix="give a reward or cost model with num_labels = 1",
        )
    text = _text_of(folder, tokenizer, max_prompt_tokens, max_response_tokens)
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear):
        # A decoder's score is read at the last token: read it here, where padding cannot mislead it.
        heads = nn.Linear(score.in_features, 1)
        bias = torch.zeros(1) if score.bias is None else score.bias
        heads.load_state_dict({"weight": score.weight, "bias": bias})
        return Scorer(model.base_model, tokenizer, heads, names, text).eval()
    heads = nn.Linear(1, 1)
    nn.init.ones_(heads.weight)
    nn.init.zeros_(heads.bias)
    return Scorer(model, tokenizer, heads, names, text, pooled=True).eval()


def _text_of(
    folder: Path, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_response_tokens: int
) -> ScorerText:
    """How the model was made to read: its folder says so."""
    settings = folder / "policy.json"
    if settings.is_file():
        template = json.loads(settings.read_text())["template"]
        return ScorerText("policy", template, max_prompt_tokens, max_response_tokens)
    if is_beaver_folder(folder):
        return ScorerText("beaver", "{prompt}", max_prompt_tokens, max_response_tokens)
    return ScorerText("chat" if tokenizer.chat_template else "pair", "{prompt}", max_prompt_tokens, max_response_tokens)
