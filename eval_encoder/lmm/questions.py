"""A trained model answers a question file, the command lmm_eval.py.

Questions are LLaVA's JSONL, {"question_id", "text", "image" or "video" (a path or several; none:
text only)}; answers are its rows {question_id, prompt, text, answer_id, model_id, metadata}, which
scoring/scorers.py and scoring/answers.py read. A text without placeholders gets its visuals in
front. Answers that are in the file already are kept, so a killed run goes on. Several processes
each take a run of questions with --num_chunks and --chunk_idx; put their files together with cat.
Cost: that of generate.py.
"""

import argparse
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from model_factory.command_line.command import run_command
from model_factory.command_line.flags import add_flags, flag, from_flags
from model_factory.command_line.local_output import output_path
from model_factory.command_line.quiet import quiet_libraries
from model_factory.files import DamagedFile, check_fields, json_lines, parse_json

from .data.conversation import IMAGE, VIDEO, Turn, Visual, check_below
from .scoring.answers import QUESTION

if TYPE_CHECKING:  # imports torch, which --help must not
    from .generate import Request, Speaker

ROW_BEGIN = b'{"question_id": '  # as json.dumps writes what _row returns


@dataclass(frozen=True, kw_only=True)
class SpeakerFlags:
    """Flags of every command that lets a model answer."""

    model: Path = flag(help="what lmm_probe.py wrote")
    device: str = flag(default="cpu", help="cpu, cuda, ...")
    dtype: str = flag(
        default="float32", help="of the weights", choices=("float32", "bfloat16", "float16")
    )
    max_new_tokens: int = flag(default=128, help="longest answer")
    temperature: float = flag(default=0.0, help="0: greedy")
    top_p: float | None = flag(default=None, help="with a temperature")
    num_beams: int = flag(default=1, help="beams of the search")
    seed: int = flag(default=0, help="with a temperature")
    video_view: str | None = flag(default=None, help="of clips", choices=("frame", "codec"))
    video_size: int | None = flag(default=None, help="side of clips in pixels")
    num_frames: int | None = flag(default=None, help="frames of a clip")
    K_keep: int | None = flag(default=None, help="patches of a codec clip")


@dataclass(frozen=True, kw_only=True)
class QuestionFlags:
    """Flags of lmm_eval.py beside those of the model."""

    questions: Path = flag(help="JSONL of questions")
    answers: Path = flag(help="JSONL to write", parse=output_path)
    image_folder: Path = flag(default=Path("."), help="where paths begin")
    batch_size: int = flag(default=8, help="questions at a time")
    num_chunks: int = flag(default=1, help="runs the questions are cut into")
    chunk_idx: int = flag(default=0, help="the run to answer, from 0")
    blind: bool = flag(default=False, help="take images and clips away")

    def check(self) -> None:
        """Raises ValueError for numbers that make no run of questions."""
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size}: at least 1")
        if not 0 <= self.chunk_idx < self.num_chunks:
            raise ValueError(
                f"--chunk_idx {self.chunk_idx} of --num_chunks {self.num_chunks}: count from 0"
            )


def build_parser() -> argparse.ArgumentParser:
    """Command line of lmm_eval.py."""
    parser = argparse.ArgumentParser(
        prog="lmm_eval.py", description="A trained model answers a question file."
    )
    add_flags(parser, SpeakerFlags)
    add_flags(parser, QuestionFlags)
    return parser


def speaker_of(args: argparse.Namespace, media: Path = Path(".")) -> "Speaker":
    """The model that the flags of SpeakerFlags name, reading paths below `media`."""
    from .generate import Decoding, open_speaker

    flags = from_flags(SpeakerFlags, args)
    decoding = Decoding(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_p=flags.top_p,
        num_beams=flags.num_beams,
        seed=flags.seed,
    )
    return open_speaker(
        flags.model,
        media=media,
        device=flags.device,
        decoding=decoding,
        dtype=flags.dtype,
        video_view=flags.video_view,
        video_size=flags.video_size,
        num_frames=flags.num_frames,
        num_tokens=flags.K_keep,
    )


@dataclass(frozen=True)
class Question:
    """One line of a question file."""

    id: str | int
    text: str
    visuals: tuple[Visual, ...]


def read_questions(path: Path, folder: Path | None = None) -> list[Question]:
    """Questions of a JSONL. `folder`: where their paths begin and stay; None where nothing will be
    read of them.

    Raises ValueError that names file and line of a row of another form, or of a path that leads out
    of the folder.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a JSONL of questions")
    questions = []
    for name, row in json_lines(path, fields={**QUESTION, "text": str}):
        question = _question(row, name)
        for visual in question.visuals:
            try:
                check_below(visual, folder)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no question: give a JSONL of questions")
    counts = Counter(question.id for question in questions)
    twice = [question_id for question_id, count in counts.items() if count > 1]
    doubled = sorted(map(str, twice))  # ids may be texts and numbers
    if doubled:
        raise ValueError(f"{path}: these questions stand there twice: {', '.join(doubled[:5])}")
    return questions


def _question(row: dict, name: str) -> Question:
    """ValueError with `name`, the line, for a row of another form."""
    visuals = []
    kinds: tuple[Literal["image", "video"], ...] = ("image", "video")
    for kind in kinds:
        value = row.get(kind) or []  # null, or an empty text, is no path
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, str):
                raise ValueError(f"{name}: {kind} is {path!r:.80}: give a path or a list of paths")
            visuals.append(Visual(kind, path))
    return Question(id=row["question_id"], text=row["text"], visuals=tuple(visuals))


def request_of(question: Question, blind: bool = False) -> "Request":
    """What a Speaker is asked: the visuals in front of the text, as in training."""
    from .generate import Request

    text = question.text.replace(IMAGE, "").replace(VIDEO, "").strip()
    visuals = () if blind else question.visuals
    front = "".join(f"<{visual.kind}>\n" for visual in visuals)
    return Request(turns=(Turn("human", front + text),), visuals=visuals)


def main(argv: list[str] | None = None) -> int:
    """Answer all questions; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_answer_all, argv=argv)


def _answer_all(args: argparse.Namespace) -> None:
    quiet_libraries()
    flags = from_flags(QuestionFlags, args)
    questions = read_questions(flags.questions, None if flags.blind else flags.image_folder)
    flags.check()
    answered = _answered(flags.answers, args.model)
    size = -(-len(questions) // flags.num_chunks)  # rounded up, so that the last chunk is shorter
    first = flags.chunk_idx * size
    chunk = questions[first : first + size]
    waiting = [question for question in chunk if question.id not in answered]
    speaker = speaker_of(args, flags.image_folder)
    flags.answers.parent.mkdir(parents=True, exist_ok=True)
    with open(flags.answers, "a") as stream:
        for start in range(0, len(waiting), flags.batch_size):
            batch = waiting[start : start + flags.batch_size]
            texts = speaker.answer([request_of(question, flags.blind) for question in batch])
            for question, text in zip(batch, texts, strict=True):
                row = _row(question, text=text, model=args.model)
                stream.write(json.dumps(row) + "\n")
            # a killed run loses the batch that it was answering, and no other
            stream.flush()
    print(f"{len(chunk)} questions answered in {flags.answers}")


def _answered(path: Path, model: Path) -> set[str | int]:
    """Questions that an earlier run has answered; the last line, if a kill has cut it, is removed.

    Raises ValueError for answers of another model, and for a file of anything else, which stays as
    it is."""
    if not path.is_file():
        return set()
    *lines, rest = path.read_bytes().split(b"\n")
    # the file is the user's: what cannot be the begin of an answer is not ours to cut
    if not ROW_BEGIN.startswith(rest[: len(ROW_BEGIN)]):
        raise DamagedFile(f"{path} ends with {rest!r:.60}, no answer: name another --answers")
    rows = []
    for number, line in enumerate(lines, start=1):
        name = f"{path} line {number}"
        row = parse_json(line, name=name)
        check_fields(row, fields={**QUESTION, "model_id": str}, name=name)
        rows.append(row)
    others = sorted({row["model_id"] for row in rows} - {model.name})
    if others:
        raise ValueError(f"{path} holds answers of {', '.join(others)}: name another --answers")
    # only now, after all checks: a file of other answers stays as it is
    os.truncate(path, path.stat().st_size - len(rest))
    return {row["question_id"] for row in rows}


def _row(question: Question, text: str, model: Path) -> dict[str, object]:
    name = f"{question.id} {model.name} {text}"
    return {
        "question_id": question.id,
        "prompt": question.text,
        "text": text,
        # LLaVA draws ids of 22 characters at random; ours follow from what they name
        "answer_id": hashlib.sha256(name.encode()).hexdigest()[:22],
        "model_id": model.name,
        "metadata": {},
    }
