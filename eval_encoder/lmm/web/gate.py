"""What may come in to the page's server, and what its answers carry: a wrapper around gradio's app.

    request -> host and origin: this machine's -> path: one that the page itself uses
            -> size of the body -> files that it names: uploads -> gradio

gradio serves many more end points than the page needs (a description of its functions, calls by
name, files and addresses by request), so that what is not listed here is absent. Plain ASGI: needs
neither gradio nor its web framework. Cost: microseconds, a body of JSON is parsed once more.
"""

import contextlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# as ASGI has them: https://asgi.readthedocs.io/en/latest/specs/main.html
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api"
# what a browser that shows the page asks for, and the server itself when it starts
GET_PATHS = {
    "/",
    "/theme.css",
    "/favicon.ico",
    f"{API}/app_id",
    f"{API}/startup-events",
    f"{API}/queue/data",
    f"{API}/upload_progress",
}
GET_BELOW = ("/assets/", "/static/", "/svelte/", f"{API}/heartbeat/")
FILE = f"{API}/file="
UPLOAD = f"{API}/upload"
POST_PATHS = {
    UPLOAD,
    f"{API}/queue/join",
    f"{API}/run/predict",
    f"{API}/cancel",
    f"{API}/reset",
}
HOSTS = ("127.0.0.1", "localhost")  # a tunnel may give the page another port, and no other name
LARGEST_BODY = 1 << 20  # bytes of JSON: a question and two numbers need a few thousand
ENVELOPE = 1 << 16  # bytes of an upload's body around its file
# 'unsafe-inline' for scripts: gradio's page has its configuration and its start in script elements
# without a nonce; for styles: its style elements, ours (page.STYLE), and style attributes that its
# components set. What a model or a visitor writes must therefore stay text (handlers.py escapes).
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; "
    "frame-ancestors 'none'"
)


class Refused(Exception):
    """A request that is answered by a status and a line of text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Gate:
    """ASGI application around another one. `folder` holds the uploads, each of at most `max_upload`
    bytes, all together of at most `max_stored`; one is removed when it is `kept_s` seconds old."""

    def __init__(
        self, app: App, folder: Path, max_upload: int, max_stored: int, kept_s: int
    ) -> None:
        self.app = app
        self.folder = folder.resolve()
        self.max_upload = max_upload
        self.max_stored = max_stored
        self.kept_s = kept_s
        self._arriving = 0  # bytes that uploads under way have stated

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: by the application within, or by a refusal."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no web socket
            return
        answer = _with_policy(send)
        reserved = 0
        try:
            # latin-1 maps every byte to a character, so no header fails here
            headers = {
                name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
            }
            _check_host(headers)
            self._check_path(scope["method"], scope["path"])
            if scope["method"] == "POST":
                reserved = self._check_size(scope["path"], headers)
            if scope["method"] == "POST" and scope["path"] != UPLOAD:
                receive = self._checked(await _whole_body(receive), receive)
        except Refused as refusal:
            await _refuse(answer, refusal)
            return
        # nothing was awaited since an upload was checked, so uploads at once see each other here
        self._arriving += reserved
        try:
            await self.app(scope, receive, answer)
        finally:
            self._arriving -= reserved

    def _check_path(self, method: str, path: str) -> None:
        if method == "POST":
            is_ours = path in POST_PATHS
        elif method not in ("GET", "HEAD"):
            is_ours = False
        elif path.startswith(FILE):
            is_ours = self._is_upload(path.removeprefix(FILE))
        else:
            is_ours = path in GET_PATHS or path.startswith(GET_BELOW)
        if not is_ours:
            raise Refused(404, "there is nothing here")

    def _check_size(self, path: str, headers: dict[str, str]) -> int:
        """Check the length that is stated; returns the bytes to reserve for an upload.

        The server reads just so many bytes, unless the body is sent in chunks: HTTP then ignores
        the stated length.
        """
        stated = headers.get("content-length", "")
        if "transfer-encoding" in headers or not stated.isdecimal():
            raise Refused(411, "state the length of what you send")
        limit = self.max_upload + ENVELOPE if path == UPLOAD else LARGEST_BODY
        if int(stated) > limit:
            raise Refused(413, f"{stated} bytes exceed the maximum allowed size of {limit}")
        if path != UPLOAD:
            return 0
        # an upload under way may count twice, as stated and as far as it is stored already
        if _stored_bytes(self.folder) + self._arriving + int(stated) > self.max_stored:
            minutes = self.kept_s // 60
            raise Refused(507, f"too many uploads are kept here: try again in {minutes} minutes")
        return int(stated)

    def _checked(self, body: bytes, receive: Receive) -> Receive:
        """A `receive` that gives the body once; refuses one that names a file elsewhere, which
        gradio would read, or load from another host."""
        try:
            named = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            raise Refused(400, "this is no JSON") from None
        are_uploads = (isinstance(path, str) and self._is_upload(path) for path in named)
        if not all(are_uploads):
            raise Refused(403, "a file that was not uploaded here")
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def give() -> Message:
            return messages.pop() if messages else await receive()

        return give

    def _is_upload(self, path: str) -> bool:
        """Whether a path names something below the folder, links followed."""
        try:
            target = Path(path).resolve()
        except (ValueError, OSError, RuntimeError):  # NUL, too long a name, links in a circle
            return False
        return target != self.folder and target.is_relative_to(self.folder)


def _check_host(headers: dict[str, str]) -> None:
    """Refuse requests for another host name (DNS rebinding) and requests from other origins
    (cross-site forms and scripts)."""
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:  # brackets that do not close
        name = None
    if name not in HOSTS:
        raise Refused(421, f"this page is at {HOSTS[0]} alone")
    own_origin = f"http://{host}"
    if headers.get("origin", own_origin) != own_origin:
        raise Refused(403, "only the page itself may ask")


def _stored_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    stored = 0
    for place, _, names in os.walk(folder):
        for name in names:
            # gradio removes old uploads meanwhile
            with contextlib.suppress(FileNotFoundError):
                stored += os.stat(os.path.join(place, name)).st_size
    return stored


async def _whole_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


def _paths(value: object) -> Iterator[object]:
    """Values of the key `path`, at any depth: how gradio names files."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "path" and inner is not None:
                yield inner
            yield from _paths(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _paths(inner)


def _with_policy(send: Send) -> Send:
    """A `send` that adds CONTENT_SECURITY_POLICY to every answer: the browser loads nothing from
    other hosts."""

    async def with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            header = (b"content-security-policy", CONTENT_SECURITY_POLICY.encode())
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return with_policy


async def _refuse(send: Send, refusal: Refused) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": str(refusal).encode()})
