"""A conversation with a trained model: `python eval_encoder/lmm_chat.py --model OUT --image FILE`.

    pictures and clips -> read once, shown before the first question
    line of the standard input -> a question; its answer is printed while it grows
    /reset -> forgets what was said, not what is shown; /quit, or the end of the input -> ends

What is wrong with one question is told, and the conversation goes on without it. An answer's
characters that a terminal would obey are shown as escapes. Cost: every answer is that of
lmm_generate to all turns so far, the tower's work included.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from eval_encoder.lmm.data.conversation import IMAGE, Turn, Visual
from eval_encoder.lmm_eval import add_model_flags, speaker_of
from model_factory.command_line.command import message_of, run_command
from model_factory.command_line.plain_text import RUNNING, printable
from model_factory.command_line.quiet import quiet_libraries


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="lmm_chat.py", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    for kind, what in (("image", "pictures"), ("video", "clips, behind the pictures")):
        parser.add_argument(
            f"--{kind}", nargs="+", action="extend", default=[], metavar="FILE", help=what
        )
    parser.add_argument("--question", help="answer this one and exit; default: ask for questions")
    return parser


@dataclass(frozen=True)
class Dialogue:
    """What was said about which visuals (VisualItem of lmm_visuals). Nothing is changed in place:
    after an error the dialogue before it is still there."""

    visuals: tuple = ()
    turns: tuple[Turn, ...] = ()

    def ask(self, question: str) -> "Dialogue":
        """With a human turn more; the first one shows the visuals."""
        front = "" if self.turns else f"{IMAGE}\n" * len(self.visuals)
        return replace(self, turns=(*self.turns, Turn("human", front + question)))

    def request(self):
        """What a Speaker is asked for, after a human turn."""
        from eval_encoder.lmm.generate import Request

        return Request(self.turns, self.visuals)

    def said(self, text: str) -> "Dialogue":
        """With this answer to the last turn."""
        return replace(self, turns=(*self.turns, Turn("gpt", text)))

    def answer(self, speaker, streamer=None) -> "Dialogue":
        """With what a Speaker says to the last turn. Raises what Speaker.answer raises."""
        [text] = speaker.answer([self.request()], streamer)
        return self.said(text)

    def forget(self) -> "Dialogue":
        """The visuals alone."""
        return replace(self, turns=())


def one_line(error: Exception) -> str:
    """The text of an error; those of transformers have several lines."""
    return " ".join(message_of(error).split())


def main(argv: list[str] | None = None) -> int:
    """Hold the conversation; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_open, argv=argv)


def _open(args: argparse.Namespace) -> None:
    quiet_libraries()
    shown = [Visual(kind, path) for kind in ("image", "video") for path in getattr(args, kind)]
    for visual in shown:  # before minutes are spent on the model
        if not visual.place(Path(".")).exists():
            raise ValueError(f"--{visual.kind} {visual.path} does not exist")
    speaker = speaker_of(args)
    dialogue = Dialogue(tuple(speaker.reader(visual) for visual in shown))
    if args.question is None:
        _converse(speaker, dialogue)
    else:
        _say(speaker, dialogue.ask(args.question))


def _converse(speaker, dialogue: Dialogue) -> None:
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            dialogue = dialogue.forget()
            continue
        try:
            dialogue = _say(speaker, dialogue.ask(line))
        except (ValueError, RuntimeError) as error:  # RuntimeError: a device without memory left
            print(f"error: {printable(one_line(error))}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Lines of the standard input that say something; a terminal is prompted for them."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        print("/reset forgets what was said, /quit ends")
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _say(speaker, dialogue: Dialogue) -> Dialogue:
    """Print the answer to the last turn; a search with beams knows it at its end only."""
    if speaker.decoding.num_beams > 1:
        dialogue = dialogue.answer(speaker)
        print(printable(dialogue.turns[-1].text, keep=RUNNING), flush=True)
        return dialogue
    from transformers import TextStreamer

    class Screen(TextStreamer):
        """Prints words as they come, and what a terminal would obey as escapes."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text, keep=RUNNING), stream_end)

    streamer = Screen(speaker.lmm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return dialogue.answer(speaker, streamer)


if __name__ == "__main__":
    sys.exit(main())
