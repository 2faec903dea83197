"""A small set of questions on pictures and clips.

    python -m eval_encoder.lmm.demo.question_set --output DIR

A tiny multimodal model trains on it in minutes. Every picture and clip shows one shape of
data_pipeline/motion_shapes.py whose colour, outline and motion are known. Layout, in LLaVA's
formats, media relative to DIR:

    DIR/images/*.png      single frames, the shape in the middle
    DIR/clips/*.mp4       clips of 64 frames
    DIR/align.json        stage 1: one caption for every picture and clip of training
    DIR/tune.json         stage 2: a dialogue on each of them; then, one for every 20 of them,
                          questions on two pictures (`image` is a list) and questions without a
                          picture; to be shuffled by the trainer
    DIR/questions.jsonl   held out: question_id, image or video, text, category
    DIR/answers.jsonl     question_id, label, category
    DIR/settings.json     settings of another run in the same folder are an error

Answers are single lower-case words. In questions.jsonl every answer of a category is right equally
often, so that who sees nothing gets 1 / 6 of the colours, 1 / 3 of the shapes, 1 / 8 of the
directions and half of the yes_no questions. A sample is a pure function of (seed, index). Cost:
about a minute and 70 MB for the defaults on two cores.
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from eval_encoder.lmm.demo.samples import (
    EXTRAS_EVERY,
    HELD_OUT,
    INSTRUCTION,
    ROUND,
    Medium,
    caption_sample,
    held_out,
    training_medium,
    tuning_samples,
)
from eval_encoder.lmm.scoring.answers import QUESTION, by_id, read_jsonl
from model_factory.command_line.command import run_command
from model_factory.command_line.local_output import output_path

if TYPE_CHECKING:  # --help needs no numpy
    import numpy as np

SET_VERSION = 1  # moves when the same arguments give other samples


def render_picture(medium: Medium, seed: int, size: int) -> "np.ndarray":
    """The picture of a medium, uint8 [size, size, 3]. The world wraps around, so it is rolled
    until the shape, the only bright thing, lies whole in the middle."""
    import numpy as np

    picture = _render(medium, seed, size, frames=1)[0]
    is_shape = picture.max(axis=2) > 140  # the background stays below, every colour above
    # a mean on a circle, since a shape may lie across the border
    turn = np.exp(2j * np.pi / size * np.arange(size))
    shifts = []
    for axis in (0, 1):
        centre = np.angle(is_shape.sum(axis=1 - axis) @ turn) * size / (2 * np.pi)
        shifts.append(size // 2 - round(float(centre)))
    return np.roll(picture, shifts, axis=(0, 1))


def _render(medium: Medium, seed: int, size: int, frames: int) -> "np.ndarray":
    from data_pipeline.motion_shapes import CLASSES, OUTLINES, Appearance, render_clip

    corners = {name: number for number, name in OUTLINES.items()}[medium.shape]
    looks = Appearance(medium.colour, corners)
    label = CLASSES.index(medium.motion)
    return render_clip(label, seed, medium.index, "easy", size, frames, looks)


def _write_medium(job: tuple[Path, Medium, int, int]) -> None:
    import io

    from PIL import Image

    from data_pipeline.motion_shapes import write_clip
    from model_factory.files import write_atomically

    path, medium, seed, size = job
    if medium.kind == "video":
        write_clip(path, _render(medium, seed, size, frames=64))
        return
    stream = io.BytesIO()
    Image.fromarray(render_picture(medium, seed, size)).save(stream, "PNG")
    write_atomically(path, stream.getvalue())


def write_demo_set(
    directory: Path,
    num_train: int = 2000,
    num_val: int = 384,
    size: int = 112,
    seed: int = 0,
    workers: int = 2,
) -> None:
    """Write the set (layout above): `num_train` pictures and clips for training, `num_val`
    held-out questions. Media that exist are kept, so a killed run goes on; lists come last.
    Raises ValueError for counts or sizes that cannot be, and for a folder of other settings.
    """
    from data_pipeline.motion_shapes import GENERATOR_VERSION, check_settings

    _check_counts(num_train, num_val, size)
    for folder in ("images", "clips"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    check_settings(
        directory / "settings.json",
        [SET_VERSION, GENERATOR_VERSION, size, seed],
        "set version, generator version, size, seed",
    )
    train = [training_medium(number) for number in range(num_train)]
    held = list(held_out(num_val))
    media = train + [medium for medium, _ in held]
    jobs = [(directory / medium.path, medium, seed, size) for medium in media]
    jobs = [job for job in jobs if not job[0].exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_write_medium, jobs, chunksize=8):
            pass
    _write_lists(
        directory,
        align=[caption_sample(medium) for medium in train],
        tune=tuning_samples(seed, num_train),
        held=held,
    )


def _check_counts(num_train: int, num_val: int, size: int) -> None:
    if num_train < EXTRAS_EVERY:
        raise ValueError(f"num_train is {num_train}: {EXTRAS_EVERY} or more give every kind")
    whole = ROUND * len(HELD_OUT)
    if num_val < whole or num_val % whole:
        raise ValueError(
            f"num_val is {num_val}: answers are in equal shares at multiples of {whole}"
        )
    if size < 32 or size % 2:
        raise ValueError(f"size is {size}: give an even number of pixels, 32 or more")


def _write_lists(directory: Path, align: list, tune: list, held: list[tuple[Medium, str]]) -> None:
    from model_factory.files import write_atomically

    questions = []
    answers = []
    for number, (medium, category) in enumerate(held):
        question, label = medium.ask(category)
        text = f"{question}\n{INSTRUCTION}"
        row = {"question_id": number, medium.kind: medium.path, "text": text, "category": category}
        questions.append(row)
        answers.append({"question_id": number, "label": label, "category": category})
    for name, samples in (("align", align), ("tune", tune)):
        write_atomically(directory / f"{name}.json", json.dumps(samples, indent=1).encode())
    for name, rows in (("questions", questions), ("answers", answers)):
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        write_atomically(directory / f"{name}.jsonl", lines.encode())


def score(answers_path: Path, labels_path: Path) -> dict[str, float]:
    """Accuracy in percent of every category, and `overall`, the mean over questions.

    answers_path   a model's JSON lines with question_id and text
    labels_path    answers.jsonl of a set

    Texts count as right when they equal the label, lower-cased and without a final dot. Raises
    ValueError for lines that cannot be read and for question ids that are missing, unknown or there
    twice: a score over some of the questions is none.
    """
    given = by_id(read_jsonl(answers_path, QUESTION | {"text": str}), answers_path)
    known = QUESTION | {"label": str, "category": str}
    labels = by_id(read_jsonl(labels_path, known), labels_path)
    for ids, what, todo in (
        (labels.keys() - given.keys(), "has no answer to", "answer every question"),
        (given.keys() - labels.keys(), "answers unknown", "take the labels of the same set"),
    ):
        if ids:
            shown = ", ".join(sorted(ids)[:5])
            raise ValueError(
                f"{answers_path} {what} questions: {len(ids)} of them, first {shown}, compared "
                f"with {labels_path}; {todo}"
            )
    right: dict[str, list[bool]] = {}
    for question_id, row in labels.items():
        text = given[question_id]["text"].strip().lower().removesuffix(".").strip()
        right.setdefault(row["category"], []).append(text == row["label"])
    right["overall"] = [hit for hits in right.values() for hit in hits]
    return {name: 100 * sum(hits) / len(hits) for name, hits in right.items()}


def build_parser() -> argparse.ArgumentParser:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m eval_encoder.lmm.demo.question_set", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=output_path, required=True, help="folder of the set")
    parser.add_argument(
        "--num_train", type=int, default=2000, help="pictures and clips to train on"
    )
    parser.add_argument("--num_val", type=int, default=384, help="held-out questions")
    parser.add_argument("--size", type=int, default=112, help="side of a picture in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write a set; returns the exit code."""
    return run_command(parse=build_parser().parse_args, work=_write, argv=argv)


def _write(args: argparse.Namespace) -> None:
    write_demo_set(
        directory=args.output,
        num_train=args.num_train,
        num_val=args.num_val,
        size=args.size,
        seed=args.seed,
        workers=args.workers,
    )
    print(f"{args.num_train} pictures and clips, {args.num_val} questions in {args.output}")


if __name__ == "__main__":
    sys.exit(main())
