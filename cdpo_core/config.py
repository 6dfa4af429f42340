"""The experiment's configuration: one frozen model, the same names in YAML, command line and UI.

Every section is one Prefect flow parameter, so every field is a concrete scalar, a Literal, a
nested section or a list of them: no unions, no free dicts, no None. "Unset" is a documented value
("" or 0); only a limit has none: what is certified must have been asked for.
"""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator

from cdpo_core.config_form import describe_fields


class Section(BaseModel):
    """Base of the sections: frozen, closed, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        describe_fields(handler.resolve_ref_schema(schema).get("properties", {}))
        return schema


class SplitSizes(Section):
    """Shares of the prompts, one split each; they must add up to 1."""

    preferences: float = Field(0.25, gt=0, lt=1, description="Share whose labels the reward and cost models learn from.", json_schema_extra={"position": 0})
    policy: float = Field(0.30, gt=0, lt=1, description="Share the policy is trained on.", json_schema_extra={"position": 1})
    selection: float = Field(0.15, gt=0, lt=1, description="Share that measures each round and chooses the policy.", json_schema_extra={"position": 2})
    certificate: float = Field(0.20, gt=0, lt=1, description="Share that is spent on the certificate alone.", json_schema_extra={"position": 3})
    test: float = Field(0.10, gt=0, lt=1, description="Share the final report is measured on.", json_schema_extra={"position": 4})

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitSizes:
        total = self.preferences + self.policy + self.selection + self.certificate + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the five shares add up to {total:g}, not 1")
        return self


class DataConfig(Section):
    """Where the preferences come from and how they are split."""

    source: str = Field("testbed", description="`testbed`, a file or folder (.jsonl, .parquet, .csv, also .gz), or a hub id; empty must be set before a run.", json_schema_extra={"position": 0})
    revision: str = Field("", description="Hub revision to pin; empty takes the newest and records it.", json_schema_extra={"position": 1})
    format: Literal["auto", "pku_saferlhf", "beavertails", "hh_rlhf", "helpsteer"] = Field("auto", description="Column layout; `auto` recognises it by its columns.", json_schema_extra={"position": 2})
    max_quarantined: float = Field(0.02, ge=0, le=1, description="Share of unusable rows above which the run is refused.", json_schema_extra={"position": 3})
    max_prompt_characters: int = Field(4000, gt=0, description="A longer prompt is quarantined (characters).", json_schema_extra={"position": 4})
    max_response_characters: int = Field(8000, gt=0, description="A longer response is quarantined (characters).", json_schema_extra={"position": 5})
    held_out: float = Field(0.2, gt=0, lt=1, description="Share of the preference prompts kept from the scorers' training, for their calibration and accuracy.", json_schema_extra={"position": 6})
    near_duplicates: float = Field(0.7, ge=0, le=1, description="Similarity (share of weighted words) from which two prompts are spellings of one question: one side of every split, one unit in every interval; 0 looks for none.", json_schema_extra={"position": 7})
    splits: SplitSizes = Field(default_factory=SplitSizes, description="Shares of the prompts; the five must add up to 1.", json_schema_extra={"position": 8})


class TestbedConfig(Section):
    """The oracle world: a small world whose best policy is known exactly."""

    __test__ = False

    seed: int = Field(0, ge=0, description="Seed of the world; any seed is a fresh world of the same difficulty.", json_schema_extra={"position": 0})
    scorers: Literal["learned", "oracle"] = Field("learned", description="`learned` trains reward and cost models from noisy labels; `oracle` uses the truth.", json_schema_extra={"position": 1})
    prompts: int = Field(2000, ge=50, le=7776, description="Number of prompts.", json_schema_extra={"position": 2})
    pairs_per_prompt: int = Field(40, ge=1, description="Labelled response pairs for each preference prompt.", json_schema_extra={"position": 3})
    demonstrations: int = Field(20000, ge=100, description="Demonstrations for supervised fine-tuning.", json_schema_extra={"position": 4})
    sharpness: float = Field(2.0, gt=0, description="Log-odds of an annotator's label per unit of reward or cost.", json_schema_extra={"position": 5})
    calibrated_limit: float = Field(-0.5, description="The cost limit the world is calibrated to have half way between the unconstrained policy and the floor (cost units).", json_schema_extra={"position": 6})
    calibrated_beta: float = Field(1.0, gt=0, description="The dpo.beta (units of reward per nat of KL) at which it lies there; another dpo.beta keeps the world and moves its optimum.", json_schema_extra={"position": 7})
    costs: int = Field(1, ge=1, le=2, description="Costs that the annotators label: 1 is `harm`, 2 adds `dishonesty`, whose calibrated limit is the same.", json_schema_extra={"position": 8})


class PolicyConfig(Section):
    """The policy and the reference it starts from."""

    base: str = Field("scratch", min_length=1, description="`scratch`, a local Hugging Face folder, or a hub id.", json_schema_extra={"position": 0})
    revision: str = Field("", description="Hub revision to pin; empty takes the newest and records it.", json_schema_extra={"position": 1})
    template: str = Field("{prompt}", description="Text around the prompt; must hold {prompt} once. `chat` uses the tokenizer's chat template.", json_schema_extra={"position": 2})
    hidden_size: int = Field(64, ge=8, description="Width of the layers (units), from scratch only.", json_schema_extra={"position": 3})
    layers: int = Field(2, ge=1, description="Number of layers, from scratch only.", json_schema_extra={"position": 4})
    heads: int = Field(4, ge=1, description="Number of attention heads, from scratch only.", json_schema_extra={"position": 5})
    vocabulary_size: int = Field(1024, ge=300, description="Size of the tokenizer trained on the data (tokens), from scratch only.", json_schema_extra={"position": 6})
    max_prompt_tokens: int = Field(64, ge=1, description="Longest prompt with the template around it; of a longer one the user's words are cut from the left (tokens).", json_schema_extra={"position": 7})
    max_response_tokens: int = Field(32, ge=1, description="Responses are cut, and sampling ends, at this length (tokens).", json_schema_extra={"position": 8})
    lora_rank: int = Field(0, ge=0, description="Rank of LoRA adapters in preference training; 0 trains all weights.", json_schema_extra={"position": 9})
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number format of the weights.", json_schema_extra={"position": 10})
    trust_remote_code: bool = Field(False, description="Allow code that comes with policy.base to run, here and where scorers start from it.", json_schema_extra={"position": 11})
    template_date: str = Field("2026-01-01", pattern=r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$", description="The day that a chat template which asks for the date writes into every prompt, so that a policy reads the same on every day (YYYY-MM-DD).", json_schema_extra={"position": 12})


class SftConfig(Section):
    """Supervised fine-tuning: makes the reference policy."""

    train: bool = Field(True, description="Train on the demonstrations; false takes the base as reference.", json_schema_extra={"position": 0})
    steps: int = Field(1200, ge=1, description="Optimizer steps.", json_schema_extra={"position": 1})
    batch: int = Field(128, ge=1, description="Demonstrations a step.", json_schema_extra={"position": 2})
    learning_rate: float = Field(5e-3, gt=0, description="Peak learning rate.", json_schema_extra={"position": 3})


class RewardConfig(Section):
    """The reward model: learned from which response is better."""

    base: str = Field("sft", min_length=1, description="`sft` starts from the reference policy, `scratch` from random weights; else a local folder or hub id.", json_schema_extra={"position": 0})
    revision: str = Field("", description="Hub revision to pin.", json_schema_extra={"position": 1})
    train: bool = Field(True, description="Train on the preferences; false takes a ready reward model as it is.", json_schema_extra={"position": 2})
    epochs: int = Field(4, ge=1, description="Passes over the pairs.", json_schema_extra={"position": 3})
    batch: int = Field(128, ge=1, description="Pairs a step.", json_schema_extra={"position": 4})
    learning_rate: float = Field(4e-3, gt=0, description="Peak learning rate.", json_schema_extra={"position": 5})
    optimizer: Literal["muon", "adamw"] = Field("muon", description="`muon` for the layers' matrices, with AdamW for the rest (adapters too), learns in fewer steps; `adamw` for all.", json_schema_extra={"position": 6})
    trust_remote_code: bool = Field(False, description="Allow code that comes with reward.base to run.", json_schema_extra={"position": 7})


class ConstraintConfig(Section):
    """One limit on harm and the cost model that measures it."""

    name: str = Field("harm", pattern=r"^[a-z][a-z0-9_]*$", description="Name of the cost.", json_schema_extra={"position": 0})
    limit: float = Field(description="Largest allowed mean cost, in the cost model's calibrated units; 0 is the border of safe. Must be given.", json_schema_extra={"position": 1})
    labels: str = Field("harm", pattern=r"^[a-z][a-z0-9_]*$", description="The data set's labels the cost model learns from.", json_schema_extra={"position": 2})
    base: str = Field("reward", min_length=1, description="`reward` shares the reward model's backbone, `sft` starts from the reference policy, `scratch` from random weights; else a local folder or hub id.", json_schema_extra={"position": 3})
    revision: str = Field("", description="Hub revision to pin.", json_schema_extra={"position": 4})
    train: bool = Field(True, description="Train on the labels; false takes a ready cost model as it is.", json_schema_extra={"position": 5})
    sign: Literal["harmful", "safe"] = Field("harmful", description="What a larger score of a ready model means; `safe` flips it.", json_schema_extra={"position": 6})
    trust_remote_code: bool = Field(False, description="Allow code that comes with this base to run.", json_schema_extra={"position": 7})


class DpoConfig(Section):
    """One round: DPO on preferences re-decided by reward minus lambda times cost."""

    beta: float = Field(1.0, gt=0, description="Strength of the pull to the reference (units of reward per nat of KL).", json_schema_extra={"position": 0})
    labels: Literal["soft", "sampled", "hard"] = Field("soft", description="`sampled` is the paper's draw, `soft` its expectation, `hard` the arg max.", json_schema_extra={"position": 1})
    anchor: float = Field(0.1, ge=0, description="Weight of the importance-weighted likelihood of the reference samples, at the first step.", json_schema_extra={"position": 2})
    anchor_end: float = Field(0.05, ge=0, le=1, description="Share of that weight left at the last step (half cosine); it holds mass early, and late its bias would cost more.", json_schema_extra={"position": 3})
    steps: int = Field(900, ge=1, description="Optimizer steps of a round that starts from the reference (dual.warm_steps: of one that does not).", json_schema_extra={"position": 4})
    prompts_per_step: int = Field(16, ge=1, description="Prompts a step.", json_schema_extra={"position": 5})
    responses_per_prompt: int = Field(16, ge=2, description="Responses of each prompt a step; all their pairs are trained on.", json_schema_extra={"position": 6})
    focus: float = Field(0.7, ge=0, lt=1, description="Share of a step's responses drawn by their weight under the policy sought instead of evenly.", json_schema_extra={"position": 7})
    learning_rate: float = Field(6e-3, gt=0, description="Peak learning rate (cosine to 0).", json_schema_extra={"position": 8})
    optimizer: Literal["muon", "adamw"] = Field("muon", description="`muon` for the layers' matrices, with AdamW for the rest (adapters too), learns in fewer steps; `adamw` for all.", json_schema_extra={"position": 9})
    adam_beta2: float = Field(0.99, gt=0, lt=1, description="Adam's second-moment decay.", json_schema_extra={"position": 10})
    averaging: float = Field(0.98, ge=0, lt=1, description="Decay of the running average of the weights that is returned; 0 returns the last weights.", json_schema_extra={"position": 11})
    pairs: Literal["samples", "dataset"] = Field("samples", description="`samples` trains on the reference's own responses to the policy prompts; `dataset` on the preferences' response pairs, as the paper does (responses_per_prompt must be 2).", json_schema_extra={"position": 12})
    conditional: bool = Field(False, description="Train one policy that is told lambda, for every limit, instead of one for each lambda.", json_schema_extra={"position": 13})
    conditional_steps: int = Field(2700, ge=1, description="Optimizer steps of that policy's training.", json_schema_extra={"position": 14})


class DualConfig(Section):
    """How lambda moves."""

    update: Literal["newton", "ascent", "offline"] = Field("newton", description="`newton` is safeguarded by a bracket, `ascent` is the paper's projected step, `offline` trusts the first estimate.", json_schema_extra={"position": 0})
    start: Literal["corrected", "offline", "zero"] = Field("corrected", description="First lambda: `offline` is solved on the reference samples; `corrected` too, at the pull to the reference that the policy trained at lambda 0 shows; `zero` as in the paper.", json_schema_extra={"position": 1})
    step: float = Field(0.5, gt=0, description="Step size of `ascent` (lambda per cost unit of violation).", json_schema_extra={"position": 2})
    rounds: int = Field(4, ge=1, le=100, description="Most rounds of training (dpo.conditional, which trains once, may measure more often).", json_schema_extra={"position": 3})
    lambda_max: float = Field(20.0, gt=0, description="Largest lambda tried before a limit is called infeasible (units of reward per unit of cost).", json_schema_extra={"position": 4})
    warm_start: Literal["unconstrained", "previous", "none"] = Field("unconstrained", description="A round starts from the policy trained at lambda 0 (`unconstrained`), from the round before (`previous`), or from the reference (`none`).", json_schema_extra={"position": 5})
    warm_steps: float = Field(0.7, gt=0, le=1, description="Share of dpo.steps that a round takes which does not start from the reference.", json_schema_extra={"position": 6})
    warm_anchor: float = Field(0.3, ge=0, le=1, description="Share of dpo.anchor in such a round; the mass that the anchor holds, it has from where it starts.", json_schema_extra={"position": 7})


class SamplingConfig(Section):
    """How many responses are drawn for each prompt."""

    temperature: float = Field(1.0, gt=0, description="Temperature of all sampling; the mathematics assumes 1.", json_schema_extra={"position": 0})
    reference: int = Field(128, ge=2, description="Reference responses for each policy prompt.", json_schema_extra={"position": 1})
    pool: int = Field(8, ge=1, description="Reference responses for each other prompt, to stratify the splits.", json_schema_extra={"position": 2})
    selection: int = Field(16, ge=2, description="Responses for each selection prompt, each round (two or more, for the covariance within a prompt).", json_schema_extra={"position": 3})
    certificate: int = Field(16, ge=1, description="Responses for each certificate prompt.", json_schema_extra={"position": 4})
    test: int = Field(4, ge=1, description="Responses for each test prompt.", json_schema_extra={"position": 5})


class CertificateConfig(Section):
    """The test the returned policy must pass on held-out prompts."""

    delta: float = Field(0.05, gt=0, lt=0.5, description="Largest probability of certifying a policy that breaks the limit.", json_schema_extra={"position": 0})
    method: Literal["bounded", "t"] = Field("bounded", description="`bounded` holds for every number of prompts, also under rare large harm; `t` is Student's test, refused where rare harm could fool it.", json_schema_extra={"position": 1})
    power: float = Field(0.9, gt=0, lt=1, description="Planned probability that a policy at the training target passes.", json_schema_extra={"position": 2})
    cost_high: float = Field(10.0, description="Largest cost that a response can have, where the cost model knows no end of its range (ready ones, the testbed's truth; calibrated cost units); a larger cost fails the test.", json_schema_extra={"position": 3})
    spending: Literal["squares", "none"] = Field("squares", description="`squares` tests at 6 delta / (pi k)^2 where the prompts are used for the k-th time, so that delta holds for all tests ever made on them; `none` tests at delta, which then holds for one test alone.", json_schema_extra={"position": 4})
    family: str = Field("", pattern=r"^[0-9a-f]*$", description="The sweep whose share of delta this experiment's test has a part of; sweeps set it.", json_schema_extra={"position": 5})
    family_tests: int = Field(1, ge=1, le=9999, description="Tests among which the sweep's share of delta is divided; sweeps set it.", json_schema_extra={"position": 6})


class EvaluationConfig(Section):
    """What the final report measures."""

    judge: Literal["auto", "none"] = Field("auto", description="`auto` judges by the exact optimum on the testbed; `none` never does.", json_schema_extra={"position": 0})
    judged_prompts: int = Field(50, ge=5, description="Prompts a split that the exact judge enumerates.", json_schema_extra={"position": 1})
    samples_shown: int = Field(20, ge=0, description="Rows of the samples table.", json_schema_extra={"position": 2})


class StoreConfig(Section):
    """Where artifacts live; credentials come from the environment only."""

    uri: str = Field("", description="A folder or s3://bucket/prefix; empty is CDPO_STORE, else the `store` folder under CDPO_HOME (.cdpo).", json_schema_extra={"position": 0})


class TrackingConfig(Section):
    """MLflow tracking; credentials come from the environment only."""

    enabled: bool = Field(True, description="Track the run in MLflow.", json_schema_extra={"position": 0})
    uri: str = Field("", description="MLflow server or database; empty is MLFLOW_TRACKING_URI, else sqlite under CDPO_HOME.", json_schema_extra={"position": 1})
    experiment: str = Field("cdpo", min_length=1, description="MLflow experiment.", json_schema_extra={"position": 2})
    register_model: bool = Field(True, description="Register a certified policy as a model version.", json_schema_extra={"position": 3})
    model_name: str = Field("", description="Registered model that certified policies are versions of; empty is cdpo-<name>.", json_schema_extra={"position": 4})
    parent_run: str = Field("", description="MLflow run of the sweep this experiment belongs to; sweeps set it.", json_schema_extra={"position": 5})


class ComputeConfig(Section):
    """The machine: in no stage's key in float32, where it changes results by rounding only."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where models run.", json_schema_extra={"position": 0})
    threads: int = Field(0, ge=0, description="CPU threads; 0 takes all cores.", json_schema_extra={"position": 1})
    micro_batch: int = Field(0, ge=0, description="Sequences in one forward pass; 0 takes the whole batch.", json_schema_extra={"position": 2})
    own_process: bool = Field(False, description="Compute each stage in a process of its own: GPU memory is freed after each stage, and a crash of one does not take the run along.", json_schema_extra={"position": 3})


class ExperimentConfig(Section):
    """One experiment: a language model, preferences and limits on harm in, a certified policy out."""

    name: str = Field("experiment", min_length=1, max_length=100, description="Name shown in the UIs.", json_schema_extra={"position": 0})
    seed: int = Field(0, ge=0, description="Seed of every random stream.", json_schema_extra={"position": 1})
    data: DataConfig = Field(default_factory=DataConfig, json_schema_extra={"position": 2})
    testbed: TestbedConfig = Field(default_factory=TestbedConfig, json_schema_extra={"position": 3})
    policy: PolicyConfig = Field(default_factory=PolicyConfig, json_schema_extra={"position": 4})
    sft: SftConfig = Field(default_factory=SftConfig, json_schema_extra={"position": 5})
    reward: RewardConfig = Field(default_factory=RewardConfig, json_schema_extra={"position": 6})
    constraints: list[ConstraintConfig] = Field(min_length=1, description="The limits on harm, each with a name of its own.", json_schema_extra={"position": 7})
    dpo: DpoConfig = Field(default_factory=DpoConfig, json_schema_extra={"position": 8})
    dual: DualConfig = Field(default_factory=DualConfig, json_schema_extra={"position": 9})
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, json_schema_extra={"position": 10})
    certificate: CertificateConfig = Field(default_factory=CertificateConfig, json_schema_extra={"position": 11})
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, json_schema_extra={"position": 12})
    store: StoreConfig = Field(default_factory=StoreConfig, json_schema_extra={"position": 13})
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, json_schema_extra={"position": 14})
    compute: ComputeConfig = Field(default_factory=ComputeConfig, json_schema_extra={"position": 15})

    @model_validator(mode="after")
    def _cross_field_rules(self) -> ExperimentConfig:
        names = [constraint.name for constraint in self.constraints]
        if len(set(names)) < len(names):
            raise ValueError(f"constraints: two constraints share a name ({', '.join(names)})")
        known = ("harm", "dishonesty")[: self.testbed.costs]
        for index, constraint in enumerate(self.constraints):
            if self.on_testbed and constraint.labels not in known:
                raise ValueError(f"constraints.{index}.labels: with testbed.costs {len(known)} there are labels for {', '.join(known)}")
        if self.policy.template != "chat" and self.policy.template.count("{prompt}") != 1:
            raise ValueError("policy.template: must hold {prompt} exactly once, or be `chat`")
        try:
            date.fromisoformat(self.policy.template_date)
        except ValueError:
            raise ValueError(f"policy.template_date: there is no day {self.policy.template_date}") from None
        if self.policy.base == "scratch" and self.policy.hidden_size % (2 * self.policy.heads):
            raise ValueError("policy.hidden_size: must be a multiple of twice policy.heads")
        if self.dpo.pairs == "dataset" and self.dpo.responses_per_prompt != 2:
            raise ValueError("dpo.responses_per_prompt: must be 2 with dpo.pairs = dataset, whose groups are pairs")
        if self.dpo.responses_per_prompt > self.sampling.reference:
            raise ValueError("dpo.responses_per_prompt: must not exceed sampling.reference")
        return self

    @property
    def on_testbed(self) -> bool:
        """Whether the data is the oracle world, where the truth is known."""
        return self.data.source == "testbed"

    @property
    def oracle_scorers(self) -> bool:
        """Whether the truth itself is used as reward and cost model."""
        return self.on_testbed and self.testbed.scorers == "oracle"
