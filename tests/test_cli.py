"""The command line: help, exit codes, the form of errors, the closing words; the flows are stood in for."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdpo_core.config import ExperimentConfig
from cdpo_core.errors import InputError, TrainingError
from flows.cli import main
from flows.command_line import split_tokens
from flows.sweep import ChildrenFailed
from flows.terminal import PlainLines, StageProgress

ESTIMATE = {"mean": 0.5, "low": 0.4, "high": 0.6}
FIGURES = {"reward": ESTIMATE, "cost": {"mean": -0.7, "low": -0.8, "high": -0.6}, "safe_rate": ESTIMATE, "kl": ESTIMATE}
CERTIFICATE = {
    "mean": -0.7, "upper": -0.55, "delta": 0.05, "method": "t", "prompts": 800, "passed": True, "spent": 1
}  # fmt: skip
POLICY = {"uri": "/store/stages/round/0123abcd.json", "digest": "d" * 64, "kind": "policy"}


def record(status: str = "certified") -> dict[str, Any]:
    """A result record (DESIGN: Result)."""
    passed = {**CERTIFICATE, "passed": status == "certified"} if status != "infeasible" else None
    return {
        "status": status,
        "reason": "the lowest mean cost of a trained policy is -0.3",
        "limit": -0.5,
        "lambda": 0.83,
        "rounds": [
            {
                "round": 1, "lambda": 0.83, "reward": 0.5, "cost": -0.7, "cost_upper": -0.6, "kl": 0.4, "seconds": 12.3
            }
        ],
        "constraints": [{"name": "harm", "limit": -0.5, "lambda": 0.83, "cost": -0.7, "certificate": passed}],
        "certificate": passed,
        "reachable": {"at_zero": 0.3, "floor": -1.4},
        "test": FIGURES,
        "baselines": {"reference": FIGURES, "DPO (λ = 0)": FIGURES},
        "scorers": {"reward": {"accuracy": 0.81, "low": 0.79, "high": 0.83, "pairs": 400, "prompts": 100}},
        "oracle": {
            "captured": 0.953, "captured_ceiling": 0.981, "scorer_ceiling": 0.967, "support_mass": 0.998,
            "true_reward": 0.52, "true_cost": -0.66, "optimal_reward": 0.6, "optimal_cost": -0.5, "optimal_lambda": 0.7,
        },
        "stages": [{"name": "data", "seconds": 2.0, "cached": False}, {"name": "sft", "seconds": 0.1, "cached": True}],
        "policy": POLICY,
        "tracking": {"run_id": "abc", "uri": "sqlite:///mlflow.db", "url": ""},
        "seed": 0,
        "versions": {},
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A state folder of the test's own, wide output, and the logging configuration put back."""
    monkeypatch.setenv("CDPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    before = {name: list(logging.getLogger(name).handlers) for name in _logger_names()}
    yield
    logging.captureWarnings(False)
    for name in _logger_names():
        logging.getLogger(name).handlers[:] = before.get(name, [])


def _logger_names() -> list[str]:
    return ["", *logging.root.manager.loggerDict]


@pytest.fixture
def flows(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The flows, replaced by what the test sets: `outcome` is returned, or raised if it is an exception."""
    stage = types.SimpleNamespace(outcome=record(), configs=[], swept=[])

    def run_experiment(config: ExperimentConfig, *, progress: Any) -> Any:
        stage.configs.append(config)
        progress("reference policy", 1, 10)
        progress("reference policy", 1, 1)
        progress("data", 1, 1)
        if isinstance(stage.outcome, BaseException):
            raise stage.outcome
        return stage.outcome

    def run_sweep(config: ExperimentConfig, *varied: Any, at_once: int | None, progress: Any) -> Any:
        stage.swept.append((*varied, at_once))
        return run_experiment(config, progress=progress)

    def plan_experiment(config: ExperimentConfig) -> Any:
        return stage.outcome

    replaced = {
        "experiment": {"run_experiment": run_experiment},
        "sweep": {"run_sweep": run_sweep, "ChildrenFailed": ChildrenFailed},
        "plan": {"plan_experiment": plan_experiment},
        "preflight": {"check_before_run": lambda config, **options: None},
    }
    for name, members in replaced.items():
        module = types.ModuleType(f"flows.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, f"flows.{name}", module)
    return stage


def test_help_is_quick_and_lists_the_commands_and_examples() -> None:
    code = "import sys; from flows.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("run", "plan", "sweep", "check-data", "export", "sample", "up", "doctor", "cdpo run testbed"):
        assert word in done.stdout
    heavy = {"torch", "transformers", "prefect", "mlflow", "pandas", "numpy", "datasets", "matplotlib"}
    assert heavy & set(done.stderr.split()) == set()


def test_the_help_of_every_command_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("", "run", "plan", "sweep", "check-data", "export", "sample", "up", "doctor"):
        assert main([*command.split(), "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_certified_run(flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "run",
        "tiny",
        "--limit",
        "-1",
        "--seed",
        "3",
        "--store",
        "s",
        "--dpo.beta",
        "0.25",
        "--json",
        "r.json",
    ]
    assert main(arguments) == 0
    config = flows.configs[0]
    assert (config.constraints[0].limit, config.seed, config.store.uri, config.dpo.beta) == (-1.0, 3, "s", 0.25)
    assert json.loads(Path("r.json").read_text())["status"] == "certified"
    out, err = capsys.readouterr()
    assert [line.split(" in ")[0] for line in err.splitlines()] == [
        "checks …", "checks: done", "reference policy …", "reference policy: done", "data: ready",
    ]  # fmt: skip
    for words in (
        "reference",
        "DPO (λ = 0)",
        "C-DPO (λ = 0.83)",
        "-0.70 [-0.80, -0.60]",
        "50 %",
        "0.810 [0.790, 0.830]",
    ):
        assert words in out
    for words in ("captured 0.953", "Certified: harm ≤ -0.5", "cdpo export round/0123abcd --store /store DIR", "abc"):
        assert words in out
    assert list(Path("home/logs").glob("run-*.log"))


@pytest.mark.parametrize("status", ["not_certified", "infeasible"])
def test_a_run_without_a_certified_policy_is_told_apart(
    flows: types.SimpleNamespace, status: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flows.outcome = record(status)
    if status == "infeasible":
        flows.outcome["oracle"] |= {"captured": None, "true_reward": None, "true_cost": None}
    assert main(["run", "tiny", "--json", "r.json"]) == 3
    assert json.loads(Path("r.json").read_text())["status"] == status
    assert status.replace("_", " ").capitalize() in capsys.readouterr().out


def test_several_constraints_get_a_table_of_their_own(
    flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    flows.outcome = record()
    flows.outcome["constraints"].append(
        {"name": "privacy", "limit": 0.1, "lambda": 0.0, "cost": -0.2, "certificate": CERTIFICATE}
    )
    flows.outcome["rounds"][0] |= {"lambda": [0.83, 0.0], "cost": [-0.7, -0.2], "cost_upper": [-0.6, -0.1]}
    assert main(["run", "tiny"]) == 0
    assert "privacy" in capsys.readouterr().out


def test_failures_and_their_codes(flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for outcome, code, said in [
        (TrainingError("the loss is not finite", where="stage sft, step 7", fix="lower it"), 1, "stage sft, step 7"),
        (InputError("no such data", where="x.jsonl", fix="give one"), 2, "x.jsonl"),
        (RuntimeError("boom\nmore"), 1, "unexpected RuntimeError: boom"),
    ]:
        flows.outcome = outcome
        assert main(["run", "tiny", "--json", "r.json"]) == code
        err = capsys.readouterr().err
        shown = err[err.index("error:") :]
        assert said in shown
        assert len(shown.splitlines()) <= 12
        assert "Traceback" not in err
        assert not Path("r.json").exists()


def test_debug_adds_the_traceback_and_the_log_has_it_anyway(
    flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    flows.outcome = RuntimeError("boom")
    assert main(["run", "tiny", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert "Traceback" in next(Path("home/logs").glob("run-*.log")).read_text()


def test_an_interrupt_says_that_the_same_command_continues(
    flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    flows.outcome = KeyboardInterrupt()
    assert main(["run", "tiny"]) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run", "CONFIG"),
        ("run tiny more", "more"),
        ("run tiny --bogus 1", "--bogus"),
        ("rnu tiny", 'Did you mean "run"?'),
        ("run tsetbed", "did you mean 'testbed'?"),
        ("run tiny --limit nan", "finite"),
        ("run tiny --dpo.beta -1", "greater than 0"),
        ("run tiny --dpo.bta 1", "did you mean dpo.beta?"),
        ("run tiny --dpo.beta", "no value"),
        ("run tiny --dpo.beta 1 --dpo.beta 2", "given twice"),
        ("run tiny --json /nowhere/r.json", "/nowhere/r.json"),
        ("run tiny --json .", "folder"),
        ("sweep tiny", "--limits"),
        ("sweep tiny --limits -1,x", "'x' is not a number"),
        ("sweep tiny --limits -1,nan", "finite"),
        ("sweep tiny --limits -1,-1.0", "given twice"),
        ("sweep tiny --limits -1 --set beta", "no setting"),
        ("sweep tiny --limits -1 --seeds 0,x", "'x' is no seed"),
        ("sweep tiny --limits -1 --at-once -1", "at-once"),
        ("sweep tiny --limits -1 --set dpo.beta=1,-1", "greater than 0"),
        ("check-data nowhere.jsonl", "nowhere.jsonl"),
        ("export nothing out", "no reference"),
        ("export /nowhere/stages/round/1.json out", "/nowhere/stages/round/1.json"),
        ("sample ./nowhere hello", "no such folder"),
        ("sample x", "needs a prompt"),
        ("up --dpo.beta 1", "no config"),
        ("up --prefect-port x", "x"),
    ],
)
def test_bad_input_exits_2_with_a_short_error(
    flows: types.SimpleNamespace, arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "fix:" in err
    assert len(err.splitlines()) <= 12
    assert flows.configs == []


def _point(limit: float, settings: dict[str, Any]) -> dict[str, Any]:
    point = {"limit": limit, "settings": settings, "status": "certified", "lambda": 0.8, "true_cost": 0.1}
    return {**point, "reward": ESTIMATE, "cost": ESTIMATE, "certificate": {"mean": -0.6, "upper": -0.52}}


def test_a_sweep_over_limits(flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {"limit": -0.5, "settings": {}, "lambda": 0.8, "policy": POLICY, "test": FIGURES}
    flows.outcome = {"children": [record()], "failed": [], "frontier": [_point(-0.5, {})], "chosen": chosen}
    assert main(["sweep", "tiny", "--limits", "-1,-0.5", "--json", "r.json"]) == 0
    assert flows.swept == [([-1.0, -0.5], [], [], None)]
    assert set(json.loads(Path("r.json").read_text())) >= {"children", "frontier", "chosen"}
    out = capsys.readouterr().out
    assert "Chosen: the policy of limit -0.5, certified" in out
    assert "-0.52" in out


def test_a_sweep_over_seeds_and_settings_is_one(
    flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"seed": 1, "dpo.beta": 0.25}
    flows.outcome = {"children": [record()], "failed": [], "frontier": [_point(-1.0, settings)], "chosen": None}
    arguments = ["sweep", "tiny", "--limits=-1", "--seeds", "0,1", "--set", "dpo.beta=0.25,0.5", "--at-once", "3"]
    assert main(arguments) == 3
    assert flows.swept == [([-1.0], [0, 1], ["dpo.beta=0.25,0.5"], 3)]
    out = capsys.readouterr().out
    assert "dpo.beta" in out
    assert "0.25" in out
    assert "No policy is certified" in out


def test_a_sweep_with_a_failed_child_shows_the_others_and_exits_1(
    flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {"name": "tiny, harm ≤ -1", "settings": {}, "limit": -1.0, "error": "no room\n  where: /tmp"}
    result = {"children": [record()], "failed": [failed], "frontier": [_point(-0.5, {})], "chosen": None}
    flows.outcome = ChildrenFailed.of(result)
    assert main(["sweep", "tiny", "--limits", "-1,-0.5", "--json", "r.json"]) == 1
    assert json.loads(Path("r.json").read_text()) == result
    out, err = capsys.readouterr()
    assert "-0.52" in out
    assert "Failed: tiny, harm ≤ -1: no room" in out
    assert "error: 1 of 2 children failed: tiny, harm ≤ -1 (no room)" in err


def test_a_plan(flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        {"name": "data", "cached": True, "estimate": 2.0},
        {"name": "sft", "cached": False, "estimate": 30.0},
        {"name": "round", "cached": False, "estimate": None},
    ]
    flows.outcome = {"stages": stages, "margin": [0.2], "memory": "50 MiB", "warnings": ["the limit is low"]}
    assert main(["plan", "tiny"]) == 0
    out = capsys.readouterr().out
    for words in (
        "there already",
        "to compute",
        "2 of 3 stages to compute, at least 30 s",
        "0.200",
        "warning: the limit is low",
    ):
        assert words in out


def test_a_plan_of_any_name_without_earlier_runs(
    flows: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"name": "data", "cached": False, "estimate": None}]
    flows.outcome = {"stages": stages, "margin": None, "memory": "", "warnings": []}
    Path("any.yaml").write_text("name: 'a [/b]'\nconstraints: [{limit: 0}]\n")
    assert main(["plan", "any.yaml"]) == 0
    out = capsys.readouterr().out
    assert "a [/b]: what a run would do" in out
    assert "1 of 1 stages to compute; nothing like them ran in this store yet" in out


def test_fields_are_taken_out_of_the_arguments_with_any_value() -> None:
    tokens, fields = split_tokens(
        ["run", "x", "--dpo.beta=-1", "--a.b", "-2", "--debug", "--json", "r.json", "--", "--c.d"]
    )
    assert tokens == ["run", "x", "--json", "r.json", "--", "--c.d"]
    assert fields == {"dpo.beta": "-1", "a.b": "-2"}


def test_plain_progress_prints_starts_ends_and_little_between(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    console = Console(record=True, width=100)
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("flows.terminal.time.monotonic", lambda: float(next(clock)))
    progress = StageProgress(PlainLines(console))
    for done in range(5):
        progress("sft", done, 4)
    progress("sft", 1, 1)
    progress("scores", 1, 1)
    progress("round", 1, 3)
    progress("data", 1, 1)
    lines = console.export_text().splitlines()
    assert lines[0] == "sft …"
    assert lines[-4:-2] == ["scores: ready", "round …"]
    assert lines[-2].startswith("round: done in")
    assert lines[-1] == "data: ready"
    assert sum(" of 4 " in line for line in lines) == 2


def test_our_warnings_are_shown_and_the_libraries_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    from flows.terminal import log_to_file

    path = log_to_file(Path("logs"), "run")
    logging.getLogger("cdpo_core.stages").warning("a corrupt artifact was set aside")
    logging.getLogger("prefect.flow_runs").error("noise of a library")
    logging.getLogger("cdpo_core.stages").info("only for the file")
    assert capsys.readouterr().err == "warning: a corrupt artifact was set aside\n"
    for words in ("a corrupt artifact was set aside", "noise of a library", "only for the file"):
        assert words in path.read_text()


def test_doctor_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["doctor", "--store.uri", str(tmp_path / "store")]) == 1
    out = capsys.readouterr().out
    assert "✓ store" in out
    assert "✗ MLflow" in out
    assert "does not answer" in out
    assert "fix:" in out
