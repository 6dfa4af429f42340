"""The README's pictures, from what a run really printed and drew.

    export COLUMNS=104
    script -qec "make demo" /tmp/demo.txt                      # the terminal's own bytes, colours and all
    .venv/bin/cdpo sweep testbed --limits -0.9,-0.7,-0.5,-0.3
    .venv/bin/python benchmarks/pictures.py /tmp/demo.txt .cdpo/reports/testbed-KEY .cdpo/reports/sweep-testbed-KEY

The terminal becomes an SVG, which stays sharp and small and needs no font of another site. It shows what was printed,
but for the folder it ran in, which is called `~/cdpo`.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTH = 104
CELL = 12.2  # width of a character in rich's SVG, its units
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
CONTROL = re.compile(r"(\r|\n|\x1b\[[0-9;?]*[A-Za-z])")
TEXT = re.compile(r' x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"([^>]*)>((?:&#160;)*)([^<]*?)((?:&#160;)*)<')
RECORDER_LINES = ("Script started on ", "Script done on ")


def main() -> None:
    """Write docs/images from a captured terminal, a run's report folder and a sweep's."""
    parser = argparse.ArgumentParser(description="The README's pictures, from a finished run and a finished sweep.")
    parser.add_argument("terminal", type=Path, help="what `script` captured of the run")
    parser.add_argument("run", type=Path, help="the run's folder under .cdpo/reports")
    parser.add_argument("sweep", type=Path, help="the sweep's folder under .cdpo/reports")
    parser.add_argument("--command", default="make demo", help="what was typed")
    given = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    captured = given.terminal.read_bytes().decode().replace(str(given.run.resolve().parents[2]), "~/cdpo")
    (IMAGES / "demo.svg").write_text(terminal_svg(last_screen(captured), given.command), encoding="utf-8")
    shutil.copyfile(given.run / "lambda_trajectory.png", IMAGES / "lambda_trajectory.png")
    shutil.copyfile(given.sweep / "frontier.png", IMAGES / "frontier.png")
    for picture in sorted(IMAGES.iterdir()):
        print(f"{picture.name}: {picture.stat().st_size / 1000:.0f} kB")


def last_screen(captured: str) -> list[str]:
    """The lines that are left in the terminal when all is printed, colours kept, progress bars gone.

    Args:
        captured: a terminal's bytes as text: returns, line feeds, erased lines, cursor up, colours.
    """
    rows, at, returned = [""], 0, False
    for token in CONTROL.split(captured):
        if token == "\n":
            at, returned = at + 1, False
            rows += [""] * (at + 1 - len(rows))
        elif token == "\r":
            returned = True
        elif token.startswith("\x1b[") and token[-1] == "A":
            at = max(0, at - int(token[2:-1] or 1))
        elif token.startswith("\x1b[") and token[-1] == "K":
            rows[at] = ""
        elif token and (token[-1] == "m" or not token.startswith("\x1b[")):
            rows[at] = token if returned else rows[at] + token
            returned = False
    kept = [row.rstrip() for row in rows if not row.startswith(RECORDER_LINES)]
    return "\n".join(kept).strip("\n").split("\n")


def terminal_svg(lines: list[str], command: str) -> str:
    """A picture of a terminal after a command, as SVG text of reproducible bytes.

    Args:
        lines: what it printed, with ANSI colours.
        command: what was typed.
    """
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"[bold green]$[/] [bold]{command}[/]", highlight=False)
    for line in lines:
        console.print(Text.from_ansi(line), highlight=False, overflow="fold")
    svg = console.export_svg(title="cdpo", theme=DIMMED_MONOKAI, unique_id="demo")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("font-family: Fira Code, monospace", f"font-family: {FONTS}")
    return TEXT.sub(_without_margins, svg)


def _without_margins(found: re.Match[str]) -> str:
    """A text element from its first to its last letter: some viewers drop the spaces around and stretch the rest."""
    x, y, length, rest, before, words, after = found.groups()
    left, right = (CELL * len(spaces) / len("&#160;") for spaces in (before, after))
    return f' x="{float(x) + left:g}" y="{y}" textLength="{float(length) - left - right:g}"{rest}>{words}<'


if __name__ == "__main__":
    main()
