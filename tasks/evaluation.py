"""Evaluation: the certificate and its ledger, the test figures, the exact judge of the testbed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cdpo_core import pipeline
from cdpo_core.artifacts import ArtifactRef
from cdpo_core.dual.certificate import Certificate, Foreseen, certify
from cdpo_core.dual.two_phase import Covariate, Pool, Spread
from cdpo_core.evaluation import instrument
from cdpo_core.evaluation.decoding import Decoding, decoding_of
from cdpo_core.evaluation.instrument import Failure
from cdpo_core.evaluation.measure import Measured
from tasks.ledger import Share, enter_test
from tasks.preference_models import scorer_reports, trusted_scorers
from tasks.records import Prepared, Scored
from tasks.rounds import measure_policy, measured_from, reference_costs
from tasks.workbench import Workbench


@dataclass(frozen=True)
class Certified:
    """One certificate for each constraint, and how many tests its prompts have been spent on.

    Attributes:
        share: of δ, that each was tested at.
        names: the constraints', in the certificates' order.
        decoding: how the responses were drawn.
        failures: the instruments that do not measure; they take certificates away, whatever the bounds are.
    """

    certificates: list[Certificate]
    measured: Measured
    share: Share
    spent: int
    names: list[str]
    decoding: Decoding
    failures: list[Failure] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """All limits hold, each tested at delta: the joint error is at most delta; and every instrument measures."""
        return all(item.passed for item in self.certificates) and not self.failures

    def record(self, index: int = 0) -> dict[str, Any]:
        """The certificate of one constraint as the result states it, with the scored responses it rests on."""
        evidence = [source.model_dump() for source in self.measured.sources]
        certificate = self.certificates[index]
        prompts, units = self.measured.counts()
        measures = not any(failure.concerns(self.names[index]) for failure in self.failures)
        return {
            **asdict(certificate),
            "prompts": prompts,
            "units": units,
            "passed": certificate.passed and measures,
            **self.share.record(),
            "spent": self.spent,
            "decoding": self.decoding.record(),
            "evidence": evidence,
        }


def certify_policy(
    bench: Workbench, prepared: Prepared, scored: Scored, policy: ArtifactRef, foreseen: Sequence[Foreseen]
) -> Certified:
    """Test the policy on the certificate prompts; the test is in the ledger before its outcome is known.

    Args:
        bench: of the experiment.
        prepared: its data.
        scored: its scored samples.
        policy: to be tested.
        foreseen: what the selection prompts say of the test, one for each constraint.
    """
    config = bench.config
    limits = [item.limit for item in config.constraints]
    samples = config.sampling.certificate
    measured = measure_policy(bench, prepared, scored, policy, "certificate", samples, "certificate")
    decoding = decoding_in(bench, policy)
    share, spent = enter_test(bench, prepared, scored, policy, decoding.record())
    certificates = certificates_of(bench, scored.pool_scores, measured, limits, share.delta, foreseen)
    return Certified(certificates, measured, share, spent, bench.names, decoding)


def decoding_in(bench: Workbench, policy: ArtifactRef) -> Decoding:
    """How the experiment draws a policy's responses."""
    config = bench.config
    return decoding_of(
        bench.folder(policy),
        config.sampling.temperature,
        config.policy.max_response_tokens,
        trust_remote_code=config.policy.trust_remote_code,
    )


def examined(
    bench: Workbench, prepared: Prepared, scored: Scored, certified: Certified, baselines: Mapping[str, Measured]
) -> Certified:
    """The certificates with the instruments that failed (`cdpo_core.evaluation.instrument`).

    Args:
        bench, prepared, scored: the experiment's.
        certified: the outcome of the tests.
        baselines: scored test responses of policies that were made without the limits.
    """
    reports = scorer_reports(bench, scored.scorers)
    pool = measured_from(bench, prepared.pool_responses, scored.pool_scores)
    found = [instrument.failed_ends(certified.measured.unfinished(), certified.decoding.max_new_tokens)]
    for item, certificate in zip(bench.config.constraints, certified.certificates, strict=True):
        name, report = item.name, reports.get(item.name, {})
        spreads = [value for part in (pool, certified.measured) if (value := part.spread(name)) is not None]
        others = [part.cost(name).mean for part in baselines.values()]
        found += [
            instrument.failed_spread(name, max(spreads, default=None)),
            instrument.failed_chance(name, report),
            instrument.failed_units(name, report, item.limit, certificate.upper, others),
        ]
    return replace(certified, failures=[failure for failure in found if failure])


def certificates_of(
    bench: Workbench,
    pool_scores: ArtifactRef,
    measured: Measured,
    limits: Sequence[float],
    delta: float,
    foreseen: Sequence[Foreseen],
) -> list[Certificate]:
    """The certificates that the measured costs earn against the limits [m] at error probability delta.

    Args:
        bench: of the experiment.
        pool_scores: the reference's, of all pool prompts.
        measured: the policy on the certificate prompts.
        limits: [m].
        delta: of each test.
        foreseen: [m], see `certify_policy`.
    """
    costs, reference = measured.unit_costs(bench.names), reference_costs(bench, pool_scores)
    rest = reference.drop(index=costs.index)
    responses = measured.costs(bench.names).max(axis=0)
    return [
        certify(
            costs[name].to_numpy(),
            limit,
            delta,
            bench.config.certificate.method,
            high=item.high,
            largest=float(largest),
            pool=Pool(reference.loc[costs.index, name].to_numpy(), rest[name].to_numpy(), item.covariate),
            sd=item.spread.sd,
        )
        for name, limit, item, largest in zip(bench.names, limits, foreseen, responses, strict=True)
    ]


def foreseen_then(record: Mapping[str, Any]) -> Foreseen:
    """What was foreseen of a test, from its certificate's record."""
    covariate = Covariate(**record["covariate"])
    spread = Spread(within=record["foreseen"], sd=record["foreseen"])
    return Foreseen(covariate, spread, record["high"], record["upper"] - record["mean"])


def test_policy(bench: Workbench, prepared: Prepared, scored: Scored, policy: ArtifactRef, label: str) -> Measured:
    """Measure a policy on the test prompts, which nothing else reads."""
    samples = bench.config.sampling.test
    return measure_policy(bench, prepared, scored, policy, "test", samples, f"test of {label}")


def exact_floor(bench: Workbench, prepared: Prepared) -> list[float]:
    """On the testbed: [m] the exact lowest mean costs over the pool prompts, E_x min_y c_i."""
    from cdpo_core.testbed.world import World

    prompts = bench.table(prepared.data, "prompts")
    world = World.load(bench.folder(prepared.data) / "world.json")
    _, costs = world.true_scores(prompts.loc[prompts["split"] == "pool", "prompt_id"].tolist())
    floor: list[float] = costs.min(axis=1).mean(axis=0).tolist()
    return floor


def limits_by_name(bench: Workbench, prepared: Prepared) -> dict[str, list[float]]:
    """On the testbed: where its tight, middle and loose limits lie, one for each constraint of the config."""
    from cdpo_core.testbed.limits import placed_limits
    from cdpo_core.testbed.world import World

    prompts = bench.table(prepared.data, "prompts")
    world = World.load(bench.folder(prepared.data) / "world.json")
    pool = prompts.loc[prompts["split"] == "pool", "prompt_id"].tolist()
    placed = placed_limits(world, pool, bench.config.dpo.beta)
    columns = [world.labels.index(item.labels) for item in bench.config.constraints]
    return {name: [values[column] for column in columns] for name, values in placed.items()}


def has_judge(bench: Workbench) -> bool:
    """Whether an exact judge is wanted, and there is one: on the testbed."""
    return bench.config.on_testbed and bench.config.evaluation.judge != "none"


def enumerate_reference(bench: Workbench, prepared: Prepared, scored: Scored) -> ArtifactRef:
    """On the testbed: the reference's exact probabilities and the learned scores over all responses."""
    inputs = {"data": prepared.data, "reference": prepared.reference, "splits": scored.splits}
    inputs |= {f"scorers_{index}": ref for index, ref in enumerate(scored.scorers)}
    trusted = trusted_scorers(bench.config) if scored.scorers else {}
    return bench.run(pipeline.ENUMERATION, inputs, "exact reference", **trusted)


def judge_policy(
    bench: Workbench,
    prepared: Prepared,
    enumerated: ArtifactRef,
    policy: ArtifactRef,
    margins: Sequence[float],
    label: str = "",
) -> dict[str, Any]:
    """On the testbed: how much of what the exact optimum gains the policy captures (`oracle`)."""
    limits = [item.limit for item in bench.config.constraints]
    inputs = {"data": prepared.data, "enumeration": enumerated}
    suffix = f" of {label}" if label else ""
    found = bench.run(pipeline.POLICY_ENUMERATION, {**inputs, "policy": policy}, f"exact policy{suffix}")
    names = [{"name": item.name, "labels": item.labels} for item in bench.config.constraints]
    rounded = [round(margin, 6) for margin in margins]
    inputs["policy"] = found
    ref = bench.run(
        pipeline.JUDGEMENT, inputs, f"exact judge{suffix}", limits=limits, margins=rounded, constraints=names
    )
    judgement: dict[str, Any] = json.loads((bench.folder(ref) / "judge.json").read_text())
    return judgement
