"""A page that asks a trained model about a picture or a clip:

    python eval_encoder/lmm_web.py --model OUT [--port 7860]

    upload -> size, then content: a picture or a clip within the limits, whatever its name says
    questions -> a Dialogue of lmm_chat, one per visitor; one generation at a time

The page listens on 127.0.0.1 and loads nothing from elsewhere: its fonts are the system's, and a
Content-Security-Policy holds the browser to it. Uploads lie in a folder that goes when the command
ends. Needs gradio: `pip install univit[web]`. Cost: that of lmm_chat.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from html import escape
from pathlib import Path

from eval_encoder.lmm_chat import Dialogue, one_line
from eval_encoder.lmm_conversation import IMAGE, Visual
from eval_encoder.lmm_eval import add_model_flags, speaker_of
from model_factory.command import run_command
from model_factory.quiet import quiet_libraries

HOST = "127.0.0.1"
MAX_PORT = 65535  # of TCP
MAX_BYTES, MAX_SECONDS = 64 << 20, 600.0  # of an upload; pixels: those of InputLimits
LONGEST, HOTTEST = 1024, 2.0  # ends of the controls: tokens, temperature
NOT_SEEN = ("container", "no_video")  # reasons of RejectedInput for what is no clip at all
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; "
    "frame-ancestors 'none'"
)
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
    return parser


def read_upload(speaker, path: Path):
    """The VisualItem of a file that a stranger gave.

    Raises ValueError with the file's name for what is too large, damaged, or neither a picture nor
    a clip.
    """
    from data_pipeline.codec.open_video import InputLimits
    from data_pipeline.errors import RejectedInput
    from eval_encoder.probe_reader import shared_reader

    limits = InputLimits(max_bytes=MAX_BYTES, max_seconds=MAX_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "upload")  # readers go by names too; this one says nothing
        plain.symlink_to(path)
        try:
            try:
                return speaker.picture(shared_reader().picture(plain, limits))
            except RejectedInput as error:
                if error.reason != "image":
                    raise
            return speaker.reader(Visual("video", str(plain)), limits)
        except RejectedInput as error:
            detail = error.detail.replace(str(plain), path.name)
            if error.reason in NOT_SEEN:
                detail = f"{path.name} is neither a picture nor a clip that can be read"
            raise ValueError(detail) from error


def build_page(speaker, name: str):
    """(page of gradio, options for its launch) for a Speaker; `name` is the model's."""
    import gradio

    show, answer, forget = _handlers(speaker, gradio.Warning)
    launch = {"theme": _theme(gradio), "css": STYLE, "footer_links": []}
    with gradio.Blocks(title=name, analytics_enabled=False) as page:
        dialogue = gradio.State(Dialogue())
        gradio.Markdown(f"## {name}")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                upload = gradio.File(label="Picture or clip", height=170, elem_id="upload")
                temperature, length = _controls(speaker.decoding, gradio.Slider)
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
                        placeholder="Your question", show_label=False, container=False, scale=8
                    )
                    send = gradio.Button("Send", variant="primary", scale=1, min_width=80)
        alone = {"concurrency_limit": 1, "concurrency_id": "model", "api_name": False}
        shown = [dialogue, chat]
        gradio.on([upload.upload, upload.clear], show, upload, [upload, *shown], **alone)
        asked = [question, upload, dialogue, temperature, length]
        gradio.on([question.submit, send.click], answer, asked, [question, *shown], **alone)
        gradio.on([anew.click, chat.clear], forget, [upload, dialogue], shown, **alone)
    return page, launch


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
        raise ValueError("the page needs gradio 6 or later: pip install univit[web]") from error
    speaker = speaker_of(args)
    with tempfile.TemporaryDirectory(prefix="univit_web_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # a page remembers it when it is built
        _serve(*build_page(speaker, args.model.resolve().name), args.port)


def _serve(page, options: dict, port: int) -> None:
    from starlette.middleware import Middleware  # gradio stands on it

    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=MAX_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        app_kwargs={"middleware": [Middleware(_LocalOnly)]},
        **options,
    )
    print(f"http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    page.block_thread()


class _LocalOnly:
    """Adds POLICY to every answer: the browser loads nothing from other places."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        await self.app(scope, receive, with_policy)


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


def _handlers(speaker, tell):
    """What happens on an upload, on a question, and for a new chat; `tell` shows a text."""

    def problem(error: Exception) -> None:
        tell(escape(one_line(error)))  # a file's name is not ours

    def show(path):
        dialogue = Dialogue()
        if path is not None:
            try:
                dialogue = Dialogue((read_upload(speaker, Path(path)),))
            except ValueError as error:
                problem(error)
                path = None
        return path, dialogue, _messages(dialogue, path)

    def answer(question, path, dialogue, temperature, length):
        if not question.strip():
            return
        asked = dialogue.ask(question.strip())
        yield "", dialogue, _messages(asked, path)
        decoding = replace(speaker.decoding, temperature=temperature, max_new_tokens=int(length))
        try:
            dialogue = asked.answer(replace(speaker, decoding=decoding))
            question = ""
        except (ValueError, RuntimeError) as error:  # RuntimeError: a device without memory left
            problem(error)
        yield question, dialogue, _messages(dialogue, path)

    def forget(path, dialogue):
        return dialogue.forget(), _messages(dialogue.forget(), path)

    return show, answer, forget


def _messages(dialogue: Dialogue, path: str | None) -> list[dict]:
    """A dialogue as the page shows it: the upload, then what was said."""
    shown = [{"role": "user", "content": {"path": path}}] if dialogue.visuals else []
    roles = {"human": "user", "gpt": "assistant"}
    return shown + [
        {"role": roles[turn.speaker], "content": turn.text.replace(f"{IMAGE}\n", "")}
        for turn in dialogue.turns
    ]


if __name__ == "__main__":
    sys.exit(main())
