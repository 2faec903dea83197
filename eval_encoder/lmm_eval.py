"""A trained model answers a question file: `python eval_encoder/lmm_eval.py --model OUT ...`.

Questions are LLaVA's JSONL, {"question_id", "text", "image" or "video" (a path or several; none:
text only)}; answers are its rows {question_id, prompt, text, answer_id, model_id, metadata}, which
lmm_scorers.py and lmm_answers.py read. A text without placeholders gets its visuals in front.
Answers that are in the file already are kept, so a killed run goes on. Several processes each take
a run of questions with --num_chunks and --chunk_idx; put their files together with cat. Cost: that
of lmm_generate.
"""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from eval_encoder.lmm.scoring.answers import checked
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path
from model_factory.command_line.quiet import quiet_libraries
from model_factory.files import DamagedFile, check_fields, parse_json


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="lmm_eval.py", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument("--questions", type=Path, required=True, help="JSONL of questions")
    parser.add_argument("--answers", type=output_path, required=True, help="JSONL to write")
    parser.add_argument("--image_folder", type=Path, default=Path("."), help="where paths begin")
    parser.add_argument("--batch_size", type=int, default=8, help="questions at a time")
    parser.add_argument("--num_chunks", type=int, default=1, help="runs the questions are cut into")
    parser.add_argument("--chunk_idx", type=int, default=0, help="the run to answer, from 0")
    parser.add_argument("--blind", action="store_true", help="take pictures and clips away")
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every command that lets a model speak."""
    parser.add_argument("--model", type=Path, required=True, help="what lmm_probe.py wrote")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of the weights")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top_p", type=float, default=None, help="with a temperature")
    parser.add_argument("--num_beams", type=int, default=1, help="beams of the search")
    parser.add_argument("--seed", type=int, default=0, help="with a temperature")
    parser.add_argument("--video_view", choices=("frame", "codec"), default=None, help="of clips")
    parser.add_argument("--video_size", type=int, default=None, help="side of clips in pixels")
    parser.add_argument("--num_frames", type=int, default=None, help="frames of a clip")
    parser.add_argument("--K_keep", type=int, default=None, help="patches of a codec clip")


def speaker_of(args: argparse.Namespace, media: Path = Path(".")):
    """The model that the flags name."""
    from eval_encoder.lmm.generate import Decoding, open_speaker

    decoding = Decoding(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        seed=args.seed,
    )
    return open_speaker(
        args.model,
        media,
        args.device,
        decoding,
        args.dtype,
        video_view=args.video_view,
        video_size=args.video_size,
        num_frames=args.num_frames,
        num_tokens=args.K_keep,
    )


@dataclass(frozen=True)
class Question:
    """One line of a question file; `visuals`: (kind, path)."""

    id: str | int
    text: str
    visuals: tuple[tuple[str, str], ...]


def read_questions(path: Path, folder: Path | None = None) -> list[Question]:
    """Questions of a JSONL. `folder`: where their paths begin and stay; None where nothing will be
    read of them.

    Raises ValueError that names file and line of what is no question, or leads out of the folder.
    """
    from eval_encoder.lmm.data.conversation import Visual, check_below

    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a JSONL of questions")
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        name = f"{path} line {number}"
        question = _question(parse_json(line, name), name)
        for kind, one in question.visuals:
            try:
                check_below(Visual(kind, one), folder)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no question: give a JSONL of questions")
    ids = [question.id for question in questions]
    doubled = sorted({str(i) for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    if doubled:
        raise ValueError(f"{path}: these questions stand there twice: {', '.join(doubled[:5])}")
    return questions


def _question(row: dict, name: str) -> Question:
    """ValueError with `name`, the line, for a row of another form."""
    row = checked(row, {"question_id": (str, int), "text": str}, name)
    visuals = []
    for kind in ("image", "video"):
        value = row.get(kind) or []
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str):
                raise ValueError(f"{name}: {kind} is {one!r:.80}: give a path or a list of paths")
            visuals.append((kind, one))
    return Question(row["question_id"], row["text"], tuple(visuals))


def request_of(question: Question, blind: bool = False):
    """What a Speaker is asked."""
    from eval_encoder.lmm.data.conversation import IMAGE, VIDEO, Turn, Visual
    from eval_encoder.lmm.generate import Request

    text = question.text.replace(IMAGE, "").replace(VIDEO, "").strip()
    if blind:
        return Request((Turn("human", text),))
    front = "".join(f"<{kind}>\n" for kind, _ in question.visuals)
    visuals = tuple(Visual(kind, path) for kind, path in question.visuals)
    return Request((Turn("human", front + text),), visuals)


def main(argv: list[str] | None = None) -> int:
    """Answer all questions; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_answer_all, argv=argv)


def _answer_all(args: argparse.Namespace) -> None:
    quiet_libraries()
    questions = read_questions(args.questions, None if args.blind else args.image_folder)
    _check_counts(args)
    answered = _answered(args.answers, args.model)
    size = -(-len(questions) // args.num_chunks)
    mine = questions[args.chunk_idx * size : (args.chunk_idx + 1) * size]
    waiting = [question for question in mine if question.id not in answered]
    speaker = speaker_of(args, args.image_folder)
    args.answers.parent.mkdir(parents=True, exist_ok=True)
    with open(args.answers, "a") as stream:
        for start in range(0, len(waiting), args.batch_size):
            group = waiting[start : start + args.batch_size]
            texts = speaker.answer([request_of(q, args.blind) for q in group])
            for question, text in zip(group, texts, strict=True):
                stream.write(json.dumps(_row(question, text, args.model)) + "\n")
            stream.flush()
    print(f"{len(mine)} questions answered in {args.answers}")


def _check_counts(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: at least 1")
    if not 0 <= args.chunk_idx < args.num_chunks:
        raise ValueError(
            f"--chunk_idx {args.chunk_idx} of --num_chunks {args.num_chunks}: count from 0"
        )


def _answered(path: Path, model: Path) -> set:
    """Questions that a run before this one has answered; a line of its that was cut is taken away.
    Raises ValueError for answers of another model, and for a file of anything else, which stays as
    it is."""
    if not path.is_file():
        return set()
    *lines, rest = path.read_bytes().split(b"\n")
    begin = rest[: len(ROW_BEGIN)]
    if not ROW_BEGIN.startswith(begin):
        raise DamagedFile(f"{path} ends with {rest!r:.60}, no answer: name another --answers")
    rows = []
    for number, line in enumerate(lines, start=1):
        name = f"{path} line {number}"
        row = parse_json(line, name=name)
        check_fields(row, fields={"model_id": str, "question_id": (str, int)}, name=name)
        rows.append(row)
    others = sorted({row["model_id"] for row in rows} - {model.name})
    if others:
        raise ValueError(f"{path} holds answers of {', '.join(others)}: name another --answers")
    os.truncate(path, path.stat().st_size - len(rest))
    return {row["question_id"] for row in rows}


ROW_BEGIN = b'{"question_id": '  # as json.dumps writes what _row returns


def _row(question: Question, text: str, model: Path) -> dict:
    name = f"{question.id} {model.name} {text}"
    return {
        "question_id": question.id,
        "prompt": question.text,
        "text": text,
        "answer_id": hashlib.sha256(name.encode()).hexdigest()[:22],
        "model_id": model.name,
        "metadata": {},
    }


if __name__ == "__main__":
    sys.exit(main())
