"""The sweep: one experiment for each limit, sharing every stage that the limit does not enter.

    cdpo sweep configs/testbed.yaml --limits -1.2,-0.8,-0.5,-0.2

A parent with one child a limit; the frontier of reward over cost; and of the policies that are still
certified when the error probability is split over all limits, the most helpful one.
"""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from prefect.states import Completed, State
from pydantic import Field

from cdpo_core.config import (
    CertificateConfig,
    ComputeConfig,
    DataConfig,
    DpoConfig,
    DualConfig,
    EvaluationConfig,
    ExperimentConfig,
    PolicyConfig,
    RewardConfig,
    SamplingConfig,
    SftConfig,
    StoreConfig,
    TestbedConfig,
    TrackingConfig,
)
from cdpo_core.stages import Progress
from flows.experiment import DEFAULT, Constraints, Name, Seed, experiment, make_prefect_home, sections
from flows.preflight import check_before_run
from tasks.frontier import SweepJournal, choose_for_sweep, exact_frontier, frontier_points
from tasks.workbench import outcome, report_progress_to

Limits = Annotated[list[float], Field(min_length=1)]


@flow(name="sweep", flow_run_name="{name}", persist_result=False)
def sweep(
    limits: Limits,
    name: Name = DEFAULT.name,
    seed: Seed = DEFAULT.seed,
    data: DataConfig = DEFAULT.data,
    testbed: TestbedConfig = DEFAULT.testbed,
    policy: PolicyConfig = DEFAULT.policy,
    sft: SftConfig = DEFAULT.sft,
    reward: RewardConfig = DEFAULT.reward,
    constraints: Constraints = DEFAULT.constraints,
    dpo: DpoConfig = DEFAULT.dpo,
    dual: DualConfig = DEFAULT.dual,
    sampling: SamplingConfig = DEFAULT.sampling,
    certificate: CertificateConfig = DEFAULT.certificate,
    evaluation: EvaluationConfig = DEFAULT.evaluation,
    store: StoreConfig = DEFAULT.store,
    tracking: TrackingConfig = DEFAULT.tracking,
    compute: ComputeConfig = DEFAULT.compute,
) -> State[dict[str, Any]]:
    """One experiment for each limit of the first constraint, and the frontier they draw.

    Args:
        limits: of the first constraint, one experiment each (cost units).
        name: shown in the UIs.
        seed: of every random stream.
        data: the preferences, and how their prompts are split.
        testbed: the oracle world, used when data.source is `testbed`.
        policy: the language model that is aligned.
        sft: fine-tuning that makes the reference policy.
        reward: the model of what is better.
        constraints: the limits on harm, each with its cost model.
        dpo: one round of training.
        dual: how lambda moves from round to round.
        sampling: how many responses are drawn for each prompt.
        certificate: the test the returned policy must pass.
        evaluation: what is measured besides.
        store: where artifacts are kept.
        tracking: MLflow.
        compute: the machine; changes no result but by rounding.
    """
    # The parameters, which at this line are all there is, are the limits and the config's sections.
    config = ExperimentConfig(**{key: value for key, value in locals().items() if key != "limits"})
    result = _conduct(config, sorted(set(limits)))
    certified = sum(child["status"] == "certified" for child in result["children"])
    return Completed(message=f"{certified} of {len(result['children'])} limits certified", data=result)


def run_sweep(config: ExperimentConfig, limits: list[float], *, progress: Progress | None = None) -> dict[str, Any]:
    """Run a sweep here, in this process; returns {children, frontier, chosen, ...}."""
    if progress is not None:
        report_progress_to(progress)
    make_prefect_home()
    state = sweep(limits=limits, **sections(config), return_state=True)
    result: dict[str, Any] = outcome(state)
    return result


def with_limit(config: ExperimentConfig, limit: float, parent_run: str) -> ExperimentConfig:
    """The child's config: the first constraint's limit replaced, its MLflow parent named."""
    first, *others = config.constraints
    constraints = [first.model_copy(update={"limit": limit}), *others]
    model_name = config.tracking.model_name or f"cdpo-{config.name}"
    tracking = config.tracking.model_copy(update={"parent_run": parent_run, "model_name": model_name})
    name = f"{config.name}, {first.name} ≤ {limit:g}"
    return config.model_copy(update={"name": name, "constraints": constraints, "tracking": tracking})


def _conduct(config: ExperimentConfig, limits: list[float]) -> dict[str, Any]:
    check_before_run(config)
    journal = SweepJournal(config, limits)
    try:
        children = [
            outcome(experiment(**sections(with_limit(config, limit, journal.run_id)), return_state=True))
            for limit in limits
        ]
        result = {
            "name": config.name,
            "limits": limits,
            "children": children,
            "frontier": frontier_points(children),
            "exact_frontier": exact_frontier(children),
            "chosen": choose_for_sweep(journal.bench, children),
            "tracking": journal.record(),
        }
        result["report"] = str(journal.closed(result))
    except BaseException:
        journal.failed()
        raise
    return result
