"""The probe: benchmarks that are absent explain themselves, encoders are what was named,
counts are exact.
"""

import csv
import json
import shutil

import pytest
import torch
from conftest import run, torchrun

from eval_encoder.probe_config import build_config, build_parser
from eval_encoder.probe_datasets import MissingBenchmark, find_benchmark, read_lists
from eval_encoder.probe_encoders import build_encoder
from eval_encoder.probe_head import HeadBank
from eval_encoder.probe_prepare import prepare_ssv2
from eval_encoder.probe_video import codec_patches_of_video, frames_of_video, have_decord

PROBE = "eval_encoder/attentive_probe.py"


def probe_command(root, report, *extra):
    return (
        *(
            PROBE,
            "--dataset",
            "motion_shapes",
            "--data_root",
            root,
            "--model_name",
            "llava_vit_tiny_ln",
        ),
        *("--num_frames", 2, "--K_keep", 98, "--batch_size", 4, "--default_epoch", 2),
        *("--save_report", report, *extra),
    )


def test_a_missing_benchmark_shows_the_tree_and_the_command(tmp_path):
    done = run(PROBE, "--dataset", "ssv2", "--data_root", tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{tmp_path}/ssv2/" in done.stderr and "ssv2_val_new.csv" in done.stderr
    assert "python -m eval_encoder.probe_prepare ssv2" in done.stderr


def test_unknown_benchmarks_and_bad_lines_are_named(tmp_path):
    with pytest.raises(ValueError, match="ucf101"):
        find_benchmark("ucf-101")
    folder = tmp_path / "motion_shapes"
    folder.mkdir()
    (folder / "train.csv").write_text("a.mp4,1\nb.mp4,8\n")
    (folder / "val.csv").write_text("a.mp4,1\n")
    with pytest.raises(ValueError, match=r"train.csv line 2: \['b.mp4', '8'\]"):
        read_lists("motion_shapes", tmp_path, None, None)
    with pytest.raises(MissingBenchmark):
        read_lists("hmdb51", tmp_path, None, None)


def test_official_ssv2_files_become_lists(tmp_path):
    annotations, videos = tmp_path / "json", tmp_path / "videos"
    annotations.mkdir(), videos.mkdir()
    (annotations / "something-something-v2-labels.json").write_text(
        json.dumps({"Holding something": "0"})
    )
    entries = [{"id": str(i), "template": "Holding [something]"} for i in (1, 2)]
    (annotations / "something-something-v2-train.json").write_text(json.dumps(entries))
    (annotations / "something-something-v2-validation.json").write_text(json.dumps(entries[:1]))
    (videos / "1.webm").write_bytes(b"x")
    assert prepare_ssv2(annotations, videos, tmp_path / "ssv2") == {"train": (1, 1), "val": (1, 0)}
    train, val = read_lists("ssv2", tmp_path, None, None)
    assert train.names == ["../videos/1.webm"] and val.labels == [0]


def test_a_wrong_weight_path_is_an_error_never_another_model(tmp_path):
    for weight in ("NULL", str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises(ValueError, match="no Hugging Face folder"):
            build_encoder("llava_vit_tiny_ln", weight, 0)
    first, second = (build_encoder("llava_vit_tiny_ln", "random", 1) for _ in range(2))
    assert torch.equal(first.patch_embed.proj.weight, second.patch_embed.proj.weight)
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_config_mistakes_are_named():
    with pytest.raises(ValueError, match="--model_family 'clip'"):
        build_config(build_parser().parse_args(["--model_family", "clip"]))


def test_heads_of_a_bank_start_alike_and_pool_each_clip_alone():
    bank = HeadBank(64, 5, 2, seed=0)
    tokens = torch.randn(30, 64)
    bounds = torch.tensor([0, 12, 30], dtype=torch.int32)
    logits = bank(tokens, bounds, 18)
    assert logits.shape == (2, 2, 5) and torch.equal(logits[0], logits[1])
    alone = bank(tokens[12:], torch.tensor([0, 18], dtype=torch.int32), 18)
    assert torch.allclose(alone[0, 0], logits[0, 1], atol=1e-6)


@pytest.mark.parametrize("decoder", ["av", "decord"])
def test_raw_frames_lie_in_the_middle_of_their_segments(clips, decoder):
    if decoder == "decord" and not have_decord():
        pytest.skip("decord is not installed")
    view = frames_of_video(clips / "clips" / "train_00000.mp4", 4, 112, 16, 64, decoder)
    assert view.grid == (4, 7, 7) and len(view) == 196 and view.patch_dim == 768
    times = view.positions[::49, 0].tolist()
    assert all(abs(time - want) <= 1 for time, want in zip(times, (8, 24, 40, 56), strict=True))


def test_raw_codec_patches_are_those_that_packing_keeps(clips, packed):
    from data_pipeline.loading.choices import ViewConfig
    from data_pipeline.loading.sequential import sequential_batches
    from data_pipeline.shards.manifest import load_manifest

    view = codec_patches_of_video(clips / "clips" / "train_00003.mp4", 98, 112, 16, 64, gop=64)
    manifest = load_manifest(packed / "train")
    (batch,) = sequential_batches(manifest, [3], 1, "codec", ViewConfig(max_tokens=98))
    assert torch.equal(view.positions, batch.patch_positions)
    rows = torch.empty_like(batch.pixels)
    view.write(rows)
    assert (rows.float() - batch.pixels.float()).abs().mean() < 6  # JPEG


@pytest.mark.e2e
@pytest.mark.dali
@pytest.mark.parametrize("family", ["llava_vit_sampling", "llava_vit_codec"])
def test_packed_probe_counts_every_clip_once_on_two_ranks(packed, tmp_path, family):
    extra = (
        "--model_weight",
        "random",
        "--model_family",
        family,
        "--default_lr_list",
        "1e-3",
        "1e-2",
    )
    done = torchrun(2, *probe_command(packed.parent, tmp_path, *extra))
    assert f"motion_shapes {family}: top-1" in done.stdout
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert record["clips"] == {"train": 24, "val": 8} and len(record["by_lr"]) == 2
    assert (record["last_epoch"]["top1"] * 8 / 100) % 1 == 0  # a whole number of 8 clips
    assert (tmp_path / "report_attentive_probe_random.txt").read_text().startswith("motion_shapes ")


@pytest.mark.e2e
def test_raw_videos_are_judged_too_and_missing_ones_forbid_an_accuracy(clips, tmp_path):
    root = tmp_path / "motion_shapes"
    root.mkdir()
    shutil.copytree(clips / "clips", root / "clips")
    for name in ("train.csv", "val.csv"):
        shutil.copy(clips / name, root / name)
    extra = ("--model_weight", "random", "--input_size", 112)
    run(*probe_command(tmp_path, tmp_path / "report", *extra))
    (root / "clips" / "val_00003.mp4").unlink()
    done = run(*probe_command(tmp_path, tmp_path / "again", *extra), check=False)
    assert done.returncode == 1 and "clips/val_00003.mp4: missing" in done.stderr
    assert not (tmp_path / "again").exists()
    done = run(*probe_command(tmp_path, tmp_path / "again", *extra, "--allow-partial"))
    assert "without 1 unreadable clips" in done.stdout


def test_more_than_is_packed_is_an_error_not_less_than_asked(packed, tmp_path):
    extra = ("--model_weight", "random", "--model_family", "llava_vit_codec", "--K_keep", 500)
    done = run(*probe_command(packed.parent, tmp_path, *extra), check=False)
    assert done.returncode == 1 and "keeps 98 patches a clip; pass --K_keep 98" in done.stderr


def test_lists_and_packed_shards_name_the_same_clips(packed):
    train, _ = read_lists("motion_shapes", packed.parent, None, None)
    assert train.shards == packed / "train"
    with open(packed / "train.csv") as lines:
        assert train.names == [row[0] for row in csv.reader(lines)]
