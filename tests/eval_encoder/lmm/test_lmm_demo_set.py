"""The demonstration set: what it says is what it shows, and nobody guesses better than chance."""

import itertools
import json
import re
from collections import Counter

import av
import numpy as np
import pytest
from conftest import ROOT, run
from forked import forked
from PIL import Image

from data_pipeline.embedded.drawing import COLOURS, OUTLINES
from data_pipeline.embedded.motion_shapes import CLASSES
from eval_encoder.lmm.demo.question_set import DemoSet
from eval_encoder.lmm.demo.samples import (
    INSTRUCTION,
    held_out,
    medium_at,
    render_image,
    training_medium,
    tuning_samples,
    write_demo_set,
)
from eval_encoder.lmm.scoring.table import demo_accuracy

SIZE, TRAIN, VAL = 48, 20, 192
PLACEHOLDER = re.compile("<image>|<video>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small set, made by the command."""
    folder = tmp_path_factory.mktemp("demo")
    counts = ("--num_train", str(TRAIN), "--num_val", str(VAL), "--size", str(SIZE))
    forked("-m", "eval_encoder.lmm.demo.question_set", "--output", folder, *counts)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def media_of(sample):
    """Paths of a sample's pictures and clips."""
    paths = [sample[kind] for kind in ("image", "video") if kind in sample]
    return paths[0] if paths and isinstance(paths[0], list) else paths


def mask_of(picture):
    """The shape's pixels; the background is darker."""
    return picture.max(axis=-1) > 140


def frames_of(path):
    if path.suffix == ".png":
        return np.asarray(Image.open(path))[None]
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_captions_name_the_colours_that_are_shown(folder):
    names, values = list(COLOURS), 255 * np.array(list(COLOURS.values()))
    for sample in json.loads((folder / "align.json").read_text()):
        human, gpt = sample["conversations"]
        kind = "video" if "video" in sample else "image"
        frames = frames_of(folder / sample[kind])
        assert frames.shape == (64 if kind == "video" else 1, SIZE, SIZE, 3)
        colour = frames[mask_of(frames)].mean(axis=0)
        nearest = names[int(((values - colour) ** 2).sum(axis=1).argmin())]
        assert gpt["value"].split()[:2] == ["a", nearest]
        assert gpt["value"].endswith(" .") and human["value"] == f"<{kind}>"


@pytest.mark.parametrize("corners", OUTLINES)
def test_shapes_have_the_corners_of_their_names_and_stand_whole_in_the_middle(corners):
    """The area seen under an angle, as a function of that angle, swings once per corner."""
    media = [medium_at("image", "", index, index) for index in range(48)]
    media = [medium for medium in media if medium.shape == OUTLINES[corners]]
    for medium in media:
        mask = mask_of(render_image(medium, seed=0, size=224))
        assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any(), "a border cuts it"
        rows, columns = np.nonzero(mask)
        assert abs(rows.mean() - 112) < 4 and abs(columns.mean() - 112) < 4
        angles = np.arctan2(rows - rows.mean(), columns - columns.mean())
        area, _ = np.histogram(angles, bins=36, range=(-np.pi, np.pi))
        assert 2 + np.abs(np.fft.rfft(area))[2:8].argmax() == corners


def test_every_answer_is_right_equally_often(folder):
    rows = list(
        zip(lines(folder / "questions.jsonl"), lines(folder / "answers.jsonl"), strict=True)
    )
    answers = {"colour": COLOURS, "shape": OUTLINES.values(), "direction": CLASSES}
    answers["yes_no"] = ("yes", "no")
    assert Counter(question["category"] for question, _ in rows) == dict.fromkeys(answers, VAL // 4)
    for category, known in answers.items():
        for kind in ("image", "video"):
            found = Counter(
                label["label"]
                for question, label in rows
                if question["category"] == category and kind in question
            )
            assert not found or found == dict.fromkeys(known, found.total() // len(known))
    asked = Counter((q["text"], a["label"]) for q, a in rows if q["category"] == "yes_no")
    assert len(asked) == 12 and len(set(asked.values())) == 1, "the colour asked for tells nothing"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_attributes_are_independent_of_each_other(kind):
    media = [medium_at(kind, "", 0, place) for place in range(144)]
    found = {(medium.colour, medium.shape, medium.motion) for medium in media}
    assert found == set(itertools.product(COLOURS, OUTLINES.values(), CLASSES))
    asked = Counter((medium.shape, *medium.ask("yes_no")) for medium in media)
    assert Counter((shape, answer) for shape, _, answer in asked.elements()) == dict.fromkeys(
        itertools.product(OUTLINES.values(), ("yes", "no")), 24
    )


def test_motion_is_independent_of_looks_in_questions_of_direction():
    media = [medium for medium, category in held_out(384) if category == "direction"]
    assert set(Counter((m.colour, m.motion) for m in media).values()) == {2}
    assert set(Counter((m.shape, m.motion) for m in media).values()) == {4}


def test_samples_are_conversations_of_llava(folder):
    samples = json.loads((folder / "tune.json").read_text())
    assert len({sample["id"] for sample in samples}) == len(samples) == TRAIN + 2
    kinds = Counter()
    for sample in samples:
        turns = sample["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        paths = media_of(sample)
        assert all((folder / path).is_file() for path in paths)
        assert len(PLACEHOLDER.findall(turns[0]["value"])) == len(paths)
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert question["value"].endswith(f"?\n{INSTRUCTION}")
            assert re.fullmatch("[a-z]+", answer["value"])
        assert not any(PLACEHOLDER.search(turn["value"]) for turn in turns[1:])
        kinds[len(paths), len(turns) // 2 > 1] += 1
    assert kinds == {(1, True): TRAIN, (2, False): 1, (0, False): 1}


def test_held_out_media_are_no_training_media(folder):
    questions = lines(folder / "questions.jsonl")
    assert [row["question_id"] for row in questions] == list(range(VAL))
    paths = [path for row in questions for path in media_of(row)]
    assert len(set(paths)) == VAL and all((folder / path).is_file() for path in paths)
    training = {training_medium(number).index for number in range(10_000)}
    assert not training & {medium.index for medium, _ in held_out(VAL)}
    assert all(row["text"].endswith(f"?\n{INSTRUCTION}") for row in questions)


def test_answers_of_training_agree_with_the_captions():
    """Also those on two pictures, of which only the one that is named has the colour."""
    media = [training_medium(number) for number in range(400)]
    captions = {medium.path: medium.caption for medium in media}
    for sample in tuning_samples(0, 400):
        words = [captions[path].split() for path in media_of(sample)]
        texts = [turn["value"] for turn in sample["conversations"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            if len(words) == 2:
                shown = [word[1] in question for word in words]
                assert shown == [answer == "first", answer == "second"]
            elif "Is the shape" in question:
                assert (words[0][1] in question) == (answer == "yes")
            elif "How does" in question:
                stem = {"grow": "growing", "shrink": "shrinking"}.get(answer, answer)
                assert stem in words[0]
            elif words:
                assert answer == words[0][1 if "colour" in question else 2]


def test_samples_are_a_pure_function_of_seed_and_index():
    small, large, other = (tuning_samples(*args) for args in ((0, 40), (0, 400), (1, 400)))
    assert small[:40] == large[:40]
    rest = [sample["conversations"] for sample in large[400:]]
    assert [s["conversations"] for s in small[40:]] == [*rest[:2], *rest[20:22]]
    assert [sample["id"] for sample in other] == [sample["id"] for sample in large]
    assert other != large
    media = [medium for medium, _ in held_out(384)]
    assert media[:192] == [medium for medium, _ in held_out(192)]
    first, again, second = (render_image(media[0], seed, 32) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, second)


def test_a_killed_run_goes_on(folder):
    lost = [folder / "images/train_00001.png", folder / "clips/train_00003.mp4"]
    lost += [folder / "tune.json", folder / "answers.jsonl"]
    before = [path.read_bytes() for path in lost]
    kept = folder / "images/train_00000.png"
    stamp = kept.stat().st_mtime_ns
    for path in lost:
        path.unlink()
    write_demo_set(DemoSet(folder, TRAIN, VAL, SIZE))
    assert [path.read_bytes() for path in lost] == before
    assert kept.stat().st_mtime_ns == stamp
    assert not [path for path in folder.rglob("*") if "tmp" in path.name]


def test_impossible_and_other_settings_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="other settings .* size, seed"):
        write_demo_set(DemoSet(folder, TRAIN, VAL, SIZE, seed=1))
    with pytest.raises(ValueError, match="multiples of 192"):
        write_demo_set(DemoSet(tmp_path, num_val=300))
    with pytest.raises(ValueError, match="num_train is 3: 20 or more"):
        write_demo_set(DemoSet(tmp_path, num_train=3))
    with pytest.raises(ValueError, match="size is 33: give an even number"):
        write_demo_set(DemoSet(tmp_path, size=33))
    assert not list(tmp_path.iterdir())


def write_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_a_blind_guesser_gets_its_share_and_a_seeing_one_everything(folder, tmp_path):
    labels = lines(folder / "answers.jsonl")
    seen = [{"question_id": r["question_id"], "text": f" {r['label'].title()}. "} for r in labels]
    perfect = demo_accuracy(write_lines(tmp_path / "seen.jsonl", seen), folder / "answers.jsonl")
    assert perfect == dict.fromkeys(("colour", "shape", "direction", "yes_no", "overall"), 100.0)
    guess = {"colour": "blue", "shape": "star", "direction": "up", "yes_no": "yes"}
    blind = [{"question_id": r["question_id"], "text": guess[r["category"]]} for r in labels]
    found = demo_accuracy(write_lines(tmp_path / "blind.jsonl", blind), folder / "answers.jsonl")
    shares = {"colour": 1 / 6, "shape": 1 / 3, "direction": 1 / 8, "yes_no": 1 / 2}
    shares["overall"] = sum(shares.values()) / 4
    assert found == pytest.approx({name: 100 * share for name, share in shares.items()})


@pytest.mark.parametrize(
    "rows, message",
    [
        ([(0, "red")], "1 missing .*: '1'"),
        ([(0, "red"), (1, "yes"), (2, "no")], "1 foreign .*: '2'"),
        ([(0, "red"), (1, "yes"), (0, "red")], "1 doubled .*: '0'"),
        ([(0, "red"), (1, None)], "line 2: 'text' is None"),
        ([(0, "red"), (None, "yes")], "line 2: 'question_id' is None"),
        ([], "2 missing .*: '0', '1'"),
    ],
)
def test_a_score_over_some_of_the_questions_is_refused(tmp_path, rows, message):
    named = [("colour", "red"), ("yes_no", "yes")]
    labels = [{"question_id": i, "category": c, "label": word} for i, (c, word) in enumerate(named)]
    answers = [{"question_id": question_id, "text": text} for question_id, text in rows]
    files = [tmp_path / "given.jsonl", tmp_path / "labels.jsonl"]
    with pytest.raises(ValueError, match=message):
        demo_accuracy(write_lines(files[0], answers), write_lines(files[1], labels))


def test_help_needs_no_library():
    code = (
        "import sys; from eval_encoder.lmm.demo.question_set import build_parser; build_parser();"
        "print([n for n in ('numpy', 'torch', 'av', 'PIL', 'transformers') if n in sys.modules])"
    )
    assert run("-c", code).stdout.strip() == "[]"
    assert "--num_train" in run(ROOT / "eval_encoder/lmm_demo_set.py", "--help").stdout
