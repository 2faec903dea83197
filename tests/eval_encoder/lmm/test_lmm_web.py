"""The page, in a real browser: it answers, it says what is wrong with an upload, and neither it nor
its server speaks to anybody else.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from conftest import PATIENCE_S, ROOT, kill_group, run, write_video
from PIL import Image
from test_lmm_chat import COLOUR, SUM, SURE, write_model
from test_lmm_web_parts import Slow

from eval_encoder.lmm.generate import open_speaker
from eval_encoder.lmm.web import handlers as lmm_web_handlers
from eval_encoder.lmm.web import page as lmm_web
from eval_encoder.lmm.web.handlers import Limits

CHROMIUM = shutil.which("chromium")
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"


def lacking() -> str:
    """What a test in a browser needs and this machine has not; empty if nothing."""
    for name in ("gradio", "playwright"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    version = importlib.metadata.version("gradio")
    if int(version.split(".")[0]) < 6:
        return f"gradio {version} is installed, the page needs 6 or later"
    return "" if CHROMIUM else "chromium is not on the PATH"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """(process, address) of a page that is served."""
    if lacking():
        pytest.skip(lacking())
    port = free_port()
    (folder / "tmp").mkdir()
    command = ["eval_encoder/lmm_web.py", "--model", folder / "model", "--port", port]
    changes = {"TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=log,
            stderr=log,
            env={**os.environ, **changes},
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        wait_for(port, process, folder / "log")
        yield process, f"http://{lmm_web.HOST}:{port}"
    finally:
        if process.poll() is None:
            kill_group(process)


def wait_for(port, process, log):
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((lmm_web.HOST, port)):
            return
        time.sleep(0.2)
    raise AssertionError(f"no page on port {port}:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser(server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page, opened anew; whatever it asks others for fails the test."""
    asked = []
    page = opened(browser, server[1], asked)
    yield page
    page.close()
    own = (server[1], "data:", "blob:")
    assert asked and not [url for url in asked if not url.startswith(own)]


def opened(browser, address, asked):
    """A page, and the addresses that it asks for."""
    page = browser.new_page()
    page.set_default_timeout(1000 * PATIENCE_S)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.locator("#chat").wait_for()
    return page


@pytest.fixture
def crowd(browser, tmp_path, monkeypatch):
    """(speaker whose answers grow until it is let go, page() opens one, of which one may wait)."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    speaker = Slow()
    served, options = lmm_web.build_page(speaker, "<b>*slow*", Limits(max_waiting=1))
    port = free_port()
    lmm_web.launch(served, options, port, tmp_path)
    pages = []

    def page():
        pages.append(opened(browser, f"http://{lmm_web.HOST}:{port}", []))
        return pages[-1]

    yield speaker, page
    speaker.go.set()
    for one in pages:
        one.close()
    served.close()


def free_port():
    with socket.socket() as probe:
        probe.bind((lmm_web.HOST, 0))
        return probe.getsockname()[1]


def upload(page, path):
    page.locator("#upload input[type=file]").set_input_files(path)


def ask(page, text):
    page.get_by_placeholder("Your question").fill(text)
    page.get_by_role("button", name="Send").click()


def answer(page, number):
    """Text of the n-th answer, waited for."""
    said = page.locator("#chat [data-testid=bot]").nth(number)
    said.wait_for()
    return said.inner_text().strip()


def test_it_listens_on_this_machine_only(server):
    process = psutil.Process(server[0].pid)
    family = [process, *process.children(recursive=True)]
    sockets = [one for member in family for one in member.net_connections("inet")]
    listening = {tuple(one.laddr) for one in sockets if one.status == psutil.CONN_LISTEN}
    assert listening == {(lmm_web.HOST, int(server[1].rpartition(":")[2]))}


def test_a_browser_is_told_to_load_nothing_from_elsewhere(server):
    with urllib.request.urlopen(server[1]) as response:
        assert response.headers["content-security-policy"].startswith("default-src 'self'; ")


@pytest.mark.parametrize("path", ["config", "gradio_api/info", "gradio_api/call/answer", "docs"])
def test_gradios_own_end_points_are_not_there(server, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server[1]}/{path}")
    assert refused.value.code == 404


def test_a_picture_is_asked_about_and_remembered(page, folder):
    upload(page, folder / "red.png")
    page.locator("#chat img").wait_for()
    ask(page, COLOUR)
    assert answer(page, 0) == "red"
    ask(page, SURE)
    assert answer(page, 1) == "yes, red"
    page.get_by_role("button", name="New chat").click()
    page.locator("#chat [data-testid=bot]").first.wait_for(state="detached")
    ask(page, COLOUR)
    assert answer(page, 0) == "red"


def test_it_answers_without_a_picture_too(page):
    ask(page, SUM)
    assert answer(page, 0) == "two"


def test_what_is_wrong_with_a_question_is_shown(page):
    ask(page, "What <pad>?")
    page.get_by_text("becomes the special token '<pad>'").wait_for()
    assert page.get_by_placeholder("Your question").input_value() == "What <pad>?"


def test_a_text_that_is_named_like_a_picture_is_refused(page, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    upload(page, path)
    page.get_by_text("notes.png is neither a picture nor a clip").wait_for()
    assert page.locator("#chat img").count() == 0


def test_a_file_above_the_limit_is_refused_by_page_and_server(page, server, tmp_path):
    path = tmp_path / "large.png"
    with open(path, "wb") as stream:
        stream.truncate(lmm_web_handlers.MAX_BYTES + 1)
    upload(page, path)
    page.get_by_text("exceed the maximum allowed size").wait_for()
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + path.read_bytes() + b"\r\n--x--\r\n"
    request = urllib.request.Request(f"{server[1]}/gradio_api/upload", body)
    request.add_header("Content-Type", "multipart/form-data; boundary=x")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413


def test_visitors_see_their_place_and_who_stops_or_leaves_gives_way(crowd):
    speaker, page = crowd
    first, second, third = page(), page(), page()
    ask(first, "first")
    first.locator("#chat [data-testid=bot]").wait_for()
    ask(second, "second")
    second.get_by_text("queue: 1/1").wait_for()
    ask(third, "third")
    third.get_by_text("busy").first.wait_for()
    first.get_by_role("button", name="Stop").click()
    second.locator("#chat [data-testid=bot]").wait_for()
    assert answer(first, 0) == "It"
    ask(third, "third")
    second.close()
    third.locator("#chat [data-testid=bot]").wait_for()
    assert (speaker.begun, speaker.stopped) == (["first", "second", "third"], ["first", "second"])


def test_what_anybody_writes_is_shown_as_text(crowd):
    speaker, page = crowd
    speaker.said = "<i>red</i>"
    speaker.go.set()
    page = page()
    ask(page, "<b>bold</b>")
    assert answer(page, 0) == "<i>red</i>"
    assert page.locator("#chat [data-testid=user]").inner_text().strip() == "<b>bold</b>"
    assert page.locator("h2").inner_text() == "<b>*slow*"


def test_uploads_are_gone_when_the_command_ends(server, folder):
    """The last of those that need the server: it ends it."""
    assert list((folder / "tmp").glob("univit_web_*"))
    server[0].send_signal(signal.SIGINT)
    assert server[0].wait(PATIENCE_S) == 0
    assert not list((folder / "tmp").glob("univit_web_*"))


def test_an_upload_is_what_it_holds_not_what_it_is_called(folder, tmp_path):
    speaker = open_speaker(folder / "model")
    picture, clip = tmp_path / "a#b.mp4", tmp_path / "c.png"
    picture.write_bytes((folder / "red.png").read_bytes())
    write_video(tmp_path / "c.mp4", [np.zeros((64, 64, 3), np.uint8)] * 9).rename(clip)
    assert lmm_web_handlers.read_upload(speaker, picture).grids[0][0] == 1
    assert (
        lmm_web_handlers.read_upload(speaker, clip).grids[0][0] == speaker.reader.config.num_frames
    )


def test_an_upload_within_the_bytes_may_still_be_too_large(folder, tmp_path, monkeypatch):
    speaker = open_speaker(folder / "model")
    Image.new("1", (20_000, 10)).save(tmp_path / "wide.png")
    write_video(tmp_path / "long.mp4", [np.zeros((64, 64, 3), np.uint8)] * 60)
    monkeypatch.setattr(lmm_web_handlers, "MAX_CLIP_SECONDS", 1.0)
    for name in ("wide.png", "long.mp4"):
        with pytest.raises(ValueError, match=rf"^{name} is \d+x\d+"):
            lmm_web_handlers.read_upload(speaker, tmp_path / name)


def test_without_gradio_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert lmm_web.main(["--model", "none"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and line.endswith("pip install -e .[web]")


def test_help_imports_nothing_heavy():
    done = run("-X", "importtime", "eval_encoder/lmm_web.py", "--help")
    assert "--port" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "av", "gradio"}
