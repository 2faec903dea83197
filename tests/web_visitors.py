"""On demand: many visitors ask the page of a model at the same time.

    python tests/web_visitors.py [--visitors 20] [--rounds 3]

A tiny model that has learnt to name two colours is served by the command that users start. Every
visitor is a session of its own over plain HTTP, as a browser would be: it uploads a picture, asks
for its colour, waits in the queue and asks whether that is sure, some rounds long. Each must get
the answers about its own picture; one leaves in the middle, and one asks three megabytes. The
report: answers, the last place in the queue that was shown, seconds a visitor waited, memory of the
server. Not collected by pytest; needs gradio.
"""

import argparse
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests", ROOT / "tests/eval_encoder/lmm"):
    sys.path.insert(0, str(folder))

from test_lmm_chat import COLOUR, COLOURS, SURE, write_model  # noqa: E402

HOST = "127.0.0.1"
QUESTIONS = ((COLOUR, "{}"), (SURE, "yes, {}"))


@dataclass
class Visitor:
    """One session: a picture and what was answered about it."""

    port: int
    colour: str
    events: dict[str, dict]
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    places: list[int] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    answers: int = 0

    def request(self, method: str, path: str, body: bytes = b"", **headers: str):
        """The whole answer to a request: (status, bytes)."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=600)
        connection.request(method, path, body or None, headers)
        response = connection.getresponse()
        return response.status, response.read()

    def upload(self, picture: Path) -> dict:
        """Send a picture and show it; what gradio calls a file."""
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n'
        body = head % picture.name.encode() + b"\r\n" + picture.read_bytes() + b"\r\n--x--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        status, reply = self.request("POST", "/gradio_api/upload", body, **kind)
        assert status == 200, reply
        file = {"path": json.loads(reply)[0], "meta": {"_type": "gradio.FileData"}}
        self.call("show", [file])
        return file

    def join(self, name: str, data: list) -> tuple[int, bytes]:
        """Ask for an event of the page."""
        body = {"data": data, "fn_index": self.events[name]["id"], "session_hash": self.session}
        kind = {"Content-Type": "application/json"}
        return self.request("POST", "/gradio_api/queue/join", json.dumps(body).encode(), **kind)

    def call(self, name: str, data: list, leave: bool = False) -> list:
        """Values of an event at its end, waited for in the queue."""
        begun = time.monotonic()
        status, reply = self.join(name, data)
        assert status == 200, (status, reply)
        connection = http.client.HTTPConnection(HOST, self.port, timeout=600)
        connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        response = connection.getresponse()
        values: list = []
        while line := response.readline():
            if not line.startswith(b"data: "):
                continue
            message = json.loads(line[6:])
            if message["msg"] == "estimation":
                self.places.append(message["rank"] + 1)
            if message["msg"] == "process_completed":
                assert message["success"], message
                self.waited.append(time.monotonic() - begun)
                values = message["output"]["data"]
            if message["msg"] == "close_stream" or leave and message["msg"] == "process_starts":
                break
        connection.close()
        return values

    def stay(self, picture: Path, rounds: int) -> None:
        """All that a visitor does."""
        file = self.upload(picture)
        for _ in range(rounds):
            for question, expected in QUESTIONS:
                values = self.call("answer", [question, file, None, 0.0, 16, 0])
                said = values[2][-1]["content"] if values else "nothing"
                text = said if isinstance(said, str) else said[0]["text"]
                self.answers += 1
                if text != expected.format(self.colour):
                    self.wrong.append(f"{question} {text}")
            # a new chat, so that the model meets the dialogue that it has learnt
            data = {"data": [file, None], "fn_index": self.events["forget"]["id"]}
            body = json.dumps(data | {"session_hash": self.session}).encode()
            kind = {"Content-Type": "application/json"}
            status, reply = self.request("POST", "/gradio_api/run/predict", body, **kind)
            assert status == 200, reply


def events_of(port: int) -> dict[str, dict]:
    """{name of a handler: its event}, read off the page as the browser does."""
    status, page = Visitor(port, "", {}).request("GET", "/")
    assert status == 200, page
    config = re.search(rb"window\.gradio_config = (\{.*?\});", page, re.DOTALL)[1]
    return {event["api_name"]: event for event in json.loads(config)["dependencies"]}


def serve(folder: Path, log) -> tuple[subprocess.Popen, int]:
    """The command, and the port at which it answers."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "eval_encoder/lmm_web.py", "--model", str(folder / "model")]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=ROOT,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return process, port
        time.sleep(0.2)
    raise SystemExit(f"the page did not start: {log.name}")


def main() -> None:
    """Serve, visit, report; the exit code is 1 where an answer was wrong or missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="univit_visitors_"))
    write_model(folder)
    with open(folder / "log", "w") as log:
        process, port = serve(folder, log)
        try:
            visit(args, folder, port, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def visit(args: argparse.Namespace, folder: Path, port: int, server: psutil.Process) -> None:
    """Let all visitors in at once and report."""
    events = events_of(port)
    before = server.memory_info().rss >> 20
    colours = list(COLOURS)
    visitors = [Visitor(port, colours[i % 2], events) for i in range(args.visitors)]
    threads = [
        threading.Thread(target=v.stay, args=(folder / f"{v.colour}.png", args.rounds))
        for v in visitors
    ]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    leaving = Visitor(port, "red", events)
    leaving.call("answer", [COLOUR, None, None, 0.0, 1024, 0], leave=True)
    status, reply = leaving.join("answer", ["x" * 3_000_000, None, None, 0.0, 16, 0])
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - begun
    waited = [one for visitor in visitors for one in visitor.waited]
    places = [place for visitor in visitors for place in visitor.places]
    wrong = [text for visitor in visitors for text in visitor.wrong]
    expected = 2 * args.rounds * args.visitors
    answers = sum(visitor.answers for visitor in visitors)
    print(
        f"{args.visitors} visitors, {answers} of {expected} answers, {len(wrong)} wrong {wrong[:3]}"
    )
    print(f"{seconds:.1f} s in all, {answers / seconds:.1f} answers a second")
    print(f"waited: median {statistics.median(waited):.2f} s, longest {max(waited):.2f} s")
    print(f"places shown in the queue: 1 to {max(places)}")
    print(f"a question of 3 MB: {status} {reply.decode()[:80]}")
    after, peak = server.memory_info().rss >> 20, _peak(server)
    print(f"memory of the server: {before} MiB before, {after} MiB after, peak {peak} MiB")
    if wrong or answers != expected or status != 413:
        raise SystemExit(1)


def _peak(server: psutil.Process) -> int:
    """MiB that the server has held at most, by the system's own count."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) >> 10


if __name__ == "__main__":
    main()
