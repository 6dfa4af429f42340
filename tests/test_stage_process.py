"""A stage in a process of its own: the same bytes, its errors as they were, and nothing left of it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apart_stages
import psutil
import pytest
from apart_stages import Odd, fail, say, sleep

from cdpo_core import pipeline
from cdpo_core.config_loading import load_config
from cdpo_core.errors import CdpoError, InputError, TrainingError
from cdpo_core.local_store import LocalStore
from cdpo_core.stage_process import _described, _rebuilt, compute_apart
from cdpo_core.stages import Compute, Runtime, Slice, Stage, StageResult, compute_stage, manifest_of, pick, resolve

TESTS = Path(__file__).parent


def run_apart(
    function: Compute, scratch: Path, config: dict[str, Any] | None = None, **runtime: Any
) -> tuple[Path, float]:
    out = scratch / "out"
    out.mkdir()
    machine = Runtime(scratch=scratch, **runtime)
    return out, compute_apart(function, Slice(config or {}), {"text": scratch}, out, machine, "staged")


def test_it_receives_what_the_stage_would_and_is_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[str, int, int]] = []
    caplog.set_level(logging.INFO, "cdpo_core")
    config = {"lambda_": [0.1, 1 / 3], "dpo": {"beta": 0.1}, "labels": None}
    out, seconds = run_apart(say, tmp_path, config, threads=1, progress=lambda *said: heard.append(said))
    given = eval((out / "given.txt").read_text())
    assert given[0] != os.getpid()
    assert given[1:] == [1, str(tmp_path), str(tmp_path), config]
    assert seconds >= 0.3
    assert heard[0] == ("said", 0, 2)
    assert heard[-1] == ("said", 2, 2)
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert ("cdpo_core.said", "INFO", "so far 1") in said
    assert any(name == "py.warnings" and "look out" in message for name, _, message in said)


def test_an_error_comes_back_as_what_it_was(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run_apart(fail, tmp_path, {"how": "input"})
    assert str(caught.value) == "the file is empty\n  where: here\n  fix:   fill it"
    (note,) = caught.value.__notes__
    assert f'File "{apart_stages.__file__}", line ' in note


@pytest.mark.parametrize(
    ("error", "back"),
    [
        (TrainingError("the loss is nan", where="step 3"), TrainingError("the loss is nan", where="step 3")),
        (ValueError("too large", 3), ValueError("too large", 3)),
        (KeyError("name"), KeyError("name")),
        (OSError(28, "No space left on device"), OSError(28, "No space left on device")),
        (MemoryError(), MemoryError()),
        (Odd("strange"), RuntimeError("apart_stages.Odd: strange")),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), RuntimeError),
        (SystemExit(3), RuntimeError("builtins.SystemExit: 3")),
    ],
)
def test_every_error_can_be_sent(error: BaseException, back: BaseException | type) -> None:
    sent = _rebuilt(json.loads(json.dumps(_described(error))))
    if isinstance(back, type):
        assert type(sent) is back
    else:
        assert (type(sent), str(sent), sent.args) == (type(back), str(back), back.args)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"), [("exit", "ended with exit code 7"), ("kill", "killed by signal 9 (SIGKILL)")]
)
def test_a_death_without_a_word_is_an_error_with_the_last_output(how: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(CdpoError) as caught:
        run_apart(fail, tmp_path, {"how": how})
    assert "the stage staged" in str(caught.value)
    assert words in str(caught.value)
    assert "| the last words" in str(caught.value)
    assert "micro_batch" in caught.value.fix


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """A shell's background job, and so the tests in one, starts with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_whatever_interrupts_the_parent_ends_the_whole_group(tmp_path: Path) -> None:
    def interrupt() -> None:
        _pids(tmp_path)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_apart(sleep, tmp_path)
    assert not any(_runs(pid) for pid in _pids(tmp_path))


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_stage_process import run_apart, sleep
run_apart(sleep, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_it_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), str(TESTS)])
    stage, below = _pids(tmp_path)
    parent.kill()
    parent.wait()
    _until(lambda: not _runs(stage))
    if _runs(below):  # where the kernel was quicker than the end of the pipe
        os.kill(below, signal.SIGKILL)


@pytest.mark.slow
def test_its_group_ends_with_the_pipe_of_its_request(tmp_path: Path) -> None:
    """What holds where the kernel does not tell a process of its parent's death."""
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "cdpo_core.stage_process", str(writing), str(os.getpid())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, pass_fds=(writing,), env=environment, start_new_session=True
    )
    request = {
        "compute": ["apart_stages", "sleep"],
        "slice": {},
        "inputs": {},
        "out": str(tmp_path),
        "runtime": {"device": "cpu", "threads": 1, "micro_batch": 0, "scratch": str(tmp_path)},
        "level": logging.INFO,
    }
    assert child.stdin is not None
    child.stdin.write(json.dumps(request).encode() + b"\n")
    child.stdin.flush()
    _, below = _pids(tmp_path)
    child.stdin.close()
    assert child.wait() == -signal.SIGKILL
    _until(lambda: not _runs(below))
    os.close(reading)
    os.close(writing)


@pytest.mark.slow
def test_a_stage_is_the_same_bytes_in_a_process_of_its_own(tmp_path: Path) -> None:
    settings = {"testbed.prompts": "300", "testbed.demonstrations": "400", "sft.steps": "20"}
    config = load_config("tiny", settings)

    def chain(folder: Path, own_process: bool) -> tuple[list[StageResult], LocalStore]:
        store, runtime = LocalStore(folder / "store"), Runtime(threads=1, own_process=own_process)

        def run(stage: Stage, inputs: dict[str, Any], **extra: Any) -> StageResult:
            return compute_stage(stage, pick(config, stage.fields, **extra), inputs, store, runtime, folder / "scratch")

        data = run(pipeline.TESTBED_DATA, {})
        return [data, run(pipeline.SFT, {"data": data.ref}, base="scratch")], store

    here, _ = chain(tmp_path / "here", False)
    apart, store = chain(tmp_path / "apart", True)
    assert [(done.key, done.ref.digest) for done in apart] == [(done.key, done.ref.digest) for done in here]
    assert resolve(apart[1].ref, store).is_dir()
    assert manifest_of(apart[1].ref, store).cpu_seconds > 0.2
    assert not list((tmp_path / "apart" / "scratch").iterdir())


def _pids(scratch: Path) -> tuple[int, int]:
    _until(lambda: (scratch / "pids").exists())
    stage, below = (scratch / "pids").read_text().split()
    return int(stage), int(below)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
