"""The training loop: what it minimises, what it records, and that a stopped run continues to the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from learning_kit import Killed, killed_at
from torch import Tensor, nn

from cdpo_core.errors import TrainingError
from cdpo_core.learning.batches import TOGETHER, Epochs, cut_into_passes, neighbours_order
from cdpo_core.learning.loop import MUON_RATE, Schedule, fit
from cdpo_core.randomness import torch_stream
from cdpo_core.stages import Runtime

SCHEDULE = Schedule(steps=50, learning_rate=0.05, averaging=0.9)


def line() -> nn.Linear:
    module = nn.Linear(2, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


def regression(module: nn.Linear, parts: int = 1, stop: int = -1):
    """Squared error on points of y = x₀ − 2 x₁ + 0.5, drawn anew each step; not finite at step `stop`."""

    def losses_at(step: int) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(12, 2, generator=torch_stream(0, "test", step))
        y = x @ torch.tensor([1.0, -2.0]) + 0.5
        for rows in torch.arange(12).chunk(parts):
            loss = (module(x[rows])[:, 0] - y[rows]).square().sum() / 12
            yield {"loss": loss * (float("nan") if step == stop else 1), "twice": 2 * loss.detach()}

    return losses_at


def test_it_minimises_and_records() -> None:
    module = line()
    records = fit(module, regression(module), Schedule(200, 0.05), Runtime(), "test")
    torch.testing.assert_close(module.weight.detach(), torch.tensor([[1.0, -2.0]]), atol=0.01, rtol=0)
    assert [record["step"] for record in records] == list(range(10, 201, 10))
    assert records[-1]["loss"] < 1e-3 < records[0]["loss"]
    assert records[0]["twice"] == pytest.approx(2 * records[0]["loss"])


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    whole, parts = line(), line()
    first = fit(whole, regression(whole), SCHEDULE, Runtime(), "test")
    second = fit(parts, regression(parts, parts=3), SCHEDULE, Runtime(), "test")
    torch.testing.assert_close(whole.weight, parts.weight, atol=1e-4, rtol=1e-4)
    assert first[0]["loss"] == pytest.approx(second[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("stop", [1, 7, 26, 50])
def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path, stop: int) -> None:
    straight, halted = line(), line()
    expected = fit(straight, regression(straight), SCHEDULE, Runtime(), "test")
    with pytest.raises(Killed):
        fit(halted, regression(halted), SCHEDULE, killed_at(stop, tmp_path), "test")
    again = line()
    records = fit(again, regression(again), SCHEDULE, Runtime(scratch=tmp_path), "test")
    assert torch.equal(again.weight, straight.weight)
    assert torch.equal(again.bias, straight.bias)
    assert records == expected


def test_continuing_does_not_repeat_the_steps_before_the_checkpoint(tmp_path: Path) -> None:
    module = line()
    with pytest.raises(Killed):
        fit(module, regression(module), SCHEDULE, killed_at(40, tmp_path), "test")
    seen: list[int] = []
    runtime = Runtime(scratch=tmp_path, progress=lambda what, done, total: seen.append(done))
    fit(line(), regression(module, stop=20), SCHEDULE, runtime, "test")
    assert min(seen) > 36


@pytest.mark.parametrize("place", [9, 0.3, 0.6, -1])
def test_one_flipped_bit_of_a_checkpoint_starts_the_stage_again(
    tmp_path: Path, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    straight, again = line(), line()
    expected = fit(straight, regression(straight), SCHEDULE, Runtime(), "test")
    halted = line()
    with pytest.raises(Killed):
        fit(halted, regression(halted), SCHEDULE, killed_at(40, tmp_path), "test")
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    content = bytearray(checkpoint.read_bytes())
    content[round(place * len(content)) if isinstance(place, float) else place] ^= 1
    checkpoint.write_bytes(content)
    seen: list[int] = []
    runtime = Runtime(scratch=tmp_path, progress=lambda what, done, total: seen.append(done))
    assert fit(again, regression(again), SCHEDULE, runtime, "test") == expected
    assert torch.equal(again.weight, straight.weight)
    assert min(seen) == 1
    assert "is damaged" in caplog.text


def test_of_two_checkpoints_the_later_one_is_continued(tmp_path: Path) -> None:
    module = line()
    with pytest.raises(Killed):
        fit(module, regression(module), SCHEDULE, killed_at(20, tmp_path), "test")
    (early,) = tmp_path.glob("checkpoint-*")
    kept = early.read_bytes()
    with pytest.raises(Killed):
        fit(module, regression(module), SCHEDULE, killed_at(40, tmp_path), "test")
    early.write_bytes(kept)  # a kill came before it was removed
    seen: list[int] = []
    runtime = Runtime(scratch=tmp_path, progress=lambda what, done, total: seen.append(done))
    fit(line(), regression(module), SCHEDULE, runtime, "test")
    assert min(seen) > 36


def test_checkpoints_by_time_lie_between_records_and_continue_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = Schedule(steps=200, learning_rate=0.05, averaging=0.9)  # a record every ten steps
    straight, halted, again = line(), line(), line()
    expected = fit(straight, regression(straight), long, Runtime(), "test")
    monkeypatch.setattr("cdpo_core.learning.loop.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(Killed):
        fit(halted, regression(halted), long, killed_at(96, tmp_path), "test")
    seen: list[int] = []
    runtime = Runtime(scratch=tmp_path, progress=lambda what, done, total: seen.append(done))
    assert fit(again, regression(again), long, runtime, "test") == expected
    assert torch.equal(again.weight, straight.weight)
    assert seen[0] >= 95


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_step() -> None:
    module = line()
    with pytest.raises(TrainingError, match=r"reward.*not finite at step 8 of 50") as caught:
        fit(module, regression(module, stop=7), SCHEDULE, Runtime(), "reward")
    assert caught.value.exit_code == 1


def test_frozen_weights_stay_and_need_no_checkpoint_of_their_own(tmp_path: Path) -> None:
    module = line()
    module.bias.requires_grad_(False)
    fit(module, regression(module), SCHEDULE, Runtime(scratch=tmp_path), "test")
    assert module.bias.item() == 0
    assert module.weight.abs().sum() > 0


def test_the_average_is_returned_and_is_not_the_last_weight() -> None:
    averaged, last = line(), line()
    fit(averaged, regression(averaged), Schedule(10, 0.05, averaging=0.9), Runtime(), "test")
    fit(last, regression(last), Schedule(10, 0.05), Runtime(), "test")
    assert not torch.equal(averaged.weight, last.weight)


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_the_learning_rate_rises_to_its_peak_and_falls(steps: int) -> None:
    rates = [Schedule(steps, 0.1).rate(step) for step in range(steps)]
    peak = int(np.argmax(rates))
    assert min(rates) > 0
    assert max(rates) <= 0.1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_every_epoch_holds_every_example_once() -> None:
    epochs = Epochs(lambda epoch: np.random.default_rng(epoch).permutation(7), count=7, batch=3)
    steps = [epochs.at(step) for step in range(14)]
    seen = Counter(int(example) for _, examples in steps for example in examples)
    assert set(seen.values()) == {6}
    assert [int(epoch) for epoch in steps[2][0]] == [0, 1, 1]


def test_a_batch_larger_than_the_data_goes_round() -> None:
    epochs = Epochs(lambda epoch: np.arange(3), count=3, batch=8)
    assert epochs.at(0)[1].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_neighbours_share_a_prompt_and_nothing_is_lost() -> None:
    prompts = np.repeat(np.arange(10), 6)
    order = neighbours_order(prompts, np.random.default_rng(0))
    assert sorted(order) == list(range(60))
    changes = int((np.diff(prompts[order]) != 0).sum())
    assert changes <= 10 * -(-6 // TOGETHER)
    assert not np.array_equal(order, neighbours_order(prompts, np.random.default_rng(1)))


@pytest.mark.parametrize(
    ("rows", "tokens", "micro_batch", "expected"),
    [
        (2, 1000, 0, [[1, 2, 0, 3]]),
        (2, 40, 0, [[1, 2], [0, 3]]),
        (2, 1, 0, [[1], [2], [0], [3]]),
        (2, 1, 4, [[1, 2], [0, 3]]),
        (2, 1000, 3, [[1, 2], [0, 3]]),
        (2, 1000, 1, [[1], [2], [0], [3]]),
    ],
)
def test_passes_by_tokens_or_by_rows(rows: int, tokens: int, micro_batch: int, expected: list[list[int]]) -> None:
    assert cut_into_passes([5, 9, 8, 4], rows, tokens, micro_batch) == expected


def layered() -> nn.Module:
    """Embedding, two numbered layers, an adapter in one of them, a head."""
    module = nn.Module()
    module.embedding = nn.Embedding(3, 4)
    module.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    module.layers[1].lora_A = nn.Linear(4, 2, bias=False)
    module.head = nn.Linear(4, 1)
    for index, value in enumerate(module.parameters()):
        nn.init.normal_(value, std=0.5, generator=torch_stream(0, "start", index))
    return module


def layered_losses(module: nn.Module):
    """Squared error to 1, -1 and 0 for the three tokens."""

    def losses_at(step: int) -> Iterator[dict[str, Tensor]]:
        token = torch.randint(3, (8,), generator=torch_stream(0, "tokens", step))
        hidden = module.layers[0](module.embedding(token)).tanh()
        hidden = module.layers[1](hidden) + module.layers[1].lora_A(hidden).sum(1, keepdim=True)
        yield {"loss": (module.head(hidden)[:, 0] - torch.tensor([1.0, -1.0, 0.0])[token]).square().mean()}

    return losses_at


MUON = Schedule(steps=40, learning_rate=0.01, averaging=0.9, muon=True)


def test_muon_trains_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    start, adamw, muon = layered(), layered(), layered()
    once = Schedule(steps=1, learning_rate=0.01, muon=True)
    fit(adamw, layered_losses(adamw), Schedule(steps=1, learning_rate=0.01), Runtime(), "test")
    fit(muon, layered_losses(muon), once, Runtime(), "test")
    others = dict(adamw.named_parameters())
    differ = {name for name, value in muon.named_parameters() if not torch.equal(value, others[name])}
    assert differ == {"layers.0.weight", "layers.1.weight"}
    # An orthogonalised step moves all directions of a gradient, of which three tokens give three, about equally.
    moved = muon.layers[0].weight.detach() - start.layers[0].weight.detach()
    sizes = torch.linalg.svdvals(moved)[:3] / (0.2 * 4**0.5 * MUON_RATE * once.rate(0))
    assert sizes.min() > 0.5
    assert sizes.max() < 1.5


def test_muon_minimises() -> None:
    module = layered()
    records = fit(module, layered_losses(module), Schedule(200, 0.01, muon=True), Runtime(), "test")
    assert records[-1]["loss"] < 1e-2 < records[0]["loss"]


@pytest.mark.parametrize("stop", [1, 7, 39])
def test_muon_stopped_continues_to_the_same_bytes(stop: int, tmp_path: Path) -> None:
    straight, halted, again = layered(), layered(), layered()
    expected = fit(straight, layered_losses(straight), MUON, Runtime(), "test")
    with pytest.raises(Killed):
        fit(halted, layered_losses(halted), MUON, killed_at(stop, tmp_path), "test")
    assert fit(again, layered_losses(again), MUON, Runtime(scratch=tmp_path), "test") == expected
    for one, other in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
