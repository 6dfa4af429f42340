"""Bad input through the command line: the exit code, one short error that names what, where and the fix, nothing begun.

What only a run can show (a loss that is not finite, a corrupted object, a limit out of reach) is in
test_bad_input_runs.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line_kit import Said, command_line
from safetensors.torch import save_file
from servers_s3 import free_port
from test_data_input import content, empty_folder, everywhere, lines, pair_rows, repeated, write_lines

Arguments = Callable[[Path], list[str]]

CONFIG = "xstest"  # splits that 60 prompts are enough for


def good_data(folder: Path) -> Path:
    return write_lines(folder / "good.jsonl", pair_rows())


def data(write: Callable[[Path], Path | str], *options: str) -> Arguments:
    """`cdpo run` on the data that `write` makes."""
    return lambda folder: ["run", CONFIG, "--data.source", str(write(folder)), *options]


def options(*words: str) -> Arguments:
    """`cdpo run` on good data with these options; `{folder}` is the test's own."""
    return lambda folder: [word.replace("{folder}", str(folder)) for word in data(good_data, *words)(folder)]


def config(text: str) -> Arguments:
    """`cdpo run` of a config file of this text."""

    def write(folder: Path) -> list[str]:
        (folder / "my.yaml").write_text(text)
        limit = [] if "constraints" in text else ["--limit", "0"]
        return ["run", str(folder / "my.yaml"), "--data.source", str(good_data(folder)), *limit]

    return write


def model(field: str, *words: str, **making: object) -> Arguments:
    """`cdpo run` with a model folder, made as said, in a field."""
    return lambda folder: options(f"--{field}", str(model_folder(folder, **making)), *words)(folder)


def model_folder(
    folder: Path,
    weights: str = "model.safetensors",
    cut: int = 0,
    architecture: str = "LlamaForCausalLM",
    tokenizer: bool = True,
) -> Path:
    """What a Hugging Face folder looks like from outside; `cut` bytes of its weights are missing."""
    path = folder / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": [architecture]}))
    save_file({"weight": torch.zeros(8, 8)}, path / weights)
    (path / weights).write_bytes((path / weights).read_bytes()[: -cut or None])
    if tokenizer:
        (path / "tokenizer.json").write_text("{}")
    return path


def scorer_folder(folder: Path) -> Path:
    path = model_folder(folder)
    names = ("scale", "shift", "form", "template", "max_prompt_tokens", "max_response_tokens", "pooled")
    (path / "scorer.json").write_text(json.dumps({"heads": ["reward", "bias"], **dict.fromkeys(names)}))
    save_file({"weight": torch.zeros(2, 8), "bias": torch.zeros(2)}, path / "heads.safetensors")
    return path


def cut_scorer(folder: Path) -> Path:
    heads = scorer_folder(folder) / "heads.safetensors"
    heads.write_bytes(heads.read_bytes()[:-10])
    return heads.parent


def below_a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--store", str(folder / "file" / "store")]


READY = ("--reward.train", "false", "--constraints.0.base", "sft")

# name: (arguments, a piece of what was wrong, a piece of where, a piece of the fix)
ROWS: dict[str, tuple[Arguments, str, str, str]] = {
    # The data.
    "source empty": (data(lambda folder: ""), "no data is given", "data.source", "--data.source PATH"),
    "missing file": (
        data(lambda folder: folder / "none.jsonl"), "no such file or folder", "data.source", "--data.source PATH"
    ),
    "folder without data": (
        data(empty_folder), "holds no .jsonl, .parquet or .csv files", "/model", "the folder that holds the data"
    ),
    "binary file": (
        data(content("pairs.jsonl", b"\x80\x02\xff\x00" * 50)), "not UTF-8", "pairs.jsonl:1", "UTF-8"
    ),
    "file of another type": (data(content("pairs.xlsx", b"PK")), "type .xlsx", "pairs.xlsx", ".parquet"),
    "not JSON at a line": (
        data(content("pairs.jsonl", lines(*[json.dumps(row) for row in pair_rows(1)], "{"))), "not JSON",
        "pairs.jsonl:3", "line",
    ),
    "missing column": (
        data(content("pairs.csv", lines("prompt,response_0,better_response_id", "a,b,0"))),
        "missing for the format pku_saferlhf: response_1", "pairs.csv", "",
    ),
    "wrong type in many rows": (
        data(everywhere(0.1, prompt=12)), "12 ", "pairs.jsonl:1", "data.max_quarantined (now 0.02)",
    ),
    "both labels absent": (
        data(everywhere(0.1, better_response_id=None, safer_response_id=None)), "12 no label", "pairs.jsonl:1",
        "data.max_quarantined (now 0.02)",
    ),
    "empty responses": (
        data(everywhere(0.05, response_1=" ")), "6 empty response", "pairs.jsonl:1 (empty response)", "these rows"
    ),
    "too many duplicates": (data(repeated), "5 duplicate", "pairs.jsonl:121", "remove these rows"),
    "prompts too long": (
        data(everywhere(0.1, prompt="long " * 1000)), "12 prompt too long", "pairs.jsonl:1",
        "data.max_prompt_characters (now 4,000)",
    ),
    "all responses identical": (
        data(everywhere(1.0, response_0="Yes.", response_1="Yes.")), "all responses are identical", "pairs.jsonl",
        "different responses",
    ),
    "too few prompts to split": (
        data(lambda folder: write_lines(folder / "pairs.jsonl", pair_rows(9))), "9 prompts leave",
        "selection 1 (needs 4)", "data.splits",
    ),
    "no label to learn from": (
        data(everywhere(1.0, better_response_id=None, safer_response_id=1)), "no pair says which response is better",
        "pairs.jsonl", "reward.train false",
    ),
    "hub id offline": (data(lambda folder: "org/pairs"), "org/pairs is no file", "data.source", ""),
    # The config.
    "unknown preset": (lambda folder: ["run", "tini"], "did you mean 'tiny'", "CONFIG", "path of a YAML file"),
    "missing config": (lambda folder: ["run", "my.yaml"], "no such config file", "my.yaml", "check the path"),
    "broken YAML": (config("dpo:\n  beta: [1\nname: x\n"), "not valid YAML", "my.yaml, line 3", "correct that line"),
    "unknown field": (config("dpo:\n  betta: 1\n"), "did you mean dpo.beta?", "my.yaml, line 2", "beta, labels"),
    "unknown section": (config("dp0:\n  beta: 1\n"), "no field dp0", "my.yaml, line 1", "dpo"),
    "field given twice": (config("seed: 1\nseed: 2\n"), "seed is given twice", "lines 1 and 2", "keep one"),
    "two constraints of one name": (
        config("constraints:\n- {name: harm, limit: 0}\n- {name: harm, limit: 0}\n"), "share a name (harm, harm)",
        "my.yaml, line 1",
        "a name of its own",
    ),
    "NaN limit in the file": (
        config("constraints:\n- limit: .nan\n"), "constraints.0.limit must be a finite number", "my.yaml, line 2",
        "mean cost",
    ),
    "no limit": (config("constraints:\n- name: harm\n"), "0.limit: a limit is required", "my.yaml, line 2", "--limit"),
    "empty limit": (options("--limit", ""), "a limit is required", "--constraints.0.limit", "--limit -0.5"),
    "NaN limit": (options("--limit", "nan"), "finite number, not nan", "--constraints.0.limit", "mean cost"),
    "limit not a number": (options("--limit", "low"), "must be a number, not low", "--constraints.0.limit", ""),
    "constraint out of range": (
        options("--constraints.2.limit", "0"), "a list of 1", "--constraints.2.limit", "count from 0"
    ),
    "negative beta": (options("--dpo.beta", "-1"), "must be greater than 0, not -1", "--dpo.beta", "pull"),
    "negative seed": (options("--seed", "-1"), "greater than or equal to 0, not -1", "--seed", "random"),
    "splits that do not add up": (
        options("--data.splits.policy", "0.9"), "add up to 1.7, not 1", "--data.splits.policy", "must add up to 1"
    ),
    "more responses than samples": (
        options("--dpo.responses_per_prompt", "32"), "must not exceed sampling.reference",
        "--dpo.responses_per_prompt", "responses_per_prompt",
    ),
    "template without a place": (options("--policy.template", "hello"), "{prompt}", "--policy.template", "chat"),
    "labels that the data does not have": (
        options("--constraints.0.labels", "bias"), "no labels named 'bias'", "constraints.0.labels", "harm"
    ),
    # The models.
    "missing model folder": (
        options("--policy.base", "{folder}/none"), "policy.base: the model folder does not exist", "/none", "hub id"
    ),
    "folder that is no model": (
        options("--policy.base", "{folder}"), "policy.base: the model folder has no config.json", "", "save_pretrained"
    ),
    "weights only as pickle": (
        model("policy.base", weights="pytorch_model.bin"), "only as pickle (pytorch_model.bin)", "/model",
        "save_pretrained",
    ),
    "truncated weights": (
        model("policy.base", cut=100), "policy.base: the weights are cut short", "model.safetensors", "again"
    ),
    "model without a tokenizer": (model("policy.base", tokenizer=False), "no tokenizer", "/model", "tokenizer.json"),
    "hub model offline": (
        options("--policy.base", "org/model"), "policy.base: the model is not in the local cache", "org/model",
        "HF_HUB_OFFLINE",
    ),
    "scratch policy without training": (
        options("--sft.train", "false"), "from scratch needs training", "sft.train", "policy.base"
    ),
    "ready reward model not given": (
        options("--reward.train", "false"), "its base 'sft' is no ready model", "reward.base", "ready model"
    ),
    "ready cost model not given": (
        options("--constraints.0.train", "false"), "its base 'reward' is no ready model", "constraints.0.base",
        "ready model",
    ),
    "ready scorer missing": (
        options("--reward.base", "{folder}/none", *READY), "reward.base: the model folder does not exist", "/none",
        "check the path",
    ),
    "ready scorer truncated": (
        model("reward.base", *READY, cut=1, architecture="LlamaForSequenceClassification"),
        "reward.base: the weights are cut short", "model.safetensors", "again",
    ),
    "ready scorer's head truncated": (
        lambda folder: options("--reward.base", str(cut_scorer(folder)), *READY)(folder),
        "reward.base: the weights are cut short", "heads.safetensors", "again",
    ),
    "ready scorer without a head": (
        model("reward.base", *READY), "reward.base: the model has no score head", "/model", "set train: true"
    ),
    "ready scorer of another name": (
        lambda folder: options(
            "--constraints.0.base", str(scorer_folder(folder)), "--constraints.0.train", "false"
        )(folder),
        "no head named 'harm', but reward, bias", "/model", "name the constraint",
    ),
    # The machine and the servers.
    "no CUDA device": (options("--compute.device", "cuda"), "no CUDA device", "compute.device = cuda", "`cpu`"),
    "store of an unknown kind": (options("--store", "ftp://host/x"), "unknown kind of store", "ftp://host/x", "s3://"),
    "store that cannot be written": (
        lambda folder: options(*below_a_file(folder))(folder), "cannot be written", "/file/store", "--store"
    ),
    "unreachable store": (
        options("--store", "s3://bucket/x"), "the S3 server cannot be reached", "s3://bucket/x on http://127.0.0.1",
        "AWS_ENDPOINT_URL",
    ),
    "unreachable MLflow server": (
        options("--tracking.uri", f"http://127.0.0.1:{free_port()}"), "the MLflow server cannot be reached",
        "http://127.0.0.1", "--tracking.enabled false",
    ),
    "MLflow in a folder": (options("--tracking.uri", "{folder}/runs"), "not in a folder", "/runs", "sqlite://"),
    "result into a missing folder": (
        options("--json", "{folder}/none/r.json"), "cannot be written there: No such file", "--json", "a folder that"
    ),
    "result onto a folder": (options("--json", "{folder}"), "this is a folder", "--json", "name a file"),
    # The command line itself.
    "unknown option": (options("--betta", "1"), "--betta", "command line", "cdpo run --help"),
    "no value": (options("--dpo.beta"), "no value", "--dpo.beta", "VALUE"),
    "sweep over no number": (
        lambda folder: ["sweep", CONFIG, "--limits", "0,low"], "'low' is not a number", "--limits", "--limits -1"
    ),
    "sweep over NaN": (
        lambda folder: ["sweep", CONFIG, "--limits", "0,nan"], "must be a finite number", "--limits", "--limits -1"
    ),
    "data check of a missing file": (
        lambda folder: ["check-data", str(folder / "none.jsonl")], "no such file", "data.source", ""
    ),
    "export of an unknown policy": (
        lambda folder: ["export", "round/0123", str(folder / "out")], "nothing under this reference", "round/0123",
        "cdpo run",
    ),
    "sample of a missing folder": (
        lambda folder: ["sample", str(folder / "none"), "hello"], "no such folder", "/none", "model folder"
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no server, no flow: starting one is a failure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("flows.experiment.run_experiment", _started)
    monkeypatch.setattr("flows.sweep.run_sweep", _started)


def _started(*_: object, **__: object) -> None:
    raise AssertionError("a flow was started on bad input")


def assert_refused(said: Said, what: str, where: str, fix: str, home: Path) -> None:
    assert said.code == 2, said
    assert said.out == ""
    assert "Traceback" not in said.err
    assert len(said.error.splitlines()) <= 12
    told, place = said.error.split("\n  where: ")
    place, remedy = place.split("\n  fix:   ")
    assert what in told
    assert where in place
    assert fix in remedy
    assert remedy.strip()
    begun = [path for path in home.rglob("*") if path.is_file() and path.parent.name != "logs"]
    assert begun == []


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_refused_before_anything_starts(row: str, tmp_path: Path) -> None:
    arguments, *pieces = ROWS[row]
    home = tmp_path / "home"
    assert_refused(command_line(arguments(tmp_path), home), *pieces, home)


def test_plan_refuses_what_run_refuses(tmp_path: Path) -> None:
    words = options("--sft.train", "false")(tmp_path)
    run, plan = (command_line([name, *words[1:]], tmp_path / "home") for name in ("run", "plan"))
    assert (plan.code, plan.error) == (run.code, run.error)


def test_unreachable_prefect_server(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        said = command_line(options()(tmp_path), tmp_path / "home")
    pieces = "the Prefect server cannot be reached", "PREFECT_API_URL = http://127.0.0.1", "unset PREFECT_API_URL"
    assert_refused(said, *pieces, tmp_path / "home")


def test_the_state_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_HOME")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home"
    said = command_line(options()(tmp_path), home)
    assert_refused(said, "state folder cannot be written", str(home), "CDPO_HOME", tmp_path / "nothing")


def test_all_that_is_wrong_with_a_config_is_said_at_once(tmp_path: Path) -> None:
    text = "seed: -1\ndpo: {beta: 0, betta: 1, labels: x, anchor: .inf}\ndual: {rounds: many, step: -1, more: 1}\n"
    said = command_line(config(text)(tmp_path), tmp_path / "home")
    assert_refused(said, "8 things in this config cannot be used", "my.yaml", "", tmp_path / "home")
    assert "my.yaml, line 2: dpo.beta must be greater than 0, not 0" in said.err
    assert "and 2 more" in said.err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    said = command_line([*options("--dpo.beta", "-1")(tmp_path), "--debug"], tmp_path / "home")
    assert said.code == 2
    assert "Traceback" in said.err
