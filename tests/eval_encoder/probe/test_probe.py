"""The probe as a command: absent benchmarks explain themselves, every clip counts once on any
number of ranks, features are encoded once, and what is reported was chosen on training clips.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_video
from forked import forked, forked_ranks

from eval_encoder.probe.compare import read_results
from eval_encoder.probe.published import COLUMNS, anchors

PROBE = "eval_encoder/attentive_probe.py"
PUBLIC = (
    *(PROBE, "--eval_freq", 1, "--default_lr_list", 0.0003, "--batch_size", 16),
    *("--default_weight_decay", 0, "--dali_py_num_workers", 8),
    *("--model_family", "llava_vit_sampling", "--dataset", "ssv2"),
)


def probe_command(root, report, *extra):
    return (
        *(PROBE, "--dataset", "motion_shapes", "--data_root", root),
        *("--model_name", "llava_vit_tiny_ln", "--model_weight", "random"),
        *("--num_frames", 2, "--K_keep", 98, "--batch_size", 4, "--default_epoch", 2),
        *("--save_report", report, *extra),
    )


def record_of(report: Path) -> dict:
    return json.loads((report / "results.jsonl").read_text().splitlines()[-1])


@pytest.fixture
def raw(clips, tmp_path) -> Path:
    """A data root with the raw clips of motion_shapes alone."""
    root = tmp_path / "raw" / "motion_shapes"
    shutil.copytree(clips / "clips", root / "clips")
    for name in ("train.csv", "val.csv"):
        shutil.copy(clips / name, root / name)
    return root.parent


def test_a_missing_benchmark_shows_the_tree_and_the_command(tmp_path):
    done = forked(PROBE, "--dataset", "ssv2", "--data_root", tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{tmp_path}/ssv2/" in done.stderr and "ssv2_val_new.csv" in done.stderr
    assert "python -m eval_encoder.probe.prepare ssv2" in done.stderr


@pytest.mark.e2e
@pytest.mark.dali
@pytest.mark.parametrize("family", ["llava_vit_sampling", "ov_encoder_codec"])
def test_two_ranks_judge_as_one_does(packed, tmp_path, family):
    flags = ("--model_family", family, "--default_lr_list", "1e-3", "1e-2", "--num_seeds", 2)
    done = forked_ranks(2, *probe_command(packed.parent, tmp_path / "two", *flags))
    assert f"motion_shapes {family}: top-1" in done.stdout
    forked(*probe_command(packed.parent, tmp_path / "one", *flags, "--batch_size", 8))
    two, one = record_of(tmp_path / "two"), record_of(tmp_path / "one")
    assert two["clips"] == {"train": 24, "val": 8} and len(two["grid"]) == 4
    for name in ("last_epoch", "best_epoch", "chosen", "per_class", "grid"):
        assert one[name] == two[name], name
    assert (two["grid"][0]["top1"] * 8 / 100) % 1 == 0  # a whole number of 8 clips
    assert (tmp_path / "two" / two["confusion"]).stat().st_size > 5000
    assert (tmp_path / "two" / "table.md").read_text().count("\n") == 3
    assert list((tmp_path / "two" / "tensorboard").glob("*/events*"))
    report = tmp_path / "two" / "report_attentive_probe_random.txt"
    assert report.read_text().startswith("motion_shapes ")


@pytest.mark.e2e
def test_missing_and_damaged_videos_forbid_an_accuracy(raw, tmp_path):
    extra = ("--input_size", 112, "--train_views", 1)
    folder = raw / "motion_shapes" / "clips"
    (folder / "val_00003.mp4").unlink()
    done = forked(*probe_command(raw, tmp_path / "report", *extra), check=False)
    assert done.returncode == 1 and "clips/val_00003.mp4: missing" in done.stderr
    assert not (tmp_path / "report").exists()
    whole = (folder / "train_00002.mp4").read_bytes()
    (folder / "train_00002.mp4").write_bytes(whole[: len(whole) // 2])
    shutil.copy(folder / "val_00001.mp4", folder / "val_00003.mp4")
    done = forked(*probe_command(raw, tmp_path / "report", *extra), check=False)
    assert done.returncode == 1 and "clips/train_00002.mp4: " in done.stderr
    done = forked(*probe_command(raw, tmp_path / "report", *extra, "--allow-partial"))
    assert "without 1 unreadable clips" in done.stdout
    unreadable = record_of(tmp_path / "report")["unreadable"]
    assert list(unreadable["train"]) == ["clips/train_00002.mp4"] and not unreadable["val"]


@pytest.mark.e2e
def test_a_second_sweep_reads_features_and_another_encoder_does_not(raw, tmp_path):
    cache = ("--input_size", 112, "--cache_dir", tmp_path / "features", "--default_epoch", 1)
    first = (*cache, "--train_views", 1, "--save_report", tmp_path / "a")
    forked_ranks(2, *probe_command(raw, tmp_path / "a", *first))
    assert record_of(tmp_path / "a")["costs"]["encoder_passes"] == 16  # rank 0's half of 32 clips
    sweep = ("--default_lr_list", "1e-4", "1e-3", "1e-2", "--num_seeds", 3)
    forked(*probe_command(raw, tmp_path / "b", *first[:-2], *sweep))
    second = record_of(tmp_path / "b")
    assert second["costs"]["encoder_passes"] <= 1 and len(second["grid"]) == 9
    assert second["costs"]["tokens_per_clip"] == 98
    forked(*probe_command(raw, tmp_path / "c", *cache, "--train_views", 1, "--seed", 2))
    assert record_of(tmp_path / "c")["costs"]["encoder_passes"] == 32, "other random weights"
    stored = next((tmp_path / "features").glob("*/??/*.npy"))
    written = stored.read_bytes()
    stored.write_bytes(written[:-100] + bytes(100))
    again = (*cache, "--train_views", 1)
    logs = [forked(*probe_command(raw, tmp_path / "d", *again))]
    logs += [forked(*probe_command(raw, tmp_path / "d", *again, "--seed", 2))]
    assert sum(f"{stored} are made again" in done.stdout + done.stderr for done in logs) == 1
    assert stored.read_bytes() == written
    records = (tmp_path / "d" / "results.jsonl").read_text().splitlines()
    passes = [json.loads(line)["costs"]["encoder_passes"] for line in records]
    assert max(passes) <= 2, "one look to count tokens, and one damaged file made again"


@pytest.mark.e2e
def test_drawn_versions_are_encoded_anew_every_epoch_unless_there_are_few(raw, tmp_path):
    for views, passes in ((0, 3 * 22 + 2 + 8), (2, 2 * 22 + 2 + 8), (1, 22 + 2 + 8)):
        flags = ("--input_size", 112, "--train_views", views, "--default_epoch", 3)
        forked(*probe_command(raw, tmp_path / str(views), *flags))
        assert record_of(tmp_path / str(views))["costs"]["encoder_passes"] == passes, views


@pytest.mark.e2e
@pytest.mark.parametrize("head", ["knn", "linear"])
def test_pooled_features_have_heads_of_their_own(raw, tmp_path, head):
    flags = ("--head", head, "--input_size", 112, "--train_views", 1, "--num_frames", 4)
    flags += ("--num_seeds", 2)  # each in an order of its own, over the clips of both ranks
    forked_ranks(2, *probe_command(raw, tmp_path / "two", *flags))
    forked(*probe_command(raw, tmp_path / "one", *flags, "--batch_size", 8))
    one, two = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    assert one["last_epoch"] == two["last_epoch"] and one["chosen"] == two["chosen"]
    assert one.get("grid") == two.get("grid")
    assert one["head"] == head and one["costs"]["tokens_per_clip"] == 196


@pytest.mark.e2e
def test_a_folder_of_pictures_is_judged_like_a_benchmark(tmp_path):
    """Two classes that any encoder tells apart: dark and bright pictures; in one folder with splits
    and in one without."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for number in range(count):
            name = ("bright", "dark")[number % 2]
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            low = 180 if name == "bright" else 0
            size = (int(rng.integers(40, 90)), 64, 3)
            picture = rng.integers(low, low + 60, size, dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{number}.png")
            for place in (folder / ".ipynb_checkpoints", tmp_path / "flat" / name):
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(place / f"{split}_{number}.png")
    for head, name in (("knn", "flat"), ("attentive", "set")):
        flags = ("--dataset", tmp_path / name, "--head", head, "--input_size", 64)
        flags += ("--default_lr_list", "1e-2", "--default_epoch", 8)
        done = forked(*probe_command(tmp_path, tmp_path / head, *flags))
        record = record_of(tmp_path / head)
        assert record["last_epoch"]["top1"] == 100.0 and record["per_class"] == [100.0] * 2
        assert record["dataset"] == name and record["costs"]["tokens_per_clip"] == 16
        assert sum(record["clips"].values()) == 18
        assert (tmp_path / head / record["classes"]).read_text().split() == ["0,bright", "1,dark"]
        note = record["notes"][0]
        assert ("split by a hash" if name == "flat" else "hidden or system") in note
        assert note in done.stdout + done.stderr


@pytest.mark.e2e
def test_several_labels_are_judged_by_mean_average_precision(raw, tmp_path):
    root = raw / "motion_shapes"
    for split in ("train", "val"):
        with open(root / f"{split}.csv") as stream:
            rows = [(name, f"{label} {8 + int(label) % 2}") for name, label in csv.reader(stream)]
        with open(root / f"{split}.csv", "w") as stream:
            csv.writer(stream).writerows(rows)
    flags = ("--dataset", root, "--input_size", 112, "--train_views", 1, "--num_seeds", 2)
    done = forked(*probe_command(raw, tmp_path / "x", *flags), check=False)
    assert done.returncode == 1 and "--protocol multi_label" in done.stderr
    flags += ("--protocol", "multi_label")
    done = forked(*probe_command(raw, tmp_path / "x", *flags))
    record = record_of(tmp_path / "x")
    assert record["metric"] == "mAP" and "mAP" in done.stdout and "confusion" not in record
    assert len(record["per_class"]) == 10 and 0 < record["last_epoch"]["mAP"] <= 100


def test_more_than_is_packed_is_an_error_not_less_than_asked(packed, tmp_path):
    for flags, advice in (
        (("--model_family", "llava_vit_codec", "--K_keep", 500), "keeps 98 patches a clip"),
        (("--num_frames", 16), "stores 8 frames a clip; pass --num_frames 8"),
        (("--num_spatial_crops", 3), "crops need the raw videos"),
    ):
        done = forked(*probe_command(packed.parent, tmp_path, *flags), check=False)
        assert done.returncode == 1 and advice in done.stderr and "Traceback" not in done.stderr


@pytest.mark.e2e
def test_the_public_command_judges_a_folder_of_official_files(clips, tmp_path):
    """Official names and JSON files around real videos, twelve of them, on two ranks."""
    videos, annotations = tmp_path / "20bn", tmp_path / "json"
    videos.mkdir(), annotations.mkdir()
    templates = ["Moving [something] left", "Dropping [something]"]
    labels = {text.replace("[", "").replace("]", ""): str(i) for i, text in enumerate(templates)}
    (annotations / "something-something-v2-labels.json").write_text(json.dumps(labels))
    rng = np.random.default_rng(0)
    for split, numbers in (("train", range(8)), ("validation", range(8, 12))):
        entries = []
        for number in numbers:
            frames = rng.integers(0, 255, (12, 48, 64, 3), dtype=np.uint8)
            write_video(videos / f"{number}.webm", list(frames), codec="libvpx-vp9")
            entries.append({"id": str(number), "template": templates[number % 2]})
        file = annotations / f"something-something-v2-{split}.json"
        file.write_text(json.dumps(entries))
    prepare = ("-m", "eval_encoder.probe.prepare", "ssv2", "--annotations", annotations)
    done = forked(*prepare, "--videos", videos, "--output", tmp_path / "data" / "ssv2")
    assert "train: 8 videos found, 0 named but absent" in done.stdout
    own = ("--data_root", tmp_path / "data", "--model_weight", "random", "--num_frames", 2)
    own += ("--model_name", "llava_vit_tiny_ln", "--input_size", 64)
    done = forked_ranks(2, *PUBLIC, *own, "--save_report", tmp_path / "report")
    assert "ssv2 llava_vit_sampling: top-1" in done.stdout
    record = record_of(tmp_path / "report")
    assert record["clips"] == {"train": 8, "val": 4} and record["epochs"] == 10
    assert record["chosen"]["lr"] == 0.0003


def test_several_probes_are_compared_beside_published_figures(tmp_path):
    for number, (view, tokens, value) in enumerate((("frame", 98, 40.0), ("codec", 196, 60.0))):
        folder = tmp_path / str(number)
        folder.mkdir()
        record = {
            "dataset": "ssv2", "family": "llava_vit_sampling", "view": view, "weight": "a/b",
            "num_frames": 2, "num_tokens": tokens, "head": "attentive", "seed": 1,
            "metric": "top1", "clips": {"train": 9, "val": 5}, "is_benchmark": True,
            "unreadable": {"train": {"a": "missing"}, "val": {}}, "encoder_sha256": "0" * 64,
            "config": {"view": view},
            "last_epoch": {"top1": value, "ci95_clips": 3.0, "seeds": [value]},
            "best_epoch": {"top1": value + 1, "epoch": 4},
            "costs": {"tokens_per_clip": tokens},
        }  # fmt: skip
        (folder / "results.jsonl").write_text(json.dumps(record) + "\n")
    compare = ("eval_encoder/probe_results.py", "compare", tmp_path / "0", tmp_path / "1")
    forked(*compare, "--output", tmp_path / "out")
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| ssv2 | b | codec 196 | 196 | attentive | top1 | 60.0 ± 3.0 | 61.0 (4) |" in text
    published = text.split("Published by others")[1]
    assert "| OV-Encoder | codec | 2048 | 58.5 |" in published and "60.0" not in published
    assert (tmp_path / "out" / "compare_ssv2_top1.png").stat().st_size > 10_000
    done = forked(*compare, tmp_path / "nothing", check=False)
    assert done.returncode == 1 and "--save_report" in done.stderr
    assert len(read_results(tmp_path / "0")) == 1


def test_published_rows_have_a_figure_for_every_column():
    budgets, others = anchors()[:4], anchors()[4:]
    assert all(set(anchor.values) == {"diving48", "perception_test"} for anchor in budgets)
    assert len(others) == 12 and all(tuple(anchor.values) == COLUMNS for anchor in others)
    assert ROOT.is_dir()
