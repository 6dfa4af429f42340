"""The world: its language, its truth, and what the calibration promises for every seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cdpo_core.config import ConstraintConfig, ExperimentConfig, TestbedConfig
from cdpo_core.randomness import numpy_stream
from cdpo_core.testbed import grammar
from cdpo_core.testbed.annotators import draw_prompts, part_indices
from cdpo_core.testbed.calibration import calibrate, middle
from cdpo_core.testbed.dishonesty import UNTRUE
from cdpo_core.testbed.oracle import exact_optimum
from cdpo_core.testbed.world import KINDS, LABELS, World, draw, draw_pairs

BETA, LIMIT, SHARPNESS = 1.0, -0.5, 2.0
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def worlds() -> dict[int, World]:
    return {seed: calibrated(seed) for seed in SEEDS}


@pytest.fixture(scope="module")
def worlds_of_two() -> dict[int, World]:
    return {seed: calibrated(seed, costs=2) for seed in SEEDS}


def calibrated(seed: int, limit: float = LIMIT, costs: int = 1) -> World:
    return calibrate(seed, beta=BETA, limit=limit, sharpness=SHARPNESS, pool=pool(seed), costs=costs)


def pool(seed: int) -> np.ndarray:
    prompts = draw_prompts(seed, 300, 0.2, 0.2)
    return part_indices(prompts[prompts["split"] == "pool"])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_the_language_is_readable_and_countable() -> None:
    responses = grammar.responses()

    assert len(set(responses)) == len(responses) == 1728
    assert responses[0] == "Simply measure then label slowly alone"
    assert [grammar.parse(text) for text in responses] == list(range(len(responses)))
    assert grammar.parse("Simply measure then label slowly") == grammar.parse("") == -1

    prompts = grammar.all_prompts()
    texts = {grammar.prompt_text(parts) for parts in prompts}
    assert len(texts) == len(prompts) > 10_000
    assert "How to clean tables at home" in texts
    names = [grammar.prompt_id(parts) for parts in prompts]
    assert len(set(names)) == len(names)
    assert np.array_equal(grammar.prompt_parts(names), prompts)


def test_responses_are_in_the_order_of_their_slots() -> None:
    words = [list(slot) for slot in grammar.SLOTS.values()]
    for index in (0, 1, 5, 700, 1727):
        opening, first, second, manner, closing = (
            words[slot][value] for slot, value in enumerate(grammar.slot_values()[index])
        )
        assert grammar.responses()[index] == f"{opening} {first} then {second} {manner} {closing}"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_limit_lies_half_way_from_the_unconstrained_policy_to_the_floor(
    seed: int, worlds: dict[int, World]
) -> None:
    world, parts = worlds[seed], pool(seed)
    reward, costs = world.scores(parts)
    best = exact_optimum(world.demonstrator_log_probs(parts), reward, costs, [LIMIT], BETA)

    assert middle(world, parts, BETA) == pytest.approx(LIMIT, abs=1e-5)
    assert (best.at_zero + best.floor)[0] / 2 == pytest.approx(LIMIT, abs=1e-5)
    assert best.at_zero[0] - LIMIT == pytest.approx(0.83, abs=0.15)
    assert 0.6 < best.lambda_[0] < 1.1
    assert 0.55 < best.kl < 1.0
    unconstrained = exact_optimum(world.demonstrator_log_probs(parts), reward, costs, [50.0], BETA)
    assert unconstrained.kl == pytest.approx(0.8, abs=0.1)
    assert unconstrained.reward > best.reward + 0.15, "safety must cost something"


@pytest.mark.parametrize("seed", SEEDS)
def test_pairs_look_like_those_of_real_data(seed: int, worlds: dict[int, World]) -> None:
    world, parts = worlds[seed], pool(seed)
    log_probs = world.demonstrator_log_probs(parts)
    reward, costs = world.scores(parts)
    harm, policy = costs[..., 0], np.exp(log_probs)
    unsafe = sigmoid(SHARPNESS * harm)
    share = (policy * unsafe).sum(1)

    assert (share**2).mean() == pytest.approx(0.44, abs=0.03)
    assert ((1 - share) ** 2).mean() == pytest.approx(0.41, abs=0.03)
    assert (2 * share * (1 - share)).mean() == pytest.approx(0.15, abs=0.02)
    assert (policy * unsafe * harm).sum() / (policy * unsafe).sum() == pytest.approx(2.3, abs=0.3)
    assert (policy * (1 - unsafe) * harm).sum() / (policy * (1 - unsafe)).sum() == pytest.approx(-1.9, abs=0.3)
    assert (policy * reward).sum(1).mean() == pytest.approx(0, abs=0.15)

    pairs = draw_pairs(log_probs, 40, numpy_stream(seed, "test"))
    rows = np.arange(len(parts))[:, None]
    better = sigmoid(SHARPNESS * (reward[rows, pairs[..., 1]] - reward[rows, pairs[..., 0]]))
    safer = sigmoid(SHARPNESS * (harm[rows, pairs[..., 0]] - harm[rows, pairs[..., 1]]))
    assert 0.36 < (better * (1 - safer) + (1 - better) * safer).mean() < 0.42


def test_help_and_harm_conflict_on_harmful_prompts(worlds: dict[int, World]) -> None:
    world = worlds[0]
    prompts = grammar.all_prompts()[::7]
    kinds = world.kinds(prompts)
    with_shortcut = grammar.slot_values()[:, 1] == list(grammar.SLOTS["first"]).index("bypass")
    refusal = grammar.slot_values()[:, 0] == list(grammar.SLOTS["opening"]).index("Never")
    warned = grammar.slot_values()[:, 4] == list(grammar.SLOTS["closing"]).index("supervised")
    reward, costs = world.scores(prompts)

    def effect(values: np.ndarray, chosen: np.ndarray, kind: str) -> float:
        return float((values[:, chosen].mean(1) - values[:, ~chosen].mean(1))[kinds == kind].mean())

    assert effect(reward, with_shortcut, "harmful") > 1
    assert effect(costs[..., 0], with_shortcut, "harmful") > 0.5
    assert effect(reward, refusal, "harmful") < -0.1 > effect(costs[..., 0], refusal, "harmful")
    assert effect(costs[..., 0], warned, "harmful") < -0.3
    assert effect(reward, warned, "harmful") > -0.2


def test_kinds_have_their_shares_and_order_the_costs(worlds: dict[int, World]) -> None:
    world = worlds[1]
    prompts = grammar.all_prompts()
    kinds = world.kinds(prompts)
    assert [round(float((kinds == kind).mean()), 2) for kind in KINDS] == [0.44, 0.14, 0.42]

    sample = prompts[::13]
    mean = (np.exp(world.demonstrator_log_probs(sample)) * world.scores(sample)[1][..., 0]).sum(1)
    benign, borderline, harmful = (mean[world.kinds(sample) == kind].mean() for kind in KINDS)
    assert benign < -1 < borderline < 1.5 < harmful


def test_demonstrators_can_be_learned(worlds: dict[int, World]) -> None:
    for world in worlds.values():
        policy = np.exp(world.demonstrator_log_probs(grammar.all_prompts()[::50]))
        assert np.allclose(policy.sum(1), 1)
        for slot, size in enumerate(grammar.SIZES):
            values = grammar.slot_values()[:, slot]
            marginals = np.stack([policy[:, values == value].sum(1) for value in range(size)], 1)
            assert marginals.min() > 0.01
            assert marginals.std(0).max() > 0.03, "demonstrators heed the prompt"


def test_any_text_has_a_reward_and_a_cost(worlds: dict[int, World]) -> None:
    world = worlds[0]
    names = [grammar.prompt_id(parts) for parts in grammar.all_prompts()[[5, 900, 5]]]
    reward, costs = world.true_scores(names)
    assert reward.shape == (3, 1728)
    assert costs.shape == (3, 1728, 1)

    texts = [grammar.responses()[3], "Simply measure", grammar.responses()[1700]]
    found, found_costs = world.score_texts(names, texts)
    assert np.allclose(found, [reward[0, 3], reward[1].min(), reward[2, 1700]])
    assert np.allclose(found_costs[:, 0], [costs[0, 3, 0], costs[1].max(), costs[2, 1700, 0]])
    assert world.score_texts([], [])[0].shape == (0,)


def test_a_world_is_rebuilt_from_its_file(tmp_path: Path, worlds: dict[int, World]) -> None:
    worlds[2].save(tmp_path / "world.json")
    again = World.load(tmp_path / "world.json")

    parts = grammar.all_prompts()[:20]
    assert again == worlds[2]
    for ours, theirs in zip(worlds[2].scores(parts), again.scores(parts), strict=True):
        assert np.array_equal(ours, theirs)
    assert (tmp_path / "world.json").stat().st_size < 1000


def test_seeds_give_different_worlds_and_the_limit_only_shifts_the_cost(worlds: dict[int, World]) -> None:
    parts = grammar.all_prompts()[:50]
    assert not np.allclose(worlds[0].scores(parts)[0], worlds[1].scores(parts)[0])

    shifted = calibrated(0, limit=-1.0)
    assert np.allclose(shifted.scores(parts)[0], worlds[0].scores(parts)[0], atol=1e-4)
    assert middle(shifted, pool(0), BETA) == pytest.approx(-1.0, abs=1e-5)


def test_draws_follow_their_distribution() -> None:
    log_probs = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    random = numpy_stream(0, "test")
    drawn = draw(log_probs, 20_000, random)
    for row, probs in zip(drawn, np.exp(log_probs), strict=True):
        assert np.allclose(np.bincount(row, minlength=3) / 20_000, probs, atol=0.02)

    pairs = draw_pairs(log_probs, 20_000, random)
    assert (pairs[..., 0] != pairs[..., 1]).all()
    # The second is drawn from what is left: P(1 | first was 0) = 0.3 / 0.5.
    after_zero = pairs[0, pairs[0, :, 0] == 0, 1]
    assert (after_zero == 1).mean() == pytest.approx(0.6, abs=0.02)


def test_a_world_with_one_cost_is_what_it_was_before_there_were_two(worlds: dict[int, World], tmp_path: Path) -> None:
    world = worlds[0]
    assert world.constants.care == pytest.approx(1.204278, abs=1e-5)
    assert world.constants.cost_shift == pytest.approx(0.394116, abs=1e-5)
    reward, costs = world.scores(np.array([[0, 0, 0], [20, 10, 5]]))
    assert reward[:, 0] == pytest.approx([0.17889, 0.49642], abs=1e-4)
    assert costs[:, 0, 0] == pytest.approx([-2.90166, 2.17802], abs=1e-4)
    world.save(tmp_path / "world.json")
    assert list(json.loads((tmp_path / "world.json").read_text())) == ["seed", "labels", "constants"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_second_cost_leaves_reward_and_harm_as_they_are(
    seed: int, worlds: dict[int, World], worlds_of_two: dict[int, World]
) -> None:
    parts = pool(seed)[:40]
    (reward, harm), (reward_of_two, costs) = worlds[seed].scores(parts), worlds_of_two[seed].scores(parts)
    assert worlds_of_two[seed].labels == ("harm", "dishonesty")
    assert costs.shape == (*reward.shape, 2)
    assert np.array_equal(reward, reward_of_two)
    assert np.array_equal(harm[..., 0], costs[..., 0])


@pytest.mark.parametrize("seed", SEEDS)
def test_two_limits_bind_together_with_room_below(seed: int, worlds_of_two: dict[int, World]) -> None:
    world, parts = worlds_of_two[seed], pool(seed)
    log_probs = world.demonstrator_log_probs(parts)
    reward, costs = world.scores(parts)
    both = exact_optimum(log_probs, reward, costs, [LIMIT, LIMIT], BETA)
    harm_only = exact_optimum(log_probs, reward, costs, [LIMIT, 1.5], BETA)
    lower = exact_optimum(log_probs, reward, costs, [LIMIT - 0.4, LIMIT - 0.4], BETA)

    for cost in (0, 1):
        assert middle(world, parts, BETA, cost) == pytest.approx(LIMIT, abs=1e-5)
        assert both.at_zero[cost] - LIMIT == pytest.approx(0.88, abs=0.15)
    assert both.feasible
    assert lower.feasible, "room for the certificate's margin"
    assert 0.35 < both.lambda_.min() < both.lambda_.max() < 1.2
    assert 0.6 < both.kl < 1.2
    assert harm_only.lambda_[1] == 0
    assert harm_only.costs[1] > LIMIT + 0.3, "the limit on harm alone does not keep the other"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_second_cost_is_related_to_the_first_and_pays(seed: int, worlds_of_two: dict[int, World]) -> None:
    world, parts = worlds_of_two[seed], pool(seed)
    policy = np.exp(world.demonstrator_log_probs(parts))
    reward, costs = world.scores(parts)

    def within(values: np.ndarray) -> np.ndarray:
        return values - (policy * values).sum(1, keepdims=True)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        product, squares = policy * within(a) * within(b), (policy * within(a) ** 2, policy * within(b) ** 2)
        return float(product.sum() / np.sqrt(squares[0].sum() * squares[1].sum()))

    assert 0.15 < correlation(costs[..., 0], costs[..., 1]) < 0.4
    assert 0.03 < correlation(reward, costs[..., 1]) < 0.2, "misleading answers look helpful"
    assert np.sqrt((policy * within(costs[..., 1]) ** 2).sum(1).mean()) == pytest.approx(1, abs=0.05)
    unsafe = (policy * sigmoid(SHARPNESS * costs[..., 1])).sum(1)
    assert (2 * unsafe * (1 - unsafe)).mean() == pytest.approx(0.15, abs=0.02)
    assert (unsafe**2).mean() == pytest.approx(0.44, abs=0.05)


def test_a_world_with_two_costs_is_rebuilt_from_its_file(tmp_path: Path, worlds_of_two: dict[int, World]) -> None:
    world = worlds_of_two[1]
    world.save(tmp_path / "world.json")
    again = World.load(tmp_path / "world.json")
    parts = grammar.all_prompts()[:20]
    assert again == world
    assert np.array_equal(again.scores(parts)[1], world.scores(parts)[1])
    _, costs = world.score_texts([grammar.prompt_id(parts[0])], ["Simply measure"])
    assert np.allclose(costs[0], world.scores(parts[:1])[1].max(1))


def test_every_word_of_the_language_has_a_figure_for_both_costs() -> None:
    assert set(UNTRUE) == set(grammar.WORDS)
    known = [ConstraintConfig(name=label, labels=label, limit=0.0) for label in LABELS]
    assert ExperimentConfig(testbed=TestbedConfig(costs=2), constraints=known).testbed.costs == len(LABELS)
    with pytest.raises(ValueError, match=r"constraints\.1\.labels: .* labels for harm"):
        ExperimentConfig(constraints=known)
