"""What stands before both servers, so that a web page elsewhere cannot use them through somebody's browser.

A page of any site can send requests to this machine's loopback. It cannot hide where it is from: browsers name its
origin in `Origin` and its relation to us in `Sec-Fetch-Site`; and a name that its owner points to 127.0.0.1 (DNS
rebinding) is in `Host`. What comes from elsewhere is refused before the server sees it, websockets too. Programs that
are no browser send neither header: whether they may is the login's business.

Each answer also carries a Content-Security-Policy, so that the servers' own pages talk to nobody else and stand in no
other page's frame.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

HOSTS, ORIGINS = "CDPO_ALLOWED_HOSTS", "CDPO_ALLOWED_ORIGINS"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class PageGuard:
    """An ASGI app around another: refuses what a foreign page sends, and adds headers to what is answered.

    Args:
        app: the server.
        hosts: the names it is reached by; a port behind one is ignored.
        origins: `scheme://host[:port]` of its own pages, where one of them asks another (localhost and 127.0.0.1);
            their hosts are allowed too.
    """

    def __init__(self, app: App, hosts: Iterable[str] = (), origins: Iterable[str] = ()) -> None:
        self._app = app
        self._origins = frozenset(origin.rstrip("/").lower() for origin in origins)
        self._hosts = frozenset(map(_name, [*hosts, *map(_authority, self._origins)]))
        self._headers = [(name.encode(), value.encode()) for name, value in _page_headers(self._origins).items()]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        reason = self._refusal(scope)
        if not reason:
            await self._app(scope, receive, self._with_headers(scope, send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), *self._headers]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": f"{reason}\n".encode()})

    def _refusal(self, scope: Message) -> str:
        """Why the request is refused; "" lets it in."""
        given: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            given.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").strip().lower())
        hosts = given.get("host", [])
        if len(hosts) != 1 or _name(hosts[0]) not in self._hosts:
            return f"this server does not answer to that name: add it to {HOSTS} where the server is started"
        origins, sites = given.get("origin", []), given.get("sec-fetch-site", [])
        if origins and set(origins) <= self._origins:
            return ""
        if any(_authority(origin) != hosts[0] for origin in origins):
            return "this server answers to its own pages only"
        if set(sites) <= {"same-origin", "none"} or (not origins and _is_followed_link(scope, given)):
            return ""
        return "this server answers to its own pages only"

    def _with_headers(self, scope: Message, send: Send) -> Send:
        """Answers with the guard's headers; only to one of the own pages may the server name who may read them."""
        named = {name for name, _ in self._headers}
        asking = {value.decode("latin-1").lower() for name, value in scope["headers"] if name.lower() == b"origin"}
        is_own = bool(asking) and asking <= self._origins

        def is_theirs(name: bytes) -> bool:
            return name not in named and (is_own or not name.startswith(b"access-control-"))

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                theirs = [(name, value) for name, value in message.get("headers", []) if is_theirs(name.lower())]
                message["headers"] = [*theirs, *self._headers]
            await send(message)

        return sending


def guarded_by_environment(app: App) -> PageGuard:
    """The guard with the hosts and origins of CDPO_ALLOWED_HOSTS and CDPO_ALLOWED_ORIGINS; loopback without both."""
    hosts, origins = (_listed(os.environ.get(name, "")) for name in (HOSTS, ORIGINS))
    return PageGuard(app, hosts or ([] if origins else LOOPBACK), origins)


def guard_uvicorn() -> None:
    """Put the guard before whatever app uvicorn serves in this process from now on."""
    from uvicorn import Config

    load = Config.load

    def guarded_load(self: Config) -> None:
        load(self)
        self.loaded_app = guarded_by_environment(self.loaded_app)

    Config.load = guarded_load  # type: ignore[method-assign]


def own_names(host: str) -> list[str]:
    """The names that browsers on this machine use for an address the servers listen on."""
    return ["127.0.0.1", "localhost"] if host in LOOPBACK else [host]


def named_hosts() -> list[str]:
    """Further names, of a proxy before the servers, that the environment allows."""
    return _listed(os.environ.get(HOSTS, ""))


def _page_headers(origins: Iterable[str]) -> dict[str, str]:
    """The headers of every answer; the pages' own scripts use eval, inline styles and workers made of blobs."""
    asked = " ".join(part for origin in sorted(origins) for part in (origin, origin.replace("http", "ws", 1)))
    policy = {
        "default-src": "'self'",
        "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "media-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "connect-src": f"'self' data: blob: {asked}".strip(),
        "worker-src": "'self' blob:",
        "frame-src": "'self' data: blob:",
        "frame-ancestors": "'self'",
        "object-src": "'none'",
        "base-uri": "'self'",
        "form-action": "'self'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-frame-options": "SAMEORIGIN",
        "x-content-type-options": "nosniff",
        "referrer-policy": "same-origin",
        "x-dns-prefetch-control": "off",
        "cross-origin-resource-policy": "same-site",
    }


def _is_followed_link(scope: Message, given: dict[str, list[str]]) -> bool:
    """Whether it opens a page of ours in a tab, from a link elsewhere; it changes nothing."""
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and given.get("sec-fetch-mode") == ["navigate"]
        and given.get("sec-fetch-dest") == ["document"]
    )


def _authority(origin: str) -> str:
    """What of an origin its pages name in Host; "" of one that names none (null)."""
    return origin.partition("://")[2]


def _name(host: str) -> str:
    """A Host header's name, without its port."""
    host = host.strip().lower()
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
