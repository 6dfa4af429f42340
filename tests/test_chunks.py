"""Work in batches that is stopped: what is kept, what is done twice, and that the result has the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from config_kit import limited
from learning_kit import CONFIG, Killed, digest, killed_at, scorer_slice, sft_slice, write_data

from cdpo_core.chunks import Arrays, Chunks
from cdpo_core.evaluation.sampling import sample_responses
from cdpo_core.learning.dataset_pairs import dataset_responses
from cdpo_core.learning.preference import train_scorers
from cdpo_core.learning.score import score_responses
from cdpo_core.learning.sft import train_sft
from cdpo_core.models.policy import new_policy, save_policy
from cdpo_core.models.tokenizer import train_tokenizer
from cdpo_core.pipeline import TESTBED_DATA
from cdpo_core.stages import Runtime, Slice, pick
from cdpo_core.testbed.annotators import make_world
from cdpo_core.testbed.judge import JUDGED_SPLITS, enumerate_policy, enumerate_reference

BATCHES = [[0, 1], [2, 3], [4, 5], [6]]


@pytest.fixture
def each_batch_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdpo_core.chunks.CHUNK_SECONDS", 0.0)


class Work:
    """Batches of numbers whose squares are the work; it notes what it computed and dies at a batch if told."""

    def __init__(self, dies_at: int = -1) -> None:
        self.done: list[list[int]] = []
        self.dies_at = dies_at

    def __call__(self, batch: list[int]) -> Arrays:
        if len(self.done) == self.dies_at:
            raise Killed
        self.done.append(batch)
        return {"squares": np.array(batch) ** 2, "odd": np.array(batch) % 2 == 1}

    def run(self, folder: Path | None, batches: list[list[int]] = BATCHES, **options: object) -> np.ndarray:
        arrays = Chunks(folder, "work").compute(batches, self, **options)
        return np.concatenate([item["squares"] * np.where(item["odd"], -1, 1) for item in arrays])


EXPECTED = [0, -1, 4, -9, 16, -25, 36]


@pytest.mark.usefixtures("each_batch_kept")
def test_finished_batches_are_not_computed_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        Work(dies_at=2).run(tmp_path)
    again, seen = Work(), []
    assert again.run(tmp_path, progress=seen.append).tolist() == EXPECTED
    assert again.done == BATCHES[2:]
    assert seen == [2, 3, 4], "progress goes on from where it was"


@pytest.mark.usefixtures("each_batch_kept")
@pytest.mark.parametrize("place", [3, 0.5, -1])
def test_a_damaged_chunk_is_said_and_computed_again(
    tmp_path: Path, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    Work().run(tmp_path)
    second = sorted(tmp_path.iterdir())[1]
    content = bytearray(second.read_bytes())
    content[round(place * len(content)) if isinstance(place, float) else place] ^= 4
    second.write_bytes(content)
    again = Work()
    assert again.run(tmp_path).tolist() == EXPECTED
    assert again.done == [BATCHES[1]]
    assert "is damaged" in caplog.text


@pytest.mark.usefixtures("each_batch_kept")
def test_what_was_batched_otherwise_does_not_serve(tmp_path: Path) -> None:
    Work().run(tmp_path)
    other = Work()
    assert other.run(tmp_path, [[0, 1, 2], [3, 4, 5], [6]]).tolist() == EXPECTED
    assert len(other.done) == 3
    planned = Work()
    planned.run(tmp_path, plan="of another kind")
    assert len(planned.done) == 4


def test_short_work_writes_nothing(tmp_path: Path) -> None:
    assert Work().run(tmp_path).tolist() == EXPECTED
    assert list(tmp_path.iterdir()) == []
    assert Work().run(None).tolist() == EXPECTED


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A toy world's data, policy, scorer and responses, and a testbed with an untrained policy."""
    root = tmp_path_factory.mktemp("inputs")
    found = {"data": write_data(root / "data")}
    for name in ("reference", "scorers_0", "responses", "testbed", "splits", "tested"):
        found[name] = root / name
        found[name].mkdir()
    train_sft(sft_slice(), {"data": found["data"]}, found["reference"], Runtime())
    train_scorers(scorer_slice(), {"data": found["data"], "sft": found["reference"]}, found["scorers_0"], Runtime())
    sample_responses(SAMPLED, {"policy": found["reference"], "data": found["data"]}, found["responses"], Runtime())
    world = limited({"testbed": {"prompts": 50, "demonstrations": 100, "pairs_per_prompt": 1}})
    make_world(pick(world, TESTBED_DATA.fields), {}, found["testbed"], Runtime())
    prompts = pd.read_parquet(found["testbed"] / "prompts.parquet")
    pool = prompts.loc[prompts["split"] == "pool", "prompt_id"]
    splits = pd.DataFrame({"prompt_id": pool, "split": np.resize(JUDGED_SPLITS, len(pool))})
    splits.to_parquet(found["splits"] / "splits.parquet")
    said = pd.read_parquet(found["testbed"] / "demonstrations.parquet")["response"].tolist()
    tested = CONFIG.policy.model_copy(update={"max_response_tokens": 64})
    save_policy(new_policy(tested, train_tokenizer(said, 400), 0), found["tested"])
    return found


TRUSTED = {"policy": {"trust_remote_code": False}}
SAMPLED = Slice(
    {
        "seed": 3,
        "policy": {"max_response_tokens": 12, "trust_remote_code": False},
        "sampling": {"temperature": 1.0},
        "split": "pool",
        "samples": 8,
    }
)
SCORED = Slice({"constraints": [{"name": "harm", "labels": "harm"}], "oracle": False})
Run = Callable[[Path, Runtime], None]


def stages(inputs: dict[str, Path]) -> dict[str, Run]:
    """Each kind of work in batches, run into a folder."""
    data, reference, responses, scorers = (inputs[name] for name in ("data", "reference", "responses", "scorers_0"))
    testbed = {"data": inputs["testbed"], "reference": inputs["tested"], "splits": inputs["splits"]}
    pairs = pick(CONFIG, ("policy.max_prompt_tokens", "policy.max_response_tokens", "policy.trust_remote_code"))
    scored = {"data": data, "responses": responses, "scorers_0": scorers}

    def policy(out: Path, runtime: Runtime) -> None:
        enumerate_reference(Slice({"evaluation": {"judged_prompts": 2}, **TRUSTED}), testbed, out, Runtime())
        enumerate_policy(
            Slice(TRUSTED), {"data": inputs["testbed"], "enumeration": out, "policy": inputs["tested"]}, out, runtime
        )

    return {
        "sampling": lambda out, runtime: sample_responses(
            SAMPLED, {"policy": reference, "data": data, "reference": reference}, out, runtime
        ),
        "scoring": lambda out, runtime: score_responses(SCORED, scored, out, runtime),
        "pairs": lambda out, runtime: dataset_responses(pairs, {"data": data, "reference": reference}, out, runtime),
        "enumeration": lambda out, runtime: enumerate_reference(
            Slice({"evaluation": {"judged_prompts": 2}, **TRUSTED}), testbed, out, runtime
        ),
        "policy-enumeration": policy,
    }


@pytest.mark.usefixtures("each_batch_kept")
@pytest.mark.parametrize("stage", ["sampling", "scoring", "pairs", "enumeration", "policy-enumeration"])
def test_a_stopped_stage_continues_to_the_same_bytes(stage: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    run = stages(inputs)[stage]
    for name in ("scratch", "straight", "halted", "again"):
        (tmp_path / name).mkdir()
    straight: list[tuple[str, int, int]] = []
    run(tmp_path / "straight", Runtime(micro_batch=16, progress=lambda *said: straight.append(said)))
    assert len(straight) >= 4
    halfway = straight[len(straight) // 2]

    def dies(*said: object) -> None:
        if said == halfway:
            raise Killed

    scratch = tmp_path / "scratch"
    with pytest.raises(Killed):
        run(tmp_path / "halted", Runtime(micro_batch=16, scratch=scratch, progress=dies))
    again: list[tuple[str, int, int]] = []
    runtime = Runtime(micro_batch=16, scratch=scratch, progress=lambda *said: again.append(said))
    run(tmp_path / "again", runtime)
    assert digest(tmp_path / "again") == digest(tmp_path / "straight")
    # The batch whose end was being said is done twice; of what was kept one word is said a part.
    redone = len(again) - (len(straight) - len(straight) // 2)
    assert 0 <= redone <= 2


KILL = """
import os, signal, sys
from pathlib import Path
from cdpo_core import chunks
from test_chunks import SAMPLED
from cdpo_core.evaluation.sampling import sample_responses
from cdpo_core.stages import Runtime

chunks.CHUNK_SECONDS = 0.0

def progress(what, done, total):
    if done >= 40:
        os.kill(os.getpid(), signal.SIGKILL)

policy, data, out, scratch = map(Path, sys.argv[1:5])
inputs = {"policy": policy, "data": data}
sample_responses(SAMPLED, inputs, out, Runtime(micro_batch=8, scratch=scratch, progress=progress))
"""


def test_sampling_killed_by_the_system_continues(inputs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("scratch", "halted", "straight", "again"):
        (tmp_path / name).mkdir()
    read, scratch = {"policy": inputs["reference"], "data": inputs["data"]}, tmp_path / "scratch"
    command = [sys.executable, "-c", KILL, *map(str, (*read.values(), tmp_path / "halted", scratch))]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode == -signal.SIGKILL
    seen: list[int] = []
    runtime = Runtime(micro_batch=8, scratch=scratch, progress=lambda what, done, total: seen.append(done))
    sample_responses(SAMPLED, read, tmp_path / "again", runtime)
    assert seen == [32, 40, 48, 56, 64, 72, 80], "the batch that ended in the kill is the only one done twice"
    sample_responses(SAMPLED, read, tmp_path / "straight", Runtime(micro_batch=8))
    assert digest(tmp_path / "again") == digest(tmp_path / "straight")


@pytest.mark.usefixtures("each_batch_kept")
def test_the_held_out_scores_of_a_training_are_kept(inputs: dict[str, Path], tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    runtime = killed_at(10**9, scratch)
    train_scorers(scorer_slice(), {"data": inputs["data"], "sft": inputs["reference"]}, out, runtime)
    assert list(scratch.glob("held-out-*"))
    assert digest(out) == digest(inputs["scorers_0"])
