"""One policy for every λ: what e(λ) does, the plain policy at one λ, training, continuation, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from learning_kit import CONFIG, Killed, changed, digest, killed_at, round_slice, write_chain
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cdpo_core import pipeline
from cdpo_core.config import ExperimentConfig
from cdpo_core.errors import InputError
from cdpo_core.learning.conditional import EveryRound, bind_lambda, train_conditional
from cdpo_core.learning.dpo import Round, load_groups
from cdpo_core.models.conditional import LambdaEmbedding, bound, load_embedding, save_embedding, told
from cdpo_core.models.logprobs import response_log_probs
from cdpo_core.models.policy import Policy, load_policy
from cdpo_core.stages import Runtime, Slice, pick

RANGE, STEPS = 3.0, 60
CONDITIONAL = changed(dpo={"conditional": True, "conditional_steps": STEPS, "responses_per_prompt": 8})


def conditional_slice(config: ExperimentConfig = CONDITIONAL) -> Slice:
    return pick(config, pipeline.CONDITIONAL.fields, lambda_range=[RANGE], names=["harm"])


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def trained(chain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("conditional")
    train_conditional(conditional_slice(), chain, out, Runtime())
    return out


def at(trained: Path, value: float, out: Path) -> Policy:
    config = pick(CONDITIONAL, pipeline.BOUND.fields, lambda_=[value])
    bind_lambda(config, {"conditional": trained}, out, Runtime())
    return load_policy(out)


def random_embedding(costs: int, size: int) -> LambdaEmbedding:
    embedding = LambdaEmbedding(costs, size, 0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        embedding.outer.weight.normal_()
        embedding.outer.bias.normal_()
    return embedding


def a_model(kind: str, tied: bool) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
            return GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied)).eval()
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, **heads}
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()


def test_an_untrained_embedding_changes_nothing_and_a_model_forgets_it_afterwards() -> None:
    model, tokens = a_model("llama", True), torch.arange(10)[None]
    plain = model(tokens).logits
    with torch.no_grad(), told(model, LambdaEmbedding(1, 16, 0)) as at:
        at[:] = [2.0]
        torch.testing.assert_close(model(tokens).logits, plain)
    with torch.no_grad(), told(model, random_embedding(1, 16)) as at:
        at[:] = [2.0]
        assert not torch.allclose(model(tokens).logits, plain)
    torch.testing.assert_close(model(tokens).logits, plain)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_policy_at_one_lambda_is_a_plain_model_that_says_the_same(kind: str, tied: bool, tmp_path: Path) -> None:
    model, embedding, tokens = a_model(kind, tied), random_embedding(2, 16), torch.arange(10)[None]
    with torch.no_grad(), told(model, embedding) as at:
        at[:] = [0.7, 2.0]
        wanted = model(tokens).logits
    policy = bound(Policy(model, None, "{prompt}", 8, 8), embedding, [0.7, 2.0])  # type: ignore[arg-type]
    torch.testing.assert_close(policy.model(tokens).logits, wanted)
    policy.model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(tokens).logits, wanted)


def test_embeddings_that_are_no_table_are_refused() -> None:
    model = a_model("llama", False)
    plain = model.get_input_embeddings().forward
    model.get_input_embeddings().forward = lambda tokens: 3 * plain(tokens)
    with pytest.raises(InputError, match="cannot take λ in"):
        bound(Policy(model, None, "{prompt}", 8, 8), random_embedding(1, 16), [1.0])  # type: ignore[arg-type]


def test_the_weights_of_e_come_back(tmp_path: Path) -> None:
    embedding = random_embedding(2, 16)
    save_embedding(embedding, tmp_path)
    lambda_ = torch.tensor([0.3, 1.5])
    torch.testing.assert_close(load_embedding(tmp_path)(lambda_), embedding(lambda_))


def test_one_training_has_a_policy_for_each_lambda(chain: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    policies = {value: at(trained, value, tmp_path / str(value)) for value in (0.0, 0.5, 3.0)}
    groups = load_groups(chain, ["harm"], CONDITIONAL.dpo)

    def moved(value: float, scores: torch.Tensor) -> float:
        """How much of π's weight moved from the reference's samples with low scores to those with high ones."""
        with torch.no_grad():
            log_probs = response_log_probs(policies[value].model, groups.prompts, groups.responses, 0)
        weights = torch.softmax(log_probs.cpu() - groups.ref_log_probs, dim=-1)
        return float(((weights - 1 / weights.shape[1]) * scores).sum(-1).mean())

    rewards = [moved(value, groups.reward) for value in policies]
    costs = [moved(value, groups.costs[..., 0]) for value in policies]
    assert costs[0] > costs[1] > costs[2], "the larger λ, the less cost"
    assert rewards[0] > 0 > costs[2]


def test_a_step_has_one_lambda_within_the_range_and_zero_now_and_then(chain: dict[str, Path]) -> None:
    config = conditional_slice()
    policy = load_policy(chain["reference"])
    round_ = Round(policy, load_groups(chain, ["harm"], config.dpo), config, torch.float32, 0, STEPS)
    every = EveryRound(round_, [RANGE, 1.0], at := [0.0, 0.0])
    drawn = np.array([every.lambda_at(step) for step in range(400)])
    assert (drawn >= 0).all()
    assert (drawn <= [RANGE, 1.0]).all()
    assert 5 <= (drawn == 0).all(axis=1).sum() <= 40
    assert every.lambda_at(7) == every.lambda_at(7)
    single = EveryRound(round_, [RANGE], at)
    next(iter(single.losses_at(7)))
    assert at == single.lambda_at(7)
    torch.testing.assert_close(round_.r_lambda, round_.groups.reward - at[0] * round_.groups.costs[..., 0])


def test_continuation_gives_the_same_bytes(chain: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    with pytest.raises(Killed):
        train_conditional(conditional_slice(), chain, out, killed_at(STEPS // 2, scratch))
    train_conditional(conditional_slice(), chain, out, Runtime(scratch=scratch))
    assert digest(out) == digest(trained)


def test_adapters_are_merged_and_hear_of_lambda(chain: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    config = changed(
        policy={"lora_rank": 2}, dpo={"conditional": True, "conditional_steps": 10, "responses_per_prompt": 4}
    )
    train_conditional(conditional_slice(config), chain, tmp_path / "all", Runtime())
    (tmp_path / "at").mkdir()
    assert not list((tmp_path / "all").glob("adapter*"))
    assert load_embedding(tmp_path / "all").outer.weight.abs().sum() > 0
    assert at(tmp_path / "all", 1.0, tmp_path / "at").model.config.tie_word_embeddings is False


def test_training_json_says_the_range_and_a_bound_policy_no_updates(trained: Path, tmp_path: Path) -> None:
    training = json.loads((trained / "training.json").read_text())
    assert training["lambda_range"] == [RANGE]
    assert training["steps"][-1]["step"] == STEPS
    at(trained, 1.0, tmp_path / "at")
    assert json.loads((tmp_path / "at" / "training.json").read_text()) == {"steps": [], "updates": 0}


def test_a_round_does_not_know_of_it() -> None:
    assert round_slice().as_dict() == round_slice(changed(dpo={"conditional": True})).as_dict()
    assert CONFIG.dpo.conditional is False
