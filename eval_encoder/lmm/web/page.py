"""A page that asks a trained model about an image or a clip, the command lmm_web.py.

    request -> gate.py: what the page itself asks for, and nothing else
    upload -> size, then content: an image or a clip within the limits, whatever its name says
    question -> gradio's queue, which shows each visitor's position -> handlers.py: an answer within
                its limit of time, shown while it grows

One answer is made at a time; who stops it, begins a new chat or leaves gives way to the next.
The page listens on 127.0.0.1 and loads nothing from elsewhere: its fonts are the system's, and a
Content-Security-Policy holds the browser to it. Uploads lie in a folder that goes when the command
ends. Needs gradio: `pip install -e .[web]`. Cost: that of chat.py.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_factory.command_line.command import run_command
from model_factory.command_line.flags import add_flags
from model_factory.command_line.plain_text import in_markdown, printable
from model_factory.command_line.quiet import quiet_libraries

from ..chat import Dialogue
from ..questions import SpeakerFlags, speaker_of
from .gate import Gate
from .handlers import LONGEST_QUESTION, MAX_BYTES, MAX_SESSIONS, Handlers, Limits, Messages, Visit

if TYPE_CHECKING:  # imports torch, which --help must not
    from ..generate import Decoding, Speaker

HOST = "127.0.0.1"
MAX_PORT = 65535  # of TCP
MAX_STORED = 32 * MAX_BYTES  # of all uploads: one for each visitor of a full queue
KEPT_S = 3600  # an upload is removed when it is so old
# ends of the controls
MAX_TOKENS = 1024
MAX_TEMPERATURE = 2.0
STYLE = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: 0 auto !important}
#chat img, #chat video {max-height: 220px; width: auto}
#chat .message-buttons {display: none}
footer {display: none !important}
"""


def build_parser() -> argparse.ArgumentParser:
    """Command line of lmm_web.py."""
    parser = argparse.ArgumentParser(
        prog="lmm_web.py", description="A page that asks a trained model about an image or a clip."
    )
    add_flags(parser, SpeakerFlags)
    parser.add_argument("--port", type=int, default=7860, help=f"of {HOST} (default: 7860)")
    parser.add_argument(
        "--max_seconds", type=float, default=120.0, help="longest time of an answer"
    )
    parser.add_argument("--max_waiting", type=int, default=32, help="questions that may wait")
    return parser


@dataclass(frozen=True)
class Parts:
    """Components of the page, by what they are for. `num_stops` counts a visitor's Stops: each ends
    the questions before it, and no later one."""

    upload: Any
    temperature: Any
    length: Any
    stop: Any
    anew: Any
    chat: Any
    question: Any
    send: Any
    dialogue: Any
    num_stops: Any


def build_page(speaker: "Speaker", name: str, limits: Limits) -> tuple[Any, dict[str, Any]]:
    """(page of gradio, options for its launch) for a Speaker; `name` is the model's."""
    import gradio

    theme = gradio.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    options = {"theme": theme, "css": STYLE, "footer_links": []}
    # old uploads are looked for ten times within their age
    cleaning = (KEPT_S // 10, KEPT_S)
    with gradio.Blocks(
        title=printable(name), analytics_enabled=False, delete_cache=cleaning
    ) as page:
        gradio.Markdown(f"## {in_markdown(name)}")
        parts = _draw(speaker.decoding)
        handlers = Handlers(speaker, warn=gradio.Warning, limits=limits)
        _connect(parts, handlers)
    page.queue(max_size=limits.max_waiting, api_open=False)
    return page, options


def _draw(decoding: "Decoding") -> Parts:
    import gradio

    with gradio.Row():
        with gradio.Column(scale=2, min_width=280):
            upload = gradio.File(label="Picture or clip", height=170, elem_id="upload")
            # the flags' values, within the ends of the controls
            temperature = gradio.Slider(
                minimum=0,
                maximum=MAX_TEMPERATURE,
                value=min(decoding.temperature, MAX_TEMPERATURE),
                step=0.1,
                label="Temperature",
            )
            length = gradio.Slider(
                minimum=1,
                maximum=MAX_TOKENS,
                value=min(decoding.max_new_tokens, MAX_TOKENS),
                step=1,
                label="Longest answer",
            )
            stop = gradio.Button("Stop")
            anew = gradio.Button("New chat")
        with gradio.Column(scale=5, min_width=320):
            chat = gradio.Chatbot(
                show_label=False,
                height="70vh",
                placeholder="Give a picture or a clip, or just ask.",
                render_markdown=False,
                elem_id="chat",
                buttons=[],
            )
            with gradio.Row():
                question = gradio.Textbox(
                    placeholder="Your question",
                    show_label=False,
                    container=False,
                    max_length=LONGEST_QUESTION,
                    scale=8,
                )
                send = gradio.Button("Send", variant="primary", scale=1, min_width=80)
    return Parts(
        upload=upload,
        temperature=temperature,
        length=length,
        stop=stop,
        anew=anew,
        chat=chat,
        question=question,
        send=send,
        dialogue=gradio.State(Dialogue()),
        num_stops=gradio.Number(0, visible=False, precision=0),
    )


def _connect(parts: Parts, handlers: Handlers) -> None:
    """Connect the events of the components with the handlers."""
    import gradio

    # gradio gives the request to parameters of its type; a session is one opened page
    def answer(
        question: str,
        path: str | None,
        dialogue: Dialogue,
        temperature: float,
        length: float,
        num_stops: int,
        request: gradio.Request,
    ) -> Iterator[tuple[str, Dialogue, Messages]]:
        yield from handlers.answer(
            Visit(request.session_hash, num_stops=num_stops),
            question=question,
            path=path,
            dialogue=dialogue,
            temperature=temperature,
            length=length,
        )

    def halt(num_stops: int, request: gradio.Request) -> int:
        return handlers.halt(Visit(request.session_hash, num_stops=num_stops))

    upload = parts.upload
    question = parts.question
    num_stops = parts.num_stops
    shown = [parts.dialogue, parts.chat]
    gradio.on(
        [question.submit, parts.send.click],
        answer,
        [question, upload, parts.dialogue, parts.temperature, parts.length, num_stops],
        [question, *shown],
        show_progress_on=parts.chat,
        **_one_at_a_time("model"),
    )
    # what needs no model does not wait behind the answers of others
    now = {"queue": False, "api_visibility": "private"}
    gradio.on(parts.stop.click, halt, num_stops, num_stops, **now)
    gradio.on([parts.anew.click, parts.chat.clear], halt, num_stops, num_stops, **now).then(
        handlers.forget, [upload, parts.dialogue], shown, **now
    )
    gradio.on([upload.upload, upload.clear], halt, num_stops, num_stops, **now).then(
        handlers.show, upload, [upload, *shown], **_one_at_a_time("reader")
    )


def _one_at_a_time(queue: str) -> dict[str, Any]:
    """Options of an event that waits in a queue of this name; the page alone knows of it."""
    return {"concurrency_limit": 1, "concurrency_id": queue, "api_visibility": "private"}


def main(argv: list[str] | None = None) -> int:
    """Serve the page until the command is ended; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_open, argv=argv)


def _open(args: argparse.Namespace) -> None:
    if not 0 <= args.port <= MAX_PORT:
        raise ValueError(f"--port {args.port}: no port has this number, take one up to {MAX_PORT}")
    quiet_libraries()
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("the page needs gradio 6 or later: pip install -e .[web]") from error
    limits = Limits(max_answer_seconds=args.max_seconds, max_waiting=args.max_waiting)
    speaker = speaker_of(args)
    with tempfile.TemporaryDirectory(prefix="univit_web_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # a page remembers it when it is built
        page, options = build_page(speaker, name=args.model.resolve().name, limits=limits)
        launch(page, options=options, port=args.port, folder=Path(folder))
        print(f"http://{HOST}:{args.port} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def launch(page: Any, options: dict[str, Any], port: int, folder: Path) -> None:
    """Serve a page of build_page behind the gate, in threads of its own; `folder`: the
    GRADIO_TEMP_DIR that it was built with."""
    from starlette.middleware import Middleware  # gradio is built on it

    gate = Middleware(
        Gate, folder=folder, max_upload=MAX_BYTES, max_stored=MAX_STORED, kept_s=KEPT_S
    )
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_BYTES,
        state_session_capacity=MAX_SESSIONS,
        ssr_mode=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [gate]},
        **options,
    )
