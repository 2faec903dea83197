"""A page that asks a trained model about a picture or a clip:

    python eval_encoder/lmm_web.py --model OUT [--port 7860]

    request -> lmm_web_gate: what the page itself asks for, and nothing else
    upload -> size, then content: a picture or a clip within the limits, whatever its name says
    question -> gradio's queue, which shows each visitor's place -> lmm_web_handlers: an answer
                within its limit of time, shown while it grows

One answer is made at a time; who stops it, begins a new chat or leaves gives way to the next.
The page listens on 127.0.0.1 and loads nothing from elsewhere: its fonts are the system's, and a
Content-Security-Policy holds the browser to it. Uploads lie in a folder that goes when the command
ends. Needs gradio: `pip install -e .[web]`. Cost: that of lmm_chat.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eval_encoder.lmm.web.gate import Gate
from eval_encoder.lmm.web.handlers import (
    LONGEST_QUESTION,
    MAX_BYTES,
    MAX_SESSIONS,
    Handlers,
    Limits,
    Visit,
)
from eval_encoder.lmm_chat import Dialogue
from eval_encoder.lmm_eval import add_model_flags, speaker_of
from model_factory.command_line.command import run_command
from model_factory.command_line.plain_text import in_markdown, printable
from model_factory.command_line.quiet import quiet_libraries

HOST = "127.0.0.1"
MAX_PORT = 65535  # of TCP
MAX_STORED = 32 * MAX_BYTES  # of all uploads: one for each visitor of a full queue
KEPT_S = 3600  # an upload is removed when it is so old
LONGEST, HOTTEST = 1024, 2.0  # ends of the controls: tokens, temperature
STYLE = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: 0 auto !important}
#chat img, #chat video {max-height: 220px; width: auto}
#chat .message-buttons {display: none}
footer {display: none !important}
"""


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="lmm_web.py", description=__doc__.split(":\n")[0])
    add_model_flags(parser)
    parser.add_argument("--port", type=int, default=7860, help=f"of {HOST} (default: 7860)")
    parser.add_argument(
        "--max_seconds", type=float, default=120.0, help="longest time of an answer"
    )
    parser.add_argument("--max_waiting", type=int, default=32, help="questions that may wait")
    return parser


@dataclass(frozen=True)
class Parts:
    """Components of the page, by what they are for. `turn` counts a visitor's Stops: each ends the
    questions before it, and no later one."""

    upload: object
    temperature: object
    length: object
    stop: object
    anew: object
    chat: object
    question: object
    send: object
    dialogue: object
    turn: object


def build_page(speaker, name: str, limits: Limits):
    """(page of gradio, options for its launch) for a Speaker; `name` is the model's."""
    import gradio

    options = {"theme": _theme(gradio), "css": STYLE, "footer_links": []}
    # old uploads are looked for ten times within their age
    cleaning = (KEPT_S // 10, KEPT_S)
    with gradio.Blocks(
        title=printable(name), analytics_enabled=False, delete_cache=cleaning
    ) as page:
        gradio.Markdown(f"## {in_markdown(name)}")
        parts = _draw(gradio, speaker.decoding)
        _connect(gradio, parts, Handlers(speaker, tell=gradio.Warning, limits=limits))
    page.queue(max_size=limits.max_waiting, api_open=False)
    return page, options


def _draw(gradio, decoding) -> Parts:
    with gradio.Row():
        with gradio.Column(scale=2, min_width=280):
            upload = gradio.File(label="Picture or clip", height=170, elem_id="upload")
            temperature, length = _controls(decoding, gradio.Slider)
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
        turn=gradio.Number(0, visible=False, precision=0),
    )


def _connect(gradio, parts: Parts, handlers: Handlers) -> None:
    """Say which part does what."""

    # gradio gives the request to parameters of its type; a session is one opened page
    def answer(question, path, dialogue, temperature, length, turn, request: gradio.Request):
        visit = Visit(request.session_hash, turn)
        yield from handlers.answer(visit, question, path, dialogue, temperature, length)

    def halt(turn, request: gradio.Request):
        return handlers.halt(Visit(request.session_hash, turn))

    upload = parts.upload
    question = parts.question
    turn = parts.turn
    shown = [parts.dialogue, parts.chat]
    gradio.on(
        [question.submit, parts.send.click],
        answer,
        [question, upload, parts.dialogue, parts.temperature, parts.length, turn],
        [question, *shown],
        show_progress_on=parts.chat,
        **_one_at_a_time("model"),
    )
    # what needs no model does not wait behind the answers of others
    now = {"queue": False, "api_visibility": "private"}
    gradio.on(parts.stop.click, halt, turn, turn, **now)
    gradio.on([parts.anew.click, parts.chat.clear], halt, turn, turn, **now).then(
        handlers.forget, [upload, parts.dialogue], shown, **now
    )
    gradio.on([upload.upload, upload.clear], halt, turn, turn, **now).then(
        handlers.show, upload, [upload, *shown], **_one_at_a_time("reader")
    )


def _one_at_a_time(queue: str) -> dict:
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
    limits = Limits(max_seconds=args.max_seconds, max_waiting=args.max_waiting)
    speaker = speaker_of(args)
    with tempfile.TemporaryDirectory(prefix="univit_web_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # a page remembers it when it is built
        page, options = build_page(speaker, args.model.resolve().name, limits)
        launch(page, options, args.port, Path(folder))
        print(f"http://{HOST}:{args.port} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def launch(page, options: dict, port: int, folder: Path) -> None:
    """Serve a page of build_page behind the gate, in threads of its own; `folder`: the
    GRADIO_TEMP_DIR that it was built with."""
    from starlette.middleware import Middleware  # gradio stands on it

    gate = Middleware(Gate, folder=folder, max_upload=MAX_BYTES, max_stored=MAX_STORED)
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


def _theme(gradio):
    return gradio.themes.Soft(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def _controls(decoding, slider):
    """(temperature, longest answer), set as the flags say."""
    heat, count = min(decoding.temperature, HOTTEST), min(decoding.max_new_tokens, LONGEST)
    return (
        slider(0, HOTTEST, heat, step=0.1, label="Temperature"),
        slider(1, LONGEST, count, step=1, label="Longest answer"),
    )


if __name__ == "__main__":
    sys.exit(main())
