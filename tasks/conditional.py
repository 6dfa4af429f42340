"""The policy at a lambda: trained for it, or what one policy for every lambda is there."""

from __future__ import annotations

from collections.abc import Sequence

from cdpo_core import pipeline
from cdpo_core.artifacts import ArtifactRef
from cdpo_core.dual.offline import OfflineDual
from tasks.records import Prepared, Scored
from tasks.rounds import at, round_inputs, train_policy
from tasks.workbench import Workbench

# A conditional policy learns lambda up to where the reference samples' costs are this near to their floor (1: there).
REACH = 0.85
# Its rounds are measurements without a training, so that a target is not missed for want of them.
ROUNDS = 12
CONDITIONAL_STAGE = "policy for every λ"


def policy_at(
    bench: Workbench,
    prepared: Prepared,
    scored: Scored,
    lambda_: Sequence[float],
    largest: float,
    previous: ArtifactRef | None = None,
) -> ArtifactRef:
    """The policy at lambda: with dpo.conditional a training serves every lambda and every limit, else it has its own.

    Args:
        bench: of the experiment.
        prepared: its data.
        scored: its scored samples.
        lambda_: [m].
        largest: of every experiment on these samples (`largest_lambda`).
        previous: a trained policy that a training of its own starts from.
    """
    if not bench.config.dpo.conditional:
        return train_policy(bench, prepared, scored, lambda_, previous)
    names, inputs = bench.names, round_inputs(bench, prepared, scored)
    conditional = bench.run(
        pipeline.CONDITIONAL, inputs, CONDITIONAL_STAGE, names=names, lambda_range=[largest] * len(names)
    )
    return bench.run(pipeline.BOUND, {"conditional": conditional}, f"policy {at(lambda_)}", lambda_=list(lambda_))


def largest_lambda(bench: Workbench, dual: OfflineDual) -> float:
    """The largest lambda that a round may have; no limit enters it, so that all limits share a conditional policy."""
    most = bench.config.dual.lambda_max
    return min(dual.lambda_for_share(REACH, most), most) if bench.config.dpo.conditional else most


def most_rounds(bench: Workbench) -> int:
    """How many rounds the dual may take: dual.rounds, or more where a round trains nothing."""
    rounds = bench.config.dual.rounds
    return max(rounds, ROUNDS) if bench.config.dpo.conditional else rounds
