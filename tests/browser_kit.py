"""A real browser (Debian's Chromium) for the tests of what people see, and the pictures of it.

`CDPO_SCREENSHOTS=docs/images` has the tests take the README's pictures, of runs of the size that the README speaks of;
CDPO_HOME is then the state folder, in which what is computed already is found.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import BrowserContext, Page, expect, sync_playwright
from servers_needed import needed

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ELSEWHERE = re.compile(r"^https?://(?!127\.0\.0\.1[:/]|localhost[:/])")
WIDTH, HEIGHT = 1200, 900
# Only how long a page that never shows something is waited for.
PATIENCE_MS = 300_000
PICTURES = os.environ.get("CDPO_SCREENSHOTS", "")


@contextmanager
def browser() -> Iterator[BrowserContext]:
    """A browser that has been nowhere and can reach this machine only."""
    program = needed("chromium", "chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            context = running.new_context(viewport={"width": WIDTH, "height": HEIGHT})
            context.set_default_timeout(PATIENCE_MS)
            context.route(ELSEWHERE, lambda route: route.abort())
            # MLflow opens a panel beside everything for who comes the first time.
            context.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
            yield context
        finally:
            running.close()


def picture(page: Page, name: str, height: int = HEIGHT) -> None:
    """Write what the page shows as a small PNG, when pictures are asked for."""
    if not PICTURES:
        return
    from PIL import Image

    page.set_viewport_size({"width": WIDTH, "height": height})
    page.wait_for_timeout(3000)  # charts are drawn again at the new size
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shot.quantize(128, dither=Image.Dither.NONE).save(Path(PICTURES, f"{name}.png"), optimize=True)
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
