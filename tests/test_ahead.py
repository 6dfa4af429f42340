"""Stages begun before the run asks for them: computed once, to the same end, and nothing left of an interrupted run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from apart_stages import only_in, say
from chain_kit import Running, computed, stored

from cdpo_core.config import ComputeConfig
from cdpo_core.config_loading import load_config
from cdpo_core.local_store import LocalStore
from cdpo_core.stages import Progress, Stage, StageResult, manifest_of, resolve
from flows.plan import PlanBench
from tasks import ahead
from tasks.workbench import Workbench

SAID, ONLY_HERE = Stage("said", "text", say), Stage("only-here", "text", only_in)
SECONDS = 300


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: str) -> Workbench:
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda pid: {0, 1})
    return Workbench(load_config("tiny"), LocalStore(tmp_path / "store"), tmp_path / "scratch")


def computed_by(bench: Workbench, stage: Stage, **extra: Any) -> int:
    """Run the stage; returns the process that computed it."""
    folder = resolve(bench.run(stage, {}, **extra), bench.store)
    return int(eval((folder / "given.txt").read_text())[0])


def test_a_run_takes_what_was_begun(bench: Workbench) -> None:
    bench.begin(SAID, {})
    bench.begin(SAID, {})
    assert computed_by(bench, SAID) != os.getpid()
    assert not bench.results[0].cached
    assert len(list(bench.store.manifests())) == 1
    assert not list(bench.scratch_root.iterdir())
    bench.begin(SAID, {})
    assert computed_by(bench, SAID) != os.getpid()
    assert bench.results[1].cached


def test_a_plan_begins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "begin", pytest.fail)
    PlanBench(load_config("tiny"), LocalStore(tmp_path / "store"), tmp_path / "scratch").begin(SAID, {})


def test_what_failed_ahead_is_computed_in_its_turn(bench: Workbench) -> None:
    bench.begin(ONLY_HERE, {}, pid=os.getpid())
    assert computed_by(bench, ONLY_HERE, pid=os.getpid()) == os.getpid()
    assert not bench.results[0].cached


def test_its_processor_time_is_its_own(bench: Workbench) -> None:
    bench.begin(SAID, {})
    started = time.process_time()
    while time.process_time() < started + 3.0:
        pass
    found = manifest_of(bench.run(SAID, {}), bench.store)
    config = load_config("tiny", {"compute.own_process": "true"})
    alone = Workbench(config, LocalStore(bench.scratch_root.parent / "alone"), bench.scratch_root)
    assert found.cpu_seconds < manifest_of(alone.run(SAID, {}), alone.store).cpu_seconds + 2.0


def test_progress_is_told_to_whoever_waits() -> None:
    told: list[tuple[int, int]] = []

    def compute(progress: Progress) -> StageResult:
        progress("stage", 3, 4)
        while not told:
            time.sleep(0.01)
        raise ValueError("enough")

    ahead.begin("store", "key", compute)
    begun = ahead.take("store", "key")
    assert begun is not None
    assert ahead.take("store", "key") is None
    assert begun.wait(lambda done, total: told.append((done, total))) is None
    assert set(told) == {(3, 4)}


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"threads": 1}, True),
        ({"threads": 1, "device": "cpu"}, True),
        ({"threads": 2}, False),
        ({"threads": 0}, False),
        ({"threads": 1, "device": "cuda"}, False),
    ],
)
def test_only_a_core_that_is_left_idle_is_used(
    settings: dict[str, Any], idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ahead.core_left_idle(ComputeConfig(**settings)) is idle
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert ahead.core_left_idle(ComputeConfig(**settings)) is (idle and settings.get("device") == "cpu")


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this machine leaves no core idle")
def test_an_interrupted_run_leaves_no_process_and_continues(tmp_path: Path, prefect_server: str) -> None:
    arguments = ["--evaluation.judged_prompts", "20", "--dpo.steps", "400"]
    home = tmp_path / "home"
    running = Running(home, prefect_server, *arguments)
    try:
        beside = _stage_process(running.process.pid)
        running.process.send_signal(signal.SIGINT)
        running.process.wait(SECONDS)
        assert not _runs_after(beside, 30.0)
    finally:
        running.end()
    assert not stored(home, "enumeration")
    _, result = Running(home, prefect_server, *arguments).wait()
    assert "exact reference" in computed(result)
    assert result["oracle"]["captured"] is not None
    assert not list((home / "scratch").iterdir())


def _stage_process(pid: int) -> psutil.Process:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for child in psutil.Process(pid).children():
            if "cdpo_core.stage_process" in child.cmdline():
                return child
        time.sleep(0.02)
    raise AssertionError("no stage was begun beside the run")


def _runs_after(process: psutil.Process, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return True
    except psutil.NoSuchProcess:
        return False
    return False
