"""A conversation with a trained model, the command lmm_chat.py.

    images and clips -> read once, shown before the first question
    line of the standard input -> a question; its answer is printed while it grows
    /reset -> forgets the turns, not the visuals; /quit, or the end of the input -> ends

An error of one question is printed, and the conversation goes on without it. An answer's
characters that a terminal would obey are shown as escapes. Cost: every answer is that of
generate.py to all turns so far; the tower's work is repeated.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from model_factory.command_line.command import message_of, run_command
from model_factory.command_line.flags import add_flags
from model_factory.command_line.plain_text import RUNNING, printable
from model_factory.command_line.quiet import quiet_libraries

from .data.conversation import IMAGE, Turn, Visual
from .questions import SpeakerFlags, speaker_of

if TYPE_CHECKING:  # imports torch, which --help must not
    from transformers import TextStreamer

    from .data.visuals import VisualItem
    from .generate import Request, Speaker


def build_parser() -> argparse.ArgumentParser:
    """Command line of lmm_chat.py."""
    parser = argparse.ArgumentParser(
        prog="lmm_chat.py", description="A conversation with a trained model."
    )
    add_flags(parser, SpeakerFlags)
    for kind, what in (("image", "images"), ("video", "clips, behind the images")):
        parser.add_argument(
            f"--{kind}", nargs="+", action="extend", default=[], metavar="FILE", help=what
        )
    parser.add_argument("--question", help="answer this one and exit; default: ask for questions")
    return parser


@dataclass(frozen=True)
class Dialogue:
    """Turns about some visuals. Nothing is changed in place: after an error the dialogue before it
    is still there."""

    visuals: tuple["VisualItem", ...] = ()
    turns: tuple[Turn, ...] = ()

    def ask(self, question: str) -> "Dialogue":
        """With one more human turn; the first one shows the visuals."""
        front = "" if self.turns else f"{IMAGE}\n" * len(self.visuals)
        return replace(self, turns=(*self.turns, Turn("human", front + question)))

    def request(self) -> "Request":
        """What a Speaker is asked for, after a human turn."""
        from .generate import Request

        return Request(turns=self.turns, visuals=self.visuals)

    def said(self, text: str) -> "Dialogue":
        """With this answer to the last turn."""
        return replace(self, turns=(*self.turns, Turn("gpt", text)))

    def answer(self, speaker: "Speaker", streamer: "TextStreamer | None" = None) -> "Dialogue":
        """With a Speaker's answer to the last turn. Raises what Speaker.answer raises."""
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
    visuals = [Visual("image", path) for path in args.image]
    visuals += [Visual("video", path) for path in args.video]
    for visual in visuals:  # before minutes are spent on the model
        if not visual.place(Path(".")).exists():
            raise ValueError(f"--{visual.kind} {visual.path} does not exist")
    speaker = speaker_of(args)
    dialogue = Dialogue(tuple(speaker.reader(visual) for visual in visuals))
    if args.question is None:
        _converse(speaker, dialogue)
    else:
        _print_answer(speaker, dialogue.ask(args.question))


def _converse(speaker: "Speaker", dialogue: Dialogue) -> None:
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            dialogue = dialogue.forget()
            continue
        try:
            dialogue = _print_answer(speaker, dialogue.ask(line))
        except (ValueError, RuntimeError) as error:  # RuntimeError: a device without memory left
            print(f"error: {printable(one_line(error))}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Lines of the standard input that are not blank; a terminal is prompted for them."""
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


def _print_answer(speaker: "Speaker", dialogue: Dialogue) -> Dialogue:
    """Print the answer to the last turn, word by word; a beam search gives it at its end only."""
    if speaker.decoding.num_beams > 1:
        dialogue = dialogue.answer(speaker)
        print(printable(dialogue.turns[-1].text, keep=RUNNING), flush=True)
        return dialogue
    from .generate import WordStreamer

    def write(text: str, is_end: bool) -> None:
        # escapes in place of characters that a terminal would obey
        print(printable(text, keep=RUNNING), end="\n" if is_end else "", flush=True)

    return dialogue.answer(speaker, WordStreamer(speaker.lmm.tokenizer, write))
