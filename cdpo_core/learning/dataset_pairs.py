"""The data's own response pairs as a round reads them: what the paper trains on (arXiv:2403.02475).

The pairs come with the preferences; only their order is decided anew, by r_λ. They were not drawn from the
reference, so log π_ref of each is computed here, once for all rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_core.chunks import Chunks
from cdpo_core.evaluation.sampling import DEFAULT_BATCH, RESPONSES_SCHEMA
from cdpo_core.models.logprobs import response_log_probs_in_chunks
from cdpo_core.models.policy import load_policy
from cdpo_core.models.prompt_tokens import write_prompt_tokens

if TYPE_CHECKING:
    from cdpo_core.stages import Runtime, Slice


def dataset_responses(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: both responses of every preference pair, as if they had been sampled; writes responses.parquet.

    Args:
        config: policy.{max_prompt_tokens, max_response_tokens, trust_remote_code}.
        inputs: data (preferences, prompts), reference (policy).
        out: gets responses.parquet as `sampling.sample_responses` writes it: the i-th pair of a prompt is its
            samples 2i and 2i + 1; log_prob and ref_log_prob are both log π_ref (nats, float64); and
            prompt_tokens.parquet.
        runtime: device, micro_batch (responses), scratch, progress.
    """
    pairs = pd.read_parquet(inputs["data"] / "preferences.parquet", columns=["prompt_id", "response_0", "response_1"])
    pairs = pairs.sort_values("prompt_id", kind="stable")
    texts = pd.read_parquet(inputs["data"] / "prompts.parquet").set_index("prompt_id")["prompt"]
    reference = load_policy(inputs["reference"], config_policy=config.policy, device=runtime.device)
    prompts = reference.encode_prompts(texts.loc[pairs["prompt_id"]].tolist())
    flat = pairs[["response_0", "response_1"]].to_numpy().ravel().tolist()
    tokens = reference.encode_responses(flat)
    log_probs = response_log_probs_in_chunks(
        reference.model,
        prompts,
        [tokens[2 * place : 2 * place + 2] for place in range(len(prompts))],
        reference.pad_id,
        runtime.micro_batch or DEFAULT_BATCH,
        Chunks(runtime.scratch, "pairs"),
        lambda done, total: runtime.progress("log-probs of the pairs", done, total),
    ).ravel()
    numbers = pairs.groupby("prompt_id").cumcount().to_numpy()
    columns = {
        "prompt_id": pairs["prompt_id"].repeat(2).tolist(),
        "sample": [2 * int(number) + side for number in numbers for side in (0, 1)],
        "response": flat,
        "tokens": tokens,
        "finished": [ids[-1] in reference.end_ids for ids in tokens],
        "log_prob": log_probs,
        "ref_log_prob": log_probs,
    }
    pq.write_table(pa.table(columns, schema=RESPONSES_SCHEMA), out / "responses.parquet")
    written = dict(zip(pairs["prompt_id"], prompts, strict=True))
    write_prompt_tokens(list(written), list(written.values()), out)
