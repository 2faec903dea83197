"""The page's own parts, without gradio: what the gate lets in, and what a visitor gets for asking,
stopping and leaving.
"""

import asyncio
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import wait_until

from eval_encoder.lmm.chat import Dialogue
from eval_encoder.lmm.generate import AnswerStopped, Decoding
from eval_encoder.lmm.web import handlers as lmm_growing
from eval_encoder.lmm.web.gate import CONTENT_SECURITY_POLICY, LARGEST_BODY, Gate
from eval_encoder.lmm.web.handlers import LONGEST_QUESTION, Handlers, Limits, Visit

OWN = {"host": "127.0.0.1:7860"}


@pytest.fixture
def gate(tmp_path):
    """gate(method, path, body, **headers) -> (status, headers, what the page's app received)."""
    received = []

    async def app(scope, receive, send):
        message = await receive() if scope["method"] == "POST" else {}
        received.append(message.get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"the page"})

    door = Gate(app, tmp_path / "uploads", max_upload=1000, max_stored=1500, kept_s=3600)
    (tmp_path / "uploads").mkdir()

    def ask(method, path, body=b"", headers=OWN):
        received.clear()
        sent = []
        headers = {"content-length": str(len(body)), **headers}
        scope = {"type": "http", "method": method, "path": path}
        scope["headers"] = [(k.encode(), v.encode()) for k, v in headers.items() if v is not None]

        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            sent.append(message)

        asyncio.run(door(scope, receive, send))
        return sent[0]["status"], dict(sent[0]["headers"]), received

    return ask


def test_the_page_and_its_parts_pass_the_gate(gate):
    for path in ("/", "/assets/index.js", "/gradio_api/queue/data", "/gradio_api/heartbeat/abc"):
        assert gate("GET", path)[0] == 200, path
    assert gate("POST", "/gradio_api/queue/join", b'{"data": ["hi"]}')[2] == [b'{"data": ["hi"]}']


@pytest.mark.parametrize(
    "path",
    [
        "/config",
        "/monitoring",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/gradio_api/run/answer",
        "/gradio_api/call/answer",
        "/gradio_api/proxy=http://elsewhere",
        "/gradio_api/file=http://elsewhere/x.png",
        "/gradio_api/component_server",
        "/gradio_api/deep_link",
    ],
)
def test_what_the_page_does_not_need_is_not_there(gate, path):
    assert gate("GET", path)[0] == 404
    assert gate("POST", path, b"{}")[0] == 404


def test_files_are_given_from_the_folder_of_uploads_alone(gate, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    upload = tmp_path / "uploads" / "a" / "red.png"
    upload.parent.mkdir()
    upload.write_bytes(b"picture")
    (upload.parent / "way_out").symlink_to(secret)
    assert gate("GET", f"/gradio_api/file={upload}")[0] == 200
    for path in (
        secret,
        upload.parent / "way_out",
        f"{upload.parent}/../../secret.txt",
        "x\0y",
        "",
    ):
        assert gate("GET", f"/gradio_api/file={path}")[0] == 404, path


def test_a_question_may_name_uploads_alone(gate, tmp_path):
    upload = tmp_path / "uploads" / "red.png"

    def asked(path):
        body = {"data": ["What?", {"path": path, "meta": {"_type": "gradio.FileData"}}]}
        return gate("POST", "/gradio_api/queue/join", json.dumps(body).encode())

    assert asked(str(upload))[0] == 200
    for path in ("/etc/passwd", f"{upload.parent}/../x", "https://elsewhere/x.png", 7, ["/x"]):
        assert (asked(path)[0], asked(path)[2]) == (403, []), path


def test_other_hosts_and_other_sites_are_refused(gate):
    for host in ("evil.example", "127.0.0.1.evil.example:7860", "[", ""):
        assert gate("GET", "/", headers={"host": host})[0] == 421, host
    assert gate("GET", "/", headers={"host": "localhost:9000"})[0] == 200
    body = b'{"data": []}'
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        headers = {**OWN, "origin": origin}
        assert gate("POST", "/gradio_api/queue/join", body, headers)[0] == 403, origin
    headers = {**OWN, "origin": "http://127.0.0.1:7860"}
    assert gate("POST", "/gradio_api/queue/join", body, headers)[0] == 200


def test_bodies_are_bounded_before_they_are_read(gate, tmp_path):
    large = {**OWN, "content-length": str(LARGEST_BODY + 1)}
    assert gate("POST", "/gradio_api/queue/join", b"{}", large)[0] == 413
    endless = {**OWN, "content-length": None}
    assert gate("POST", "/gradio_api/queue/join", b"{}", endless)[0] == 411
    assert gate("POST", "/gradio_api/queue/join", b"[" * 100_000)[0] == 400
    upload = {**OWN, "content-length": str(1 << 20)}
    assert gate("POST", "/gradio_api/upload", b"x", upload)[0] == 413
    assert gate("POST", "/gradio_api/upload", b"x" * 900)[0] == 200
    (tmp_path / "uploads" / "earlier").write_bytes(b"x" * 700)
    assert gate("POST", "/gradio_api/upload", b"x" * 900)[0] == 507


def test_a_body_in_chunks_has_no_length_to_believe(gate):
    """Servers ignore the length that such a request states as well."""
    chunked = {**OWN, "content-length": "10", "transfer-encoding": "chunked"}
    for path in ("/gradio_api/queue/join", "/gradio_api/upload"):
        status, _, received = gate("POST", path, b'{"a": "%s"}' % (b"x" * 5_000_000), chunked)
        assert (status, received) == (411, []), path


def test_an_upload_that_is_removed_while_the_others_are_measured_counts_nothing(
    gate, tmp_path, monkeypatch
):
    (tmp_path / "uploads" / "gone").symlink_to(tmp_path / "removed")
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # it was there a moment ago
    assert gate("POST", "/gradio_api/upload", b"x" * 900)[0] == 200


def test_uploads_at_once_count_together_until_they_are_done(tmp_path):
    sent = []

    async def app(scope, receive, send):
        await asyncio.sleep(0)  # another request comes in meanwhile
        await send({"type": "http.response.start", "status": 200, "headers": []})

    door = Gate(app, tmp_path, max_upload=1000, max_stored=1500, kept_s=3600)
    headers = [(b"host", b"localhost"), (b"content-length", b"900")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers}

    async def send(message):
        sent.append(message.get("status"))

    async def three():
        await asyncio.gather(door(scope, None, send), door(scope, None, send))
        await door(scope, None, send)

    asyncio.run(three())
    statuses = [status for status in sent if status is not None]
    assert statuses == [507, 200, 200], "one of two at once, and one after them"


def test_refusals_carry_the_policy_too(gate):
    for status, headers, _ in (gate("GET", "/"), gate("GET", "/config")):
        assert headers[b"content-security-policy"] == CONTENT_SECURITY_POLICY.encode(), status


@dataclass
class Slow:
    """A speaker whose answers grow until `go` is set or they are stopped, and then are `said`."""

    said: str | Exception = "It is red"
    decoding: Decoding = field(default_factory=Decoding)
    lmm: object = field(default_factory=lambda: SimpleNamespace(tokenizer=None))
    go: threading.Event = field(default_factory=threading.Event)
    begun: list = field(default_factory=list)
    stopped: list = field(default_factory=list)

    def answer(self, requests, streamer=None, stop=None):
        question = requests[0].turns[-1].text
        self.begun.append(question)
        if not self.go.is_set():
            streamer.on_finalized_text("It ")
        while not self.go.wait(0.01):
            if stop():
                self.stopped.append(question)
                raise AnswerStopped("stopped")
        if isinstance(self.said, Exception):
            raise self.said
        return [self.said]


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(lmm_growing, "POLL_S", 0.01)
    speaker = Slow()
    yield speaker
    speaker.go.set()


def handlers_of(speaker, max_seconds=60.0):
    told = []
    return Handlers(speaker, warn=told.append, limits=Limits(max_seconds)), told


def ask(handlers, question="Hi", visit=None, dialogue=None):
    visit = Visit("a", 0) if visit is None else visit
    dialogue = Dialogue() if dialogue is None else dialogue
    return handlers.answer(visit, question, None, dialogue, 0.0, 16)


def until_growing(answers):
    for _, dialogue, messages in answers:
        if dialogue.turns:
            return dialogue, messages
    raise AssertionError("it never grew")


def test_an_answer_is_shown_while_it_grows(slow):
    handlers, told = handlers_of(slow)
    answers = ask(handlers)
    assert next(answers)[2] == [{"role": "user", "content": "Hi"}]
    _, messages = until_growing(answers)
    assert messages[-1] == {"role": "assistant", "content": "It"}
    slow.go.set()
    question, dialogue, messages = list(answers)[-1]
    assert (question, [turn.text for turn in dialogue.turns]) == ("", ["Hi", "It is red"])
    assert messages[-1]["content"] == "It is red" and not told


def test_an_answer_beyond_its_time_is_stopped_and_what_was_said_stays(slow, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(lmm_growing, "time", SimpleNamespace(monotonic=lambda: clock.now))
    handlers, told = handlers_of(slow, max_seconds=60)
    answers = ask(handlers)
    until_growing(answers)
    clock.now = 61.0
    question, dialogue, _ = list(answers)[-1]
    assert (question, [turn.text for turn in dialogue.turns]) == ("", ["Hi", "It"])
    assert "stopped after 60 s" in told[0]
    wait_until(lambda: slow.stopped == ["Hi"], what="the end of the stopped answer")


def test_stop_ends_the_answer_and_keeps_what_was_said(slow):
    handlers, told = handlers_of(slow)
    answers = ask(handlers)
    until_growing(answers)
    halting = threading.Thread(target=handlers.halt, args=(Visit("a", 0),))
    halting.start()
    question, dialogue, _ = list(answers)[-1]
    halting.join()
    assert (question, [turn.text for turn in dialogue.turns]) == ("", ["Hi", "It"])
    wait_until(lambda: slow.stopped == ["Hi"], what="the end of the stopped answer")
    assert not told


def test_a_stop_before_the_first_word_waits_for_the_end_and_nothing_is_asked(slow):
    handlers, _ = handlers_of(slow)
    answers = ask(handlers)
    next(answers)  # the question is shown, no answer is begun
    halted = threading.Event()

    def halt():
        handlers.halt(Visit("a", 0))
        halted.set()

    halting = threading.Thread(target=halt)
    halting.start()
    wait_until(lambda: handlers._stopped, what="the stop")
    assert not halted.wait(0.1), "what follows a stop would be overwritten by the answer's end"
    assert list(answers)[-1] == ("Hi", Dialogue(), [])
    halting.join()
    assert not slow.begun


def test_stop_ends_a_question_that_waits_and_no_later_one_and_nobody_elses(slow):
    handlers, _ = handlers_of(slow)
    slow.go.set()
    assert handlers.halt(Visit("a", 0)) == 1
    assert list(ask(handlers, "waiting", Visit("a", 0))) == [("waiting", Dialogue(), [])]
    for visit in (Visit("a", 1), Visit("b", 0)):
        assert list(ask(handlers, "later", visit))[-1][1].turns[-1].text == "It is red"
    assert "waiting" not in slow.begun


def test_who_leaves_gives_way_to_the_next(slow):
    handlers, _ = handlers_of(slow)
    leaving = ask(handlers, "first")
    until_growing(leaving)
    leaving.close()
    until_growing(ask(handlers, "second", Visit("b", 0)))
    assert (slow.begun, slow.stopped) == (["first", "second"], ["first"])


def test_a_question_beyond_the_limit_is_refused_and_shown_again(slow):
    handlers, told = handlers_of(slow)
    [(question, dialogue, _)] = ask(handlers, "x" * (LONGEST_QUESTION + 1))
    assert len(question) == LONGEST_QUESTION and dialogue == Dialogue() and not slow.begun
    assert str(LONGEST_QUESTION + 1) in told[0]


def test_an_error_gives_the_question_back_and_is_shown_as_text(slow):
    slow.said = ValueError("<img src=x>\x1b[2J")
    slow.go.set()
    handlers, told = handlers_of(slow)
    assert list(ask(handlers))[-1] == ("Hi", Dialogue(), [])
    assert told == ["&lt;img src=x&gt;\\x1b[2J"]


def test_what_is_said_is_never_markup(slow):
    slow.said = "<b>bold</b>\n\x1b[2J"
    slow.go.set()
    handlers, _ = handlers_of(slow)
    messages = list(ask(handlers, "<script>"))[-1][2]
    assert [message["content"] for message in messages] == [
        "&lt;script&gt;",
        "&lt;b&gt;bold&lt;/b&gt;\n\\x1b[2J",
    ]


@pytest.mark.parametrize("limits", [(0.0, 32), (float("nan"), 32), (1.0, 0)])
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(ValueError, match="--max_"):
        Limits(*limits)
