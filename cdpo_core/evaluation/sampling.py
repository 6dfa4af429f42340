"""Draw responses from a policy: in float32 the same ones however they are batched, up to rounding.

Every token is drawn by inverting the distribution's cumulative sum at a uniform number that belongs to
(seed, stage, prompt, sample, position), so in exact numbers a response depends neither on its neighbours nor on the
batch. In float32 a batch's shape moves a probability by up to about 1e-6, and as rarely another token is drawn. In
bfloat16, whose numbers have three digits, many responses become others: there the batch is in the stage's key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cdpo_core.chunks import NOTHING_KEPT, Arrays, Chunks
from cdpo_core.models.logprobs import (
    PromptPass,
    continue_pass,
    has_expandable_cache,
    last_logits,
    prompt_pass,
    response_log_probs_in_chunks,
)
from cdpo_core.models.policy import Policy, load_policy
from cdpo_core.models.prompt_tokens import write_prompt_tokens
from cdpo_core.randomness import numpy_stream

if TYPE_CHECKING:
    from torch import Tensor

    from cdpo_core.stages import Runtime, Slice

POOL = "pool"
# Responses in one batch when no micro-batch is given: enough to fill two cores, little memory.
DEFAULT_BATCH = 512
# A batch is rewritten without its finished rows when they make up this share of it.
DROP_SHARE = 0.25
RESPONSES_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("response", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("finished", pa.bool_()),
        ("log_prob", pa.float64()),
        ("ref_log_prob", pa.float64()),
    ]
)


class SampledResponse(NamedTuple):
    """One response.

    Attributes:
        tokens: its tokens, with the one that ended it when it finished.
        finished: whether it ended by itself, at any of the policy's ends, within the allowed length.
        log_prob: log-probability of the tokens at temperature 1, in nats, whatever the sampling temperature.
    """

    tokens: list[int]
    finished: bool
    log_prob: float


@torch.no_grad()
def sample(
    policy: Policy,
    prompt_tokens: Sequence[Sequence[int]],
    k: int,
    *,
    prompt_ids: Sequence[str],
    seed_stream: tuple[int, *tuple[str | int, ...]],
    temperature: float = 1.0,
    max_new_tokens: int = 0,
    micro_batch: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    chunks: Chunks = NOTHING_KEPT,
) -> list[list[SampledResponse]]:
    """Draw k responses for each prompt.

    Sample j of a prompt depends on the weights, the prompt, the stream's name, the prompt's id, j,
    the temperature and max_new_tokens; in float32 not on k, the other prompts or the micro-batch
    (up to the rounding of sums, which a batch's shape can change); in bfloat16 on these too.

    Args:
        policy: the policy.
        prompt_tokens: P prompts as `policy.encode_prompts` gives them.
        k: responses for each prompt.
        prompt_ids: P names, which name the prompts' random streams.
        seed_stream: (seed, stage, ...), the name of the random stream.
        temperature: of the drawn distribution, > 0.
        max_new_tokens: most tokens, EOS included; 0 takes the policy's max_response_tokens.
        micro_batch: most responses in one batch, rounded up to whole prompts; 0 takes 512.
        progress: called with ("sampling", responses done, responses in all).
        chunks: where finished batches are kept and found again.

    Returns:
        For each prompt, in the order given, its k responses.
    """
    length = max_new_tokens or policy.max_response_tokens
    # Prompts of one length need no padding.
    order = sorted(range(len(prompt_tokens)), key=lambda i: len(prompt_tokens[i]))
    step = -(-(micro_batch or DEFAULT_BATCH) // k)
    draw = _draw_cached if has_expandable_cache(policy.model) else _draw_plain

    def drawn(batch: list[int]) -> dict[str, np.ndarray]:
        uniforms = np.concatenate([numpy_stream(*seed_stream, prompt_ids[i]).random((k, length)) for i in batch])
        drawing = _Drawing(policy, torch.from_numpy(uniforms).to(policy.device), temperature)
        draw(policy, [prompt_tokens[i] for i in batch], k, drawing)
        return drawing.arrays()

    def report(batches_done: int) -> None:
        if progress is not None:
            progress("sampling", min(batches_done * step, len(order)) * k, len(order) * k)

    batches = [order[start : start + step] for start in range(0, len(order), step)]
    results: list[list[SampledResponse]] = [[] for _ in prompt_tokens]
    for batch, arrays in zip(batches, chunks.compute(batches, drawn, report, [k, length]), strict=True):
        responses = _responses(arrays)
        for place, i in enumerate(batch):
            results[i] = responses[place * k : (place + 1) * k]
    return results


class _Drawing:
    """The responses of one batch while they are drawn.

    Attributes:
        rows: [N'] rows of the batch that the model still computes; some may have finished meanwhile.
    """

    def __init__(self, policy: Policy, uniforms: Tensor, temperature: float) -> None:
        count, self.length = uniforms.shape
        self.uniforms, self.temperature = uniforms, temperature
        self.end_ids = torch.tensor(policy.end_ids, device=uniforms.device)
        self.tokens = torch.full((count, self.length), policy.pad_id, device=uniforms.device)
        self.log_probs = torch.zeros_like(uniforms)
        self.lengths = torch.full((count,), self.length, device=uniforms.device)
        self.finished = torch.zeros(count, dtype=torch.bool, device=uniforms.device)
        self.rows = torch.arange(count, device=uniforms.device)

    def step(self, position: int, logits: Tensor) -> Tensor:
        """Draw the token at `position` of every row from logits [N', V]; returns them [N', 1]."""
        log_probs = logits.float().log_softmax(-1)
        tempered = log_probs if self.temperature == 1 else (logits.float() / self.temperature).log_softmax(-1)
        sums = tempered.exp().double().cumsum(-1)
        points = self.uniforms[self.rows, position, None] * sums[:, -1:]
        chosen = torch.searchsorted(sums, points, right=True).clamp_(max=logits.shape[-1] - 1)
        alive = ~self.finished[self.rows]
        rows = self.rows[alive]
        self.tokens[rows, position] = chosen[alive, 0]
        self.log_probs[rows, position] = log_probs.gather(1, chosen)[alive, 0].double()
        ended = rows[torch.isin(chosen[alive, 0], self.end_ids)]
        self.finished[ended] = True
        self.lengths[ended] = position + 1
        return chosen

    def keep(self) -> Tensor | None:
        """Places among `rows` worth computing on, once enough of them have finished; drops the others."""
        alive = ~self.finished[self.rows]
        if alive.numel() - int(alive.sum()) < DROP_SHARE * alive.numel():
            return None
        places = alive.nonzero()[:, 0]
        self.rows = self.rows[places]
        return places

    def arrays(self) -> dict[str, np.ndarray]:
        """All rows: tokens [N, length], lengths [N], finished [N], log_probs [N] float64."""
        columns = {"tokens": self.tokens, "lengths": self.lengths, "finished": self.finished}
        return {name: column.cpu().numpy() for name, column in {**columns, "log_probs": self.log_probs.sum(1)}.items()}


def _responses(arrays: Arrays) -> list[SampledResponse]:
    columns = (arrays[name].tolist() for name in ("tokens", "lengths", "finished", "log_probs"))
    return [
        SampledResponse(tokens[:length], finished, log_prob)
        for tokens, length, finished, log_prob in zip(*columns, strict=True)
    ]


def _draw_cached(policy: Policy, prompts: list[Sequence[int]], k: int, drawing: _Drawing) -> None:
    """One pass over each prompt, its keys and values expanded over k responses, then token by token."""
    state: PromptPass = prompt_pass(policy.model, prompts, policy.pad_id).expand(k)
    logits = state.logits
    for position in range(drawing.length):
        chosen = drawing.step(position, logits)
        places = drawing.keep()
        if position + 1 == drawing.length or not len(drawing.rows):
            return
        if places is not None:
            state.select(places)
            chosen = chosen[places]
        logits = continue_pass(policy.model, state, chosen, position)[:, -1]


def _draw_plain(policy: Policy, prompts: list[Sequence[int]], k: int, drawing: _Drawing) -> None:
    """The whole text again for every token: for models whose cache cannot be expanded."""
    texts = [list(prompt) for prompt in prompts for _ in range(k)]
    for position in range(drawing.length):
        live = [texts[row] for row in drawing.rows.tolist()]
        chosen = drawing.step(position, last_logits(policy.model, live, policy.pad_id))
        for text, token in zip(live, chosen[:, 0].tolist(), strict=True):
            text.append(token)
        drawing.keep()
        if not len(drawing.rows):
            return


def sample_responses(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: draw responses of a policy for the prompts of one split; writes responses.parquet, prompt_tokens.parquet.

    Args:
        config: seed, policy.max_response_tokens, sampling.temperature, split (`pool`: every prompt
            that is no preference prompt; else policy, selection, certificate or test), samples (K).
        inputs: policy, data (prompts.parquet), splits unless split is `pool`, and, where the policy
            is not the reference itself, reference.
        out: gets responses.parquet: prompt_id, sample, response, tokens, finished, log_prob and
            ref_log_prob (nats at temperature 1, float64), prompts in the data's order; and prompt_tokens.parquet:
            prompt_id, tokens, what the log-probabilities are conditioned on.
        runtime: device, micro_batch (responses), scratch, progress.
    """
    prompts = _prompts_of(config.split, inputs)
    policy = load_policy(inputs["policy"], config_policy=config.policy, device=runtime.device)
    prompt_tokens = policy.encode_prompts(prompts["prompt"].tolist())
    groups = sample(
        policy,
        prompt_tokens,
        config.samples,
        prompt_ids=prompts["prompt_id"].tolist(),
        seed_stream=(config.seed, "sample", config.split),
        temperature=config.sampling.temperature,
        micro_batch=runtime.micro_batch,
        progress=runtime.progress,
        chunks=Chunks(runtime.scratch, "sampling"),
    )
    log_probs = np.array([[response.log_prob for response in group] for group in groups])
    ref_log_probs = log_probs
    if "reference" in inputs:
        reference = load_policy(inputs["reference"], config_policy=config.policy, device=runtime.device)
        drawn = [[response.tokens for response in group] for group in groups]
        ref_log_probs = response_log_probs_in_chunks(
            reference.model,
            prompt_tokens,
            drawn,
            reference.pad_id,
            runtime.micro_batch or DEFAULT_BATCH,
            Chunks(runtime.scratch, "reference"),
            lambda done, total: runtime.progress("reference log-probs", done, total),
        )
    names = prompts["prompt_id"].tolist()
    _write(out / "responses.parquet", policy, names, groups, ref_log_probs.ravel())
    write_prompt_tokens(names, prompt_tokens, out)


def _prompts_of(split: str, inputs: Mapping[str, Path]) -> pd.DataFrame:
    prompts = pd.read_parquet(inputs["data"] / "prompts.parquet", columns=["prompt_id", "prompt", "split"])
    if split == POOL:
        return prompts[prompts["split"] == POOL]
    splits = pd.read_parquet(inputs["splits"] / "splits.parquet")
    return prompts[prompts["prompt_id"].isin(splits.loc[splits["split"] == split, "prompt_id"])]


def _write(
    path: Path, policy: Policy, prompt_ids: list[str], groups: list[list[SampledResponse]], ref_log_probs: np.ndarray
) -> None:
    responses = [response for group in groups for response in group]
    # Many responses are drawn more than once; each is decoded once.
    texts = {tokens: policy.decode(tokens) for tokens in {tuple(response.tokens) for response in responses}}
    columns = {
        "prompt_id": [name for name, group in zip(prompt_ids, groups, strict=True) for _ in group],
        "sample": [number for group in groups for number in range(len(group))],
        "response": [texts[tuple(response.tokens)] for response in responses],
        "tokens": [response.tokens for response in responses],
        "finished": [response.finished for response in responses],
        "log_prob": [response.log_prob for response in responses],
        "ref_log_prob": ref_log_probs,
    }
    pq.write_table(pa.table(columns, schema=RESPONSES_SCHEMA), path)
