"""C-DPO of one policy for every λ: each step trains on preferences re-decided at a λ of its own.

A round's loss at λ has π_λ as its minimiser (`learning.dpo`); a policy that is told λ and trained at many has them all.
The λ of a limit is then found by measuring it at several, without another training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from cdpo_core.learning.dpo import Round, save_trained, schedule_of, trainable
from cdpo_core.learning.loop import fit
from cdpo_core.models.checkpoints import write_json
from cdpo_core.models.conditional import bound, load_embedding, new_embedding, save_embedding, told
from cdpo_core.models.policy import load_policy, save_policy
from cdpo_core.randomness import numpy_stream

if TYPE_CHECKING:
    from torch import Tensor

    from cdpo_core.stages import Runtime, Slice

# Share of the steps at λ = 0, an end of the range that every experiment asks for.
AT_ZERO = 0.05


def train_conditional(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: the policy for every λ between 0 and lambda_range.

    Args:
        config: as of `learning.dpo.train_round`, but lambda_range instead of lambda_ ([m], the largest λ of each cost),
            and dpo.conditional_steps instead of dpo.steps.
        inputs: as there, without previous.
        out: gets a policy's folder, the weights of e(λ) (`models.conditional`), and training.json.
        runtime: device, micro_batch, scratch, progress.

    Raises:
        InputError: the policy split has no prompts with enough responses.
        TrainingError: the loss is not finite.
    """
    steps = config.dpo.conditional_steps
    policy, groups, dtype = trainable(inputs["reference"], config, inputs, runtime)
    embedding = new_embedding(policy, len(config.names), config.seed)
    with told(policy.model, embedding) as at:
        rounds = EveryRound(Round(policy, groups, config, dtype, runtime.micro_batch, steps), config.lambda_range, at)
        both = nn.ModuleDict({"policy": policy.model, "lambda_embedding": embedding})
        records = fit(both, rounds.losses_at, schedule_of(config.dpo, steps), runtime, "conditional dpo")
    save_trained(policy, dtype, out)
    save_embedding(embedding, out)
    write_json(out / "training.json", {"steps": records, "lambda_range": list(config.lambda_range)})


class EveryRound:
    """The losses of a conditional policy's steps: those of a round at the step's λ.

    Args:
        round_: of the policy.
        lambda_range: [m] largest λ.
        told: the list by which the policy hears of λ.
    """

    def __init__(self, round_: Round, lambda_range: list[float], told: list[float]) -> None:
        self.round, self.range, self.told = round_, np.asarray(lambda_range), told

    def lambda_at(self, step: int) -> list[float]:
        """The λ of a step, [m].

        1 + λ_i is log-uniform, since costs move less the larger λ is; in AT_ZERO of the steps λ = 0.
        """
        stream = numpy_stream(self.round.seed, "conditional", step)
        share = stream.random(len(self.range)) * (stream.random() >= AT_ZERO)
        return np.expm1(share * np.log1p(self.range)).tolist()

    def losses_at(self, step: int) -> Iterator[dict[str, Tensor]]:
        """The step's losses at its λ, as `Round.losses_at` gives them."""
        self.told[:] = self.lambda_at(step)
        self.round.decide(self.told)
        yield from self.round.losses_at(step)


def bind_lambda(config: Slice, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
    """Stage: what a conditional policy is at one λ, a plain checkpoint.

    Args:
        config: lambda_ [m]; policy.trust_remote_code.
        inputs: conditional, what `train_conditional` wrote.
        out: gets the policy's Hugging Face folder with policy.json, and training.json without any step.
        runtime: device.
    """
    policy = load_policy(inputs["conditional"], config_policy=config.policy, device=runtime.device)
    embedding = load_embedding(inputs["conditional"], runtime.device)
    save_policy(bound(policy, embedding, config.lambda_), out)
    write_json(out / "training.json", {"steps": [], "updates": 0})
