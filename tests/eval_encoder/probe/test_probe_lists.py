"""Lists of benchmarks: official files become lists, what is absent or wrong is named, flags are
checked before anything is loaded.
"""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import call

from data_pipeline.codec import patches, saliency
from data_pipeline.codec.saliency import CAMERA_MODELS
from eval_encoder.clip_input import RULES, SCORES
from eval_encoder.probe import prepare as probe_prepare
from eval_encoder.probe.benchmarks import (
    BENCHMARKS,
    LabelledList,
    MissingBenchmark,
    find_benchmark,
    hold_out,
    read_lists,
    shared_files,
)
from eval_encoder.probe.config import (
    CAMERAS,
    IDLE_FLAGS,
    IMAGE_FAMILIES,
    build_config,
    build_parser,
)
from model_factory.hf_image_encoders import FAMILIES

PUBLIC_FLAGS = """
data_root train_data_csv_path val_data_csv_path dataset model_family model_name model_weight
num_frames target_frames num_tokens input_size short_side_size tubelet_size embedding_size
frames_token_num num_classes batch_size default_epoch default_lr_list default_weight_decay
default_min_lr clip_grad smoothing print_freq eval_freq dali_num_threads dali_py_num_workers
decord_num_threads mean std seed save_report num_temporal_crops num_spatial_crops probe_size
patch_size cache_dir K_keep mv_compensate mv_use_inconsistency mv_incon_ksize res_use_grad
center_prior center_sigma static_fallback static_abs_thresh static_rel_thresh
static_uniform_frames checkpoint_dir resume_checkpoint
""".split()


def clip_list(labels, num_classes, split="train") -> LabelledList:
    """A list of clips that exist in name alone."""
    names = [f"{i}.mp4" for i in range(len(labels))]
    return LabelledList(None, split, names, np.asarray(labels), num_classes)


def write_videos(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def listed(path) -> list[list[str]]:
    with open(path) as stream:
        return list(csv.reader(stream))


def test_every_published_flag_is_accepted_and_known_choices_match_the_code():
    known = {action.dest for action in build_parser()._actions}
    assert set(PUBLIC_FLAGS) <= known and set(IDLE_FLAGS) <= set(PUBLIC_FLAGS)
    assert set(IMAGE_FAMILIES) == set(FAMILIES) and set(CAMERAS) == set(CAMERA_MODELS)
    assert saliency.SCORES == SCORES and patches.RULES == RULES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model_family", "llava_vit"), "nearest: llava_vit"),
        (("--head", "svm"), "attentive, linear, knn"),
        (("--augment", "jitter", "flip"), "--augment 'flip'"),
        (("--num_frames", "0"), "--num_frames 0 must be at least 1"),
        (("--holdout", "0", "--default_lr_list", "1", "2"), "nothing to choose among 2"),
        (("--mean", "0", "0", "0"), "--mean and --std belong together"),
        (("--clip_grad", "0"), "--clip_grad 0.0 must be positive"),
        (("--default_lr_list", "0.1", "0.1"), "different numbers"),
        (("--model_family", "llava_vit_codec", "--num_temporal_crops", "3"), "whole clip"),
        (("--model_family", "llava_vit_codec", "--target_frames", "65"), "at most 64"),
        (("--mean", "0", "0", "0", "--std", "1", "0", "1"), "--std"),
    ],
)
def test_mistakes_in_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        build_config(build_parser().parse_args(list(flags)))


def test_unknown_benchmarks_and_bad_lines_are_named(tmp_path):
    with pytest.raises(ValueError, match="ucf101"):
        find_benchmark("ucf-101")
    folder = tmp_path / "motion_shapes"
    folder.mkdir()
    (folder / "val.csv").write_text("a.mp4,1\n")
    (folder / "train.csv").write_text("a.mp4,1\nb.mp4,8\n")
    with pytest.raises(ValueError, match=r"train.csv line 2: label 8, but there are 8 classes"):
        read_lists("motion_shapes", tmp_path)
    (folder / "train.csv").write_text("a.mp4,1\nb.mp4,left\n")
    with pytest.raises(ValueError, match=r"train.csv line 2: label 'left' is no integer"):
        read_lists("motion_shapes", tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_absent_benchmark_shows_its_tree(name, tmp_path):
    with pytest.raises(MissingBenchmark, match=f"{name}/\n    {BENCHMARKS[name].train_csv}"):
        read_lists(name, tmp_path)


def test_any_folder_is_a_benchmark(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4,1\nb.mp4,4\n")
    (tmp_path / "val.csv").write_text("c.mp4,0\n")
    train, val = read_lists(str(tmp_path), tmp_path)
    assert train.num_classes == val.num_classes == 5 and train.labels.tolist() == [1, 4]
    several, _ = read_lists(str(tmp_path), tmp_path, num_classes=6, protocol="multi_label")
    assert several.labels.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    (tmp_path / "train.csv").write_text("a.mp4,1\nb.mp4,\n")
    several, _ = read_lists(str(tmp_path), tmp_path, protocol="multi_label")
    assert several.labels.tolist() == [[0, 1], [0, 0]], "a clip may show none of the classes"
    with pytest.raises(ValueError, match="line 2: 0 labels"):
        read_lists(str(tmp_path), tmp_path)
    (tmp_path / "train.csv").write_text("a.mp4,1\na.mp4,3 0\n")
    several, _ = read_lists(str(tmp_path), tmp_path, protocol="multi_label")
    assert several.names == ["a.mp4"] and several.labels.tolist() == [[1, 1, 0, 1]]
    (tmp_path / "train" / "x").mkdir(parents=True), (tmp_path / "val" / "x").mkdir(parents=True)
    with pytest.raises(MissingBenchmark, match="other.csv is missing"):
        read_lists(str(tmp_path), tmp_path, train_csv="other.csv")
    (tmp_path / "val.csv").write_text("c.mp4,0 2\n")
    with pytest.raises(ValueError, match="2 labels; evaluate .* with --protocol multi_label"):
        read_lists(str(tmp_path), tmp_path)


def test_held_out_clips_are_part_of_train_and_do_not_change():
    clips = clip_list(np.zeros(95, int), 1)
    keep, held = hold_out(clips, 0.1)
    assert len(held) == 10 and sorted([*keep, *held]) == list(range(95))
    assert np.array_equal(held, hold_out(clips, 0.1)[1]) and len(hold_out(clips, 0)[1]) == 0
    assert [len(part) for part in hold_out(clip_list([0, 0], 1), 0.9)] == [1, 1]
    twice = replace(clips, names=[f"{i // 2}.mp4" for i in range(95)])
    keep, held = hold_out(twice, 0.3)
    assert not {twice.names[i] for i in keep} & {twice.names[i] for i in held}
    assert len({twice.names[i] for i in held}) == 14, "three tenths of the 48 files"
    assert shared_files(twice, clip_list([0] * 3, 1)) == ["0.mp4", "1.mp4", "2.mp4"]


def test_official_ssv2_files_become_lists(tmp_path):
    annotations = tmp_path / "json"
    annotations.mkdir()
    (annotations / "something-something-v2-labels.json").write_text(
        json.dumps({"Holding something": "0"})
    )
    entries = [{"id": str(i), "template": "Holding [something]"} for i in (1, 2)]
    (annotations / "something-something-v2-train.json").write_text(json.dumps(entries))
    (annotations / "something-something-v2-validation.json").write_text(json.dumps(entries[:1]))
    write_videos(tmp_path / "videos", "1.webm")
    splits = probe_prepare.read_ssv2(annotations)
    counts = probe_prepare.write_lists("ssv2", splits, tmp_path / "videos", tmp_path / "ssv2")
    assert counts == {"train": (1, 1), "val": (1, 0)}
    assert (tmp_path / "ssv2" / "absent_train.txt").read_text() == "2\n"
    train, val = read_lists("ssv2", tmp_path)
    assert train.names == ["../videos/1.webm", "../videos/2.webm"], "absent ones stay listed"
    assert val.labels.tolist() == [0]
    (tmp_path / "videos" / "1.webm").unlink()
    with pytest.raises(ValueError, match="none of the 2 train videos"):
        probe_prepare.write_lists("ssv2", splits, tmp_path / "videos", tmp_path / "ssv2")


def test_official_ucf101_and_hmdb51_lists_become_lists(tmp_path):
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 Archery\n")
    (splits / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 2\n")
    (splits / "testlist01.txt").write_text("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n")
    names = ("Archery/v_Archery_g08_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi")
    write_videos(tmp_path / "ucf", *names)
    command = ["ucf101", "--splits", str(splits), "--videos", str(tmp_path / "ucf")]
    call(probe_prepare.main, *command, "--output", str(tmp_path / "ucf101"))
    assert listed(tmp_path / "ucf101" / "train_new.csv") == [
        ["../ucf/Archery/v_Archery_g08_c01.avi", "1"]
    ]
    assert listed(tmp_path / "ucf101" / "val_new.csv") == [[f"../ucf/{names[1]}", "0"]]

    (splits / "brush_hair_test_split1.txt").write_text("a.avi 1 \nb.avi 2 \nc.avi 0 \n")
    (splits / "wave_test_split1.txt").write_text("d.avi 1 \n")
    write_videos(tmp_path / "hmdb", "brush_hair/a.avi", "brush_hair/b.mp4", "wave/d.avi")
    command = ["hmdb51", "--splits", str(splits), "--videos", str(tmp_path / "hmdb")]
    call(probe_prepare.main, *command, "--output", str(tmp_path / "hmdb51"))
    assert [row[1] for row in listed(tmp_path / "hmdb51" / "train_new.csv")] == ["0", "1"]
    assert listed(tmp_path / "hmdb51" / "val_new.csv") == [["../hmdb/brush_hair/b.mp4", "0"]]
    with pytest.raises(SystemExit, match="no CLASS_test_split2.txt"):
        call(probe_prepare.main, *command, "--split", "2", "--output", str(tmp_path / "hmdb51"))


def test_official_kinetics_files_become_lists(tmp_path):
    head = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "train.csv").write_text(
        f"{head}zumba,abc,7,17,train\nair drumming,x_y-1,0,10,train\nzumba,gone,1,11,train\n"
    )
    (tmp_path / "val.csv").write_text(f"{head}air drumming,q,3,13,val\n")
    names = ("zumba/abc_000007_000017.mp4", "air_drumming/x_y-1_000000_000010.mp4", "q.mkv")
    write_videos(tmp_path / "videos", *names)
    command = ["kinetics", "--train", str(tmp_path / "train.csv"), "--val"]
    command += [str(tmp_path / "val.csv"), "--videos", str(tmp_path / "videos")]
    call(probe_prepare.main, *command, "--output", str(tmp_path / "k700"))
    train = listed(tmp_path / "k700" / "train_new.csv")
    assert train[:2] == [[f"../videos/{names[0]}", "1"], [f"../videos/{names[1]}", "0"]]
    assert train[2] == ["../videos/zumba/gone_000001_000011.mp4", "1"]
    assert listed(tmp_path / "k700" / "val_new.csv") == [["../videos/q.mkv", "0"]]
    assert "gone" in (tmp_path / "k700" / "absent_train.txt").read_text()
    (tmp_path / "val.csv").write_text("video,class\na,b\n")
    with pytest.raises(SystemExit, match="lacks the columns"):
        call(probe_prepare.main, *command, "--output", str(tmp_path / "k700"))
