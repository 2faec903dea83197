"""What may come in to the page's server, and what its answers carry: a wrapper around gradio's app.

    request -> host and origin: this machine's -> path: one that the page itself uses
            -> size of the body -> files that it names: uploads -> gradio

gradio serves many more end points than the page needs (a description of its functions, calls by
name, files and addresses by request), so that what is not listed here is absent. Plain ASGI: needs
neither gradio nor its web framework. Cost: microseconds, a body of JSON is parsed once more.
"""

import json
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
READ = {
    "/",
    "/theme.css",
    "/favicon.ico",
    f"{API}/app_id",
    f"{API}/startup-events",
    f"{API}/queue/data",
    f"{API}/upload_progress",
}
READ_BELOW = ("/assets/", "/static/", "/svelte/", f"{API}/heartbeat/")
FILE = f"{API}/file="
UPLOAD = f"{API}/upload"
WRITTEN = {
    UPLOAD,
    f"{API}/queue/join",
    f"{API}/run/predict",
    f"{API}/cancel",
    f"{API}/reset",
}
NAMES = ("127.0.0.1", "localhost")  # a tunnel may give the page another port, and no other name
LARGEST_BODY = 1 << 20  # bytes of JSON: a question and two numbers need a few thousand
ENVELOPE = 1 << 16  # bytes of an upload's body around its file
POLICY = (
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
    bytes, all together of at most `max_stored`."""

    def __init__(self, app: App, folder: Path, max_upload: int, max_stored: int) -> None:
        self.app = app
        self.folder = folder.resolve()
        self.max_upload = max_upload
        self.max_stored = max_stored

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request: by the application within, or by a refusal."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no web socket
            return
        answer = _with_policy(send)
        try:
            # latin-1 maps every byte to a character, so no header fails here
            headers = {
                name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
            }
            _check_host(headers)
            self._check_path(scope["method"], scope["path"])
            if scope["method"] == "POST":
                self._check_size(scope["path"], headers)
            if scope["method"] == "POST" and scope["path"] != UPLOAD:
                receive = self._checked(await _whole_body(receive), receive)
        except Refused as refusal:
            await _refuse(answer, refusal)
            return
        await self.app(scope, receive, answer)

    def _check_path(self, method: str, path: str) -> None:
        if method == "POST":
            is_ours = path in WRITTEN
        elif method not in ("GET", "HEAD"):
            is_ours = False
        elif path.startswith(FILE):
            is_ours = self._is_upload(path.removeprefix(FILE))
        else:
            is_ours = path in READ or path.startswith(READ_BELOW)
        if not is_ours:
            raise Refused(404, "there is nothing here")

    def _check_size(self, path: str, headers: dict[str, str]) -> None:
        """By the length that is stated, which the server holds the body to."""
        stated = headers.get("content-length", "")
        if not stated.isdecimal():
            raise Refused(411, "state the length of what you send")
        limit = self.max_upload + ENVELOPE if path == UPLOAD else LARGEST_BODY
        if int(stated) > limit:
            raise Refused(413, f"{stated} bytes exceed the maximum allowed size of {limit}")
        if path == UPLOAD:
            files = [file for file in self.folder.rglob("*") if file.is_file()]
            stored = sum(file.stat().st_size for file in files)
            if stored + int(stated) > self.max_stored:
                raise Refused(507, "too many uploads are kept here: try again in an hour")

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
    """Refuse a host that is not this machine, as a browser asks for after another site has turned
    its own name to 127.0.0.1, and forms and scripts of other sites."""
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:  # brackets that do not close
        name = None
    if name not in NAMES:
        raise Refused(421, f"this page is at {NAMES[0]} alone")
    own_origin = f"http://{host}"
    if headers.get("origin", own_origin) != own_origin:
        raise Refused(403, "only the page itself may ask")


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
    """A `send` that adds POLICY to every answer: the browser loads nothing from other hosts."""

    async def with_policy(message: Message) -> None:
        if message["type"] == "http.response.start":
            header = (b"content-security-policy", POLICY.encode())
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return with_policy


async def _refuse(send: Send, refusal: Refused) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": str(refusal).encode()})
