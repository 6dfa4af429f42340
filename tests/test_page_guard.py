"""The guard before both servers: which requests reach them, and what their pages may do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flows import page_guard
from flows.page_guard import HOSTS, ORIGINS, PageGuard

OURS = ("http://127.0.0.1:4200", "http://localhost:4200")


def asked(guard: PageGuard, *headers: tuple[str, str], method: str = "POST", kind: str = "http") -> list[Any]:
    """What is sent for one request with these headers."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": f"{kind}.connect" if kind == "websocket" else "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": kind, "path": "/api/flows/", "headers": raw, **({"method": method} if kind == "http" else {})}
    asyncio.run(guard(scope, receive, send))
    return sent


async def server(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    theirs = [(b"X-Frame-Options", b"ALLOWALL"), (b"Access-Control-Allow-Origin", b"*")]
    await send({"type": "http.response.start", "status": 200, "headers": theirs})
    await send({"type": "http.response.body", "body": b"made"})


@pytest.fixture
def guard() -> PageGuard:
    return PageGuard(server, ["prefect"], OURS)


def reaches(guard: PageGuard, *headers: tuple[str, str], method: str = "POST", host: str = "127.0.0.1:4200") -> bool:
    given = [("host", host), *headers]
    answer = asked(guard, *given, method=method)[0]
    socket = asked(guard, *given, kind="websocket")[0]
    assert answer["status"] in (200, 403)
    if method == "POST":
        assert (answer["status"] == 200) == (socket["type"] == "websocket.accept")
    return bool(answer["status"] == 200)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:4200", "127.0.0.1.evil.example", "localhost.", "", "[::1]"]
)
def test_a_foreign_name_is_refused(guard: PageGuard, host: str) -> None:
    assert not reaches(guard, host=host)
    assert not reaches(guard, host=host, method="GET")


def test_a_request_names_one_host(guard: PageGuard) -> None:
    assert asked(guard)[0]["status"] == 403
    assert asked(guard, ("host", "localhost"), ("host", "evil.example"))[0]["status"] == 403


@pytest.mark.parametrize("host", ["127.0.0.1:4200", "localhost:14200", "LOCALHOST", "prefect:4200"])
def test_programs_reach_it_by_every_name_of_its_own(guard: PageGuard, host: str) -> None:
    assert reaches(guard, host=host)


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "http://localhost:8080", "http://127.0.0.1", "null", "file://", "http://[::1", ""],
)
def test_a_foreign_page_is_refused_whatever_it_asks(guard: PageGuard, origin: str) -> None:
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"):
        assert not reaches(guard, ("origin", origin), method=method)
    assert not reaches(guard, ("origin", OURS[0]), ("origin", origin))


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_what_the_browser_says_of_the_page_decides_where_it_names_no_origin(guard: PageGuard, site: str) -> None:
    said = ("sec-fetch-site", site)
    assert not reaches(guard, said)
    assert not reaches(guard, said, ("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image"), method="GET")
    assert not reaches(guard, said, ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe"), method="GET")
    assert not reaches(guard, said, ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document"))
    # A link to one of our pages, from a mail or from the other server.
    assert reaches(guard, said, ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document"), method="GET")


def test_its_own_pages_reach_it(guard: PageGuard) -> None:
    for site in ("same-origin", "none"):
        assert reaches(guard, ("sec-fetch-site", site))
    for origin in OURS:  # opened as localhost, a page of Prefect's asks 127.0.0.1
        assert reaches(guard, ("origin", origin), ("sec-fetch-site", "cross-site"))
    assert reaches(guard, ("origin", "http://localhost:14200"), host="localhost:14200")  # a tunnel
    assert not reaches(
        guard, ("origin", "http://localhost:14200"), ("sec-fetch-site", "cross-site"), host="localhost:14200"
    )


def test_every_answer_keeps_its_page_to_itself(guard: PageGuard) -> None:
    for headers in ([("host", "localhost")], [("host", "evil.example")]):
        answer = dict(asked(guard, *headers)[0]["headers"])
        policy = answer[b"content-security-policy"].decode()
        assert "http://localhost:4200 ws://localhost:4200" in policy
        assert "frame-ancestors 'self'" in policy
        for directive in policy.split("; "):
            assert not {"*", "https:", "http:"} & set(directive.split()), directive
        assert answer[b"x-frame-options"] == b"SAMEORIGIN"
        assert b"X-Frame-Options" not in answer
        assert b"Access-Control-Allow-Origin" not in answer
    assert b"Access-Control-Allow-Origin" in dict(
        asked(guard, ("host", "localhost"), ("origin", OURS[0]))[0]["headers"]
    )


def test_the_environment_names_hosts_and_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HOSTS, raising=False)
    monkeypatch.delenv(ORIGINS, raising=False)
    alone = page_guard.guarded_by_environment(server)
    assert reaches(alone, host="localhost")
    assert not reaches(alone, host="cdpo.example.com")
    monkeypatch.setenv(HOSTS, " cdpo.example.com:443 , mlflow")
    monkeypatch.setenv(ORIGINS, "https://pages.example.com/")
    named = page_guard.guarded_by_environment(server)
    assert all(reaches(named, host=host) for host in ("cdpo.example.com", "mlflow:5000", "pages.example.com"))
    assert not reaches(named, host="localhost")
