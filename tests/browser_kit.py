"""A real browser (Debian's Chromium) for the tests of what people see, and the pictures of it.

`CDPO_SCREENSHOTS=docs/images` has the tests take the README's pictures, of runs of the size that the README speaks of;
CDPO_HOME is then the state folder, in which what is computed already is found.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from playwright.sync_api import BrowserContext, ConsoleMessage, Page, Playwright, Request, expect, sync_playwright
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


_drivers: list[Playwright] = []
_browsers = 0


@contextmanager
def _driver() -> Iterator[Playwright]:
    """Playwright's process, shared by all browsers that are open at once: a thread cannot have a second one."""
    global _browsers
    if not _browsers:
        _drivers.append(sync_playwright().start())
    _browsers += 1
    try:
        yield _drivers[-1]
    finally:
        _browsers -= 1
        if not _browsers:
            _drivers.pop().stop()


@contextmanager
def browser(*, reach_out: bool = False, flags: Sequence[str] = ()) -> Iterator[BrowserContext]:
    """A browser that has been nowhere and, unless it may `reach_out`, can reach this machine only."""
    program = needed("chromium", "chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with _driver() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=[*FLAGS, *flags])
        try:
            context = running.new_context(viewport={"width": WIDTH, "height": HEIGHT})
            context.set_default_timeout(PATIENCE_MS)
            if not reach_out:
                context.route(ELSEWHERE, lambda route: route.abort())
            # MLflow opens a panel beside everything for who comes the first time.
            context.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
            yield context
        finally:
            running.close()


@dataclass
class Elsewhere:
    """Addresses on other machines that pages asked for: those that the browser sent, and those it refused to send."""

    sent: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)


def sent_elsewhere(context: BrowserContext) -> Elsewhere:
    """What pages of this context ask of other machines from now on.

    The page's own policy stops a request before it is sent: Chromium says `csp` of it, or says of a fetch nothing but a
    violation.
    """
    found = Elsewhere()
    asked: dict[int, str] = {}

    def begun(request: Request) -> None:
        if ELSEWHERE.match(request.url):
            asked[id(request)] = request.url
            found.sent.append(request.url)

    def failed(request: Request) -> None:
        if request.failure == "csp" and id(request) in asked:
            found.sent.remove(asked.pop(id(request)))
            found.stopped.append(request.url)

    def violated(message: ConsoleMessage) -> None:
        if "Content Security Policy" in message.text:
            found.stopped.append(message.text)

    context.on("request", begun)
    context.on("requestfailed", failed)
    context.on("console", violated)
    return found


class Attacker:
    """A page of another origin in somebody's browser, and what it tries there.

    Args:
        context: of a browser in which every name under `evil.example` is this machine.
        port: where the page is served from.
    """

    def __init__(self, context: BrowserContext, port: int) -> None:
        self._context, self._port = context, port

    def rebound(self, address: str) -> str:
        """The address under a name of the attacker's that leads here."""
        return address.replace("127.0.0.1", "evil.example")

    def page(self, origin: str) -> Page:
        """The attacker's page: on a port of its own, or with its name rebound to the server that `origin` names."""
        page = self._context.new_page()
        if origin.count(":") == 2:
            # The page was read from the attacker's machine, before the name was made to lead here.
            page.route(f"{origin}/", lambda route: route.fulfill(body="<h1>evil</h1>", content_type="text/html"))
            page.goto(f"{origin}/")
        else:
            page.goto(f"{origin}:{self._port}/")
        return page

    def tries(self, page: Page, address: str, body: Any) -> list[str]:
        """Every way to send a body from a page: content types that ask nobody first, and one that does; a form."""
        text = json.dumps(body)
        answers = [
            self._fetch(
                page, address, {"method": "POST", "mode": mode, "headers": {"Content-Type": kind}, "body": text}
            )
            for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json")
            for mode in ("cors", "no-cors")
            if mode == "cors" or kind != "application/json"
        ]
        page.evaluate("([to, body]) => navigator.sendBeacon(to, body)", [address, text])
        return [*answers, self._form(page, address, text)]

    def read(self, page: Page, address: str) -> str:
        """What a page can read of an answer."""
        return self._fetch(page, address, {"method": "POST" if address.endswith("filter") else "GET"})

    def socket(self, page: Page, address: str) -> str:
        """`open` or `closed`: what becomes of a websocket."""
        return str(page.evaluate(_SOCKET, address))

    def framed(self, page: Page, address: str) -> str:
        """What of a server's page shows in a frame of the attacker's."""
        page.evaluate("to => { document.body.innerHTML = `<iframe src='${to}/'></iframe>` }", address)
        page.wait_for_timeout(1500)
        frame = page.frames[-1]
        said = frame.locator("body").inner_text()
        return "nothing" if frame.url.startswith("chrome-error:") or _is_refusal(said) else said

    def _fetch(self, page: Page, address: str, options: Any) -> str:
        """The status that the page sees; one it is not let see is looked up in what the browser was answered."""
        seen: list[int] = []
        page.on("response", lambda answer: seen.append(answer.status) if answer.url == address else None)
        said = str(page.evaluate(_FETCH, [address, options]))
        return str(max(seen)) if seen and said == "0" else said

    def _form(self, page: Page, address: str, text: str) -> str:
        """Post a form whose body is JSON but for its end, into a new tab."""
        with page.expect_popup() as opened:
            page.evaluate(_FORM, [address, text])
        opened.value.wait_for_load_state()
        said = opened.value.locator("body").inner_text()
        opened.value.close()
        return "403" if _is_refusal(said) else said


def _is_refusal(said: str) -> bool:
    return "answers to its own pages only" in said or "does not answer to that name" in said


_FETCH = """([to, options]) => fetch(to, options).then(
    answer => String(answer.status), () => 'refused by the browser')"""
_SOCKET = """to => new Promise(done => {
    const socket = new WebSocket(to, ['prefect']);
    socket.onopen = () => done('open');
    socket.onerror = socket.onclose = () => done('closed');
})"""
_FORM = """([to, text]) => {
    document.body.innerHTML = '<form method=post target=_blank enctype=text/plain><input type=hidden></form>';
    const form = document.forms[0];
    form.action = to;
    form.elements[0].name = text.slice(0, -1) + ', "x": "';
    form.elements[0].value = '"}';
    form.submit();
}"""


@contextmanager
def attacker() -> Iterator[Attacker]:
    """A server of the attacker's, and a browser for which evil.example is this machine."""

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<h1>evil</h1>")

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with browser(reach_out=True, flags=["--host-resolver-rules=MAP *.example 127.0.0.1"]) as context:
            yield Attacker(context, server.server_port)
        server.shutdown()


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
