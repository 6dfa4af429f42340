"""What `cdpo sample` and `cdpo export` are given: a reference is looked for in the store, another name on the hub."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from command_line_kit import command_line

NO_HUB = "huggingface_hub.HfApi.model_info"


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and no working folder that holds something."""

    def unreachable(self: object, name: str, **options: object) -> None:
        logging.getLogger("huggingface_hub").warning("asked for %s", name)
        raise ConnectionError("a name that nobody knows")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(NO_HUB, unreachable)


@pytest.mark.parametrize("reference", ["scores/abc", "splits/0123abcd", "round/0123", "sft/xyz", "judgement/ABC"])
@pytest.mark.parametrize("command", [["sample", "{}", "hi"], ["export", "{}", "out"]])
def test_a_reference_is_looked_for_in_the_store_only(
    reference: str, command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = command_line([word.format(reference) for word in command], tmp_path / "home")
    assert said.code == 2
    assert "the store holds nothing under this reference" in said.err
    assert caplog.records == []


@pytest.mark.parametrize("name", ["REF", "org/model", "a b", "scores/model"])
def test_any_other_name_is_asked_of_the_hub_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    said = command_line(["sample", name, "hi"], tmp_path / "home")
    assert said.code == 2
    assert said.err.startswith("error: this is no reference and no folder, and no hub id that can be loaded")
    assert f"where: {name}" in said.err
    assert "as `cdpo run` prints it" in said.err
    assert len(said.err.splitlines()) == 3
    assert [record.message for record in caplog.records] == [f"asked for {name}"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("command", [["sample", "{}", "hi"], ["export", "{}", "out"]])
def test_a_store_that_does_not_answer_is_asked_impatiently(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import s3_connection, s3_store

    connect, asked = s3_connection.connect, []

    def noting(*, patient: bool) -> object:
        asked.append(patient)
        assert not patient, "the patient client is for a store that answers"
        return connect(patient=patient)

    monkeypatch.setattr(s3_connection, "connect", noting)
    monkeypatch.setattr(s3_store, "connect", noting)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    said = command_line([word.format("s3://bucket/x/stages/round/0123.json") for word in command], tmp_path / "home")
    assert said.code == 2
    assert "the S3 server cannot be reached" in said.err
    assert asked == [False]
