"""What moves a stage's key and what does not: fields that do not act, notes beside weights, wording, the machine."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_kit import limited
from safetensors.numpy import save_file

import cdpo_core
from cdpo_core import errors, pipeline
from cdpo_core.artifacts import ArtifactRef, external_ref
from cdpo_core.code_version import MESSAGES, source_version
from cdpo_core.local_store import LocalStore
from cdpo_core.models.checkpoints import weights_format
from cdpo_core.pipeline import machine_fields
from cdpo_core.provenance import device_kind
from cdpo_core.stages import Runtime, Stage, slice_of, stage_key
from tasks.preference_models import train_scorers
from tasks.workbench import Workbench

FLOAT, HALF = ({"policy": name, "scorers": name} for name in ("float32", "bfloat16"))


def key(stage: Stage, sections: dict[str, Any], **extra: Any) -> str:
    return stage_key(stage, slice_of(stage, limited(sections), **extra), {})


SFT_CHANGES = {
    "steps": {"sft": {"steps": 7}},
    "batch": {"sft": {"batch": 7}},
    "learning rate": {"sft": {"learning_rate": 0.1}},
    "width": {"policy": {"hidden_size": 128}},
    "vocabulary": {"policy": {"vocabulary_size": 512}},
    "seed": {"seed": 9},
    "template": {"policy": {"template": "Q: {prompt}"}},
    "dtype": {"policy": {"dtype": "bfloat16"}},
    "code": {"policy": {"trust_remote_code": True}},
}
TRAINING, SHAPE, LOADING = {"steps", "batch", "learning rate"}, {"width", "vocabulary"}, {"code"}


@pytest.mark.parametrize(
    ("base", "train", "acting"),
    [
        ("scratch", True, set(SFT_CHANGES) - LOADING),
        ("loaded", True, set(SFT_CHANGES) - SHAPE),
        ("loaded", False, set(SFT_CHANGES) - SHAPE - TRAINING - {"seed"}),
    ],
)
@pytest.mark.parametrize("change", SFT_CHANGES)
def test_the_reference_s_key_moves_by_what_acts(base: str, train: bool, acting: set[str], change: str) -> None:
    before = {"sft": {"train": train}}
    after = {
        section: {**before.get(section, {}), **fields} if isinstance(fields, dict) else fields
        for section, fields in {**before, **SFT_CHANGES[change]}.items()
    }
    moved = key(pipeline.SFT, before, base=base) != key(pipeline.SFT, after, base=base)
    assert moved is (change in acting)


@pytest.mark.parametrize(
    ("change", "acts_in"),
    [
        ({"reward": {"epochs": 1}}, {True}),
        ({"reward": {"optimizer": "adamw"}}, {True}),
        ({"seed": 4}, {True}),
        ({"policy": {"max_response_tokens": 7}}, {True, False}),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_a_scorer_s_key_moves_by_what_acts(change: dict[str, Any], acts_in: set[bool], train: bool) -> None:
    told = {"base": "loaded", "train": train, "sign": "harmful", "heads": []}
    moved = key(pipeline.SCORERS, {}, **told) != key(pipeline.SCORERS, change, **told)
    assert moved is (train in acts_in)


def test_the_sign_acts_on_ready_scorers_only_and_the_end_of_an_anchor_on_anchored_rounds() -> None:
    told = {"base": "loaded", "heads": []}
    for train in (True, False):
        keys = {key(pipeline.SCORERS, {}, **told, train=train, sign=sign) for sign in ("harmful", "safe")}
        assert len(keys) == (1 if train else 2)
    for anchor, different in ((0.0, 1), (0.1, 2)):
        keys = {key(pipeline.ROUND, {"dpo": {"anchor": anchor, "anchor_end": end}}) for end in (0.0, 0.5)}
        assert len(keys) == different


def test_what_does_not_act_reaches_no_stage() -> None:
    slice_ = slice_of(pipeline.SFT, limited({"sft": {"train": False}}), base="loaded")
    assert slice_.sft.as_dict() == {"train": False}
    with pytest.raises(AttributeError, match="hidden_size"):
        _ = slice_.policy.hidden_size


class Noting(Workbench):
    """A workbench that notes what each stage would read."""

    def run(self, stage: Stage, inputs: Mapping[str, ArtifactRef], label: str = "", **extra: Any) -> ArtifactRef:
        self.read = set(inputs)
        return ArtifactRef(uri="", digest="", kind=stage.kind)


@pytest.mark.parametrize(("outside", "read"), [(False, {"data", "sft"}), (True, {"data", "base"})])
def test_a_scorer_from_outside_does_not_depend_on_the_reference(outside: bool, read: set[str], tmp_path: Path) -> None:
    base = str(model_folder(tmp_path / "model")) if outside else "sft"
    config = limited({"reward": {"base": base}})
    bench = Noting(config, LocalStore(tmp_path / "store"), tmp_path)
    ref = ArtifactRef(uri="", digest="", kind="")
    train_scorers(bench, ref, ref)
    assert bench.read == read


# Model folders


def model_folder(folder: Path, dtype: str = "", weights: str = "float32") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": dtype} if dtype else {}))
    save_file({"w": np.zeros(2, weights)}, folder / "model.safetensors")
    (folder / "merges.txt").write_text("a b")
    return folder


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("NOTES.txt", False),
        ("README.md", False),
        ("pytorch_model.bin", False),
        ("runs/events.json", False),
        ("merges.txt", True),
        ("config.json", True),
        ("generation_config.json", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tool.jinja", True),
        ("model.safetensors", True),
        ("modeling_own.py", True),
    ],
)
def test_only_what_loading_reads_makes_another_model(name: str, counts: bool, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    before = external_ref(folder).digest
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("other")
    assert (external_ref(folder).digest != before) is counts


def test_code_of_a_model_may_read_any_file(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "modeling_own.py").write_text("")
    before = external_ref(folder).digest
    (folder / "NOTES.txt").write_text("read by the code, for all we know")
    assert external_ref(folder).digest != before


# Code


def test_the_wording_of_errors_is_in_no_key_and_the_machine_s_use_is_in_all(tmp_path: Path) -> None:
    copy = shutil.copytree(Path(cdpo_core.__file__).parent, tmp_path / "cdpo_core")

    def version(module: str) -> str:
        return source_version(module, {"cdpo_core": copy})

    before = [version("cdpo_core.learning.sft"), version("cdpo_core.machine")]
    (copy / "errors.py").write_text((copy / "errors.py").read_text().replace("exit_code = 2", "exit_code = 4"))
    assert [version("cdpo_core.learning.sft"), version("cdpo_core.machine")] == before
    machine = (copy / "machine.py").read_text()
    assert "warn_only=True" in machine
    (copy / "machine.py").write_text(machine.replace("warn_only=True", "warn_only=False"))
    assert version("cdpo_core.machine") != before[1]


def test_a_key_holds_how_a_stage_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(pipeline.SCORES, {})
    monkeypatch.setattr("cdpo_core.stages.CALLER", "cdpo_core.scratch")
    assert key(pipeline.SCORES, {}) != before


def test_what_only_words_errors_defines_nothing_else() -> None:
    assert {errors.__name__} == MESSAGES
    own = [item for item in vars(errors).values() if getattr(item, "__module__", "") == errors.__name__]
    assert [item.__name__ for item in own if not (inspect.isclass(item) and issubclass(item, Exception))] == [
        "_rebuild"
    ]


# The machine


@pytest.mark.parametrize("stage", [pipeline.RESPONSES, pipeline.SCORES, pipeline.ROUND, pipeline.ENUMERATION])
def test_in_float32_the_machine_is_in_no_key_and_in_bfloat16_what_forms_sums_is(stage: Stage) -> None:
    machines = [Runtime(micro_batch=4, threads=1), Runtime(micro_batch=8, threads=1), Runtime(micro_batch=4, threads=2)]
    assert [machine_fields(stage, FLOAT, machine) for machine in machines] == [{}, {}, {}]
    fields = [machine_fields(stage, HALF, machine)["machine"] for machine in machines]
    assert fields[0] == {"device": device_kind("cpu"), "micro_batch": 4, "threads": 1}
    assert len({key(stage, {}, machine=item) for item in fields}) == 3


def test_only_the_models_that_a_stage_computes_with_count() -> None:
    mixed = {"policy": "float32", "scorers": "bfloat16, float32"}
    assert machine_fields(pipeline.RESPONSES, mixed, Runtime()) == {}
    assert machine_fields(pipeline.SCORES, mixed, Runtime())
    assert machine_fields(pipeline.SPLITS, HALF, Runtime()) == {}


def test_every_stage_that_loads_a_model_says_so() -> None:
    stages = {item.name: item for item in vars(pipeline).values() if isinstance(item, Stage)}
    without = {name for name, stage in stages.items() if not stage.models}
    assert without == {"data", "splits", "judgement"}


@pytest.mark.parametrize(
    ("said", "weights", "found"),
    [("bfloat16", "float32", "bfloat16"), ("", "float16", "float16"), ("", "float32", "float32")],
)
def test_the_number_format_of_a_folder(said: str, weights: str, found: str, tmp_path: Path) -> None:
    assert weights_format(model_folder(tmp_path / "model", said, weights)) == found


def test_an_experiment_s_micro_batch_is_in_its_keys_in_bfloat16_only(tmp_path: Path) -> None:
    model_folder(tmp_path / "cost", "bfloat16")

    def slices(**sections: Any) -> list[dict[str, Any]]:
        config = limited({"compute": {"device": "cpu", "micro_batch": 4}, **sections})
        bench = Workbench(config, LocalStore(tmp_path / "store"), tmp_path)
        return [bench.slice_of(stage, {}).as_dict() for stage in (pipeline.RESPONSES, pipeline.SCORES)]

    assert ["machine" in values for values in slices()] == [False, False]
    assert ["machine" in values for values in slices(policy={"dtype": "bfloat16"})] == [True, True]
    harm = {"name": "harm", "base": str(tmp_path / "cost"), "train": False, "limit": 0}
    assert ["machine" in values for values in slices(constraints=[harm])] == [False, True]
