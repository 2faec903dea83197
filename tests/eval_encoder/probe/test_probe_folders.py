"""Folders and lists of a user's own in the probe: a label belongs to one clip, classes are what the
user made, benchmarks are found in every layout, and what is unclear is named.
"""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import call

from eval_encoder.probe import prepare as probe_prepare
from eval_encoder.probe.benchmarks import LabelledList, MissingBenchmark, read_lists
from eval_encoder.probe.metrics import Evaluation
from eval_encoder.probe.record import Costs, write_results

HEAD = "label,youtube_id,time_start,time_end,split\n"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def read(folder: Path, **options):
    said = []
    train, val = read_lists(str(folder), folder, report=said.append, **options)
    return train, val, said


def write_csv(folder: Path, train: str, val: str = "v.mp4,0\n") -> None:
    (folder / "train.csv").write_bytes(train.encode("utf-8", "surrogateescape"))
    (folder / "val.csv").write_text(val)


def listed(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", errors="surrogateescape") as stream:
        return list(csv.reader(stream))


@pytest.mark.parametrize(
    "label",
    ["1.9", "true", "-1", "nan", "1e3", "+1", "²", "null", "99999999999", "[1]", "1;2"],
)
def test_what_is_neither_integer_nor_word_is_an_error_with_line_and_value(tmp_path, label):
    write_csv(tmp_path, f"a.mp4,1\nb.mp4,{label}\n")
    expected = f'train.csv line 2: label "{label}" is no integer or word'
    with pytest.raises(ValueError, match=re.escape(expected)):
        read(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.mp4,2", 'line 3: a.mp4 has label "2" here and "1" in .*line 1: keep one line'),
        ("./a.mp4,1", "line 3: ./a.mp4 has label"),
        ("a.mp4", "line 3: .* is no `relative path,label`"),
        (",3", "line 3: .* is no `relative path,label`"),
        ("x,y.mp4,3", "line 3: .* is no `relative path,label`"),
        ("am\udce9lie.mp4,3", "line 3: .* is no UTF-8, and nothing has that name"),
    ],
)
def test_a_list_line_that_names_no_clip_or_a_second_time_is_an_error(tmp_path, line, message):
    write_csv(tmp_path, f"a.mp4,1\nb.mp4,2\n{line}\n")
    with pytest.raises(ValueError, match=f"train.csv {message}"):
        read(tmp_path)


def test_a_header_is_named_and_not_taken_for_a_clip_of_a_class(tmp_path):
    write_csv(tmp_path, "path,label\na.mp4,run\n", "v.mp4,run\n")
    with pytest.raises(ValueError, match="train.csv line 1: .* is a header: remove that line"):
        read(tmp_path)
    write_csv(tmp_path, "a.mp4,target\nb.mp4,miss\n", "v.mp4,miss\n")
    assert read(tmp_path)[0].classes == ("miss", "target")


def test_published_lists_of_several_labels_may_repeat_a_clip(tmp_path):
    folder = tmp_path / "charadesego"
    folder.mkdir()
    (folder / "train_new.csv").write_text("a.mp4,1\na.mp4,2\n")
    (folder / "val_new.csv").write_text("b.mp4,1\n")
    train, _ = read_lists("charadesego", tmp_path)
    assert train.labels.tolist() == [1, 2]


def test_words_are_classes_numbered_by_name_over_both_lists(tmp_path):
    write_csv(tmp_path, "a.mp4,walking\nb.mp4,riding a bike\n", "v.mp4,café\nw.mp4,walking\n")
    train, val, _ = read(tmp_path)
    assert train.classes == val.classes == ("café", "riding a bike", "walking")
    assert train.labels.tolist() == [2, 1] and val.labels.tolist() == [0, 2]
    assert train.num_classes == 3
    write_csv(tmp_path, "a.mp4,walk run\nb.mp4,\n", "v.mp4,sit\n")
    train, _, _ = read(tmp_path, protocol="multi_label")
    assert train.classes == ("run", "sit", "walk")
    assert train.labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    write_csv(tmp_path, "a.mp4,walk 3\n", "v.mp4,sit\n")
    with pytest.raises(ValueError, match="train.csv line 1: label 'walk 3'"):
        read(tmp_path, protocol="multi_label")


def test_words_and_integers_in_one_list_and_words_in_a_benchmark_are_errors(tmp_path):
    write_csv(tmp_path, "a.mp4,walking\nb.mp4,3\n")
    with pytest.raises(ValueError, match="train.csv line 2: label '3', but .*line 1 has 'walking'"):
        read(tmp_path)
    write_csv(tmp_path, "a.mp4,walking\n", "v.mp4,3\n")
    with pytest.raises(ValueError, match="val.csv line 1: label '3'"):
        read(tmp_path)
    folder = tmp_path / "motion_shapes"
    folder.mkdir()
    write_csv(folder, "a.mp4,left\n")
    with pytest.raises(ValueError, match="train.csv line 1: label 'left' is no integer"):
        read_lists("motion_shapes", tmp_path)


def test_hidden_folders_are_no_classes_and_their_files_no_clips(tmp_path):
    folder = tmp_path / ".sets" / "mine"
    for split in ("train", "val"):
        touch(folder / split, "a/1.jpg", "b/deep/2.jpg", ".ipynb_checkpoints/1.jpg")
        touch(folder / split, "@eaDir/1.jpg", "a/@eaDir/1.jpg", "__MACOSX/a/._1.jpg", "b/._2.jpg")
    touch(folder, "train/stray.jpg")
    train, val, said = read(folder)
    assert train.classes == ("a", "b") and train.num_classes == 2
    assert train.names == ["train/a/1.jpg", "train/b/deep/2.jpg"]
    assert val.names == ["val/a/1.jpg", "val/b/deep/2.jpg"]
    assert any("hidden or system" in line for line in said)
    assert any("lie in no class folder" in line and "stray.jpg" in line for line in said)


def test_class_folders_alone_are_split_by_hash_which_is_said(tmp_path):
    names = [f"{label}/{number}.jpg" for label in "abc" for number in range(40)]
    touch(tmp_path / "one", *names, "pair/1.jpg", "pair/2.jpg", "single/1.jpg", ".git/a/1.jpg")
    train, val, said = read(tmp_path / "one")
    assert sorted(train.names + val.names) == sorted([*names, "pair/1.jpg", "pair/2.jpg",
                                                      "single/1.jpg"])  # fmt: skip
    assert train.classes == ("a", "b", "c", "pair", "single")
    assert set(train.labels) == {0, 1, 2, 3, 4} and set(val.labels) == {0, 1, 2, 3}
    assert 0.1 < len(val) / (len(train) + len(val)) < 0.3
    assert len([line for line in said if "split by a hash" in line and "20%" in line]) == 1
    # the same files elsewhere, and one more: nothing changes sides
    touch(tmp_path / "two", *names, "pair/1.jpg", "pair/2.jpg", "single/1.jpg", "a/new.jpg")
    again = read(tmp_path / "two")[1]
    assert [name for name in again.names if name != "a/new.jpg"] == val.names


def test_one_folder_of_videos_is_no_set_of_one_class_and_no_benchmark_is_split(tmp_path):
    touch(tmp_path / "set", "clips/1.mp4", "clips/2.mp4")
    with pytest.raises(MissingBenchmark, match="nor two or more CLASS/"):
        read(tmp_path / "set")
    touch(tmp_path / "ucf101", "a/1.avi", "b/2.avi")
    with pytest.raises(MissingBenchmark, match="benchmark ucf101 is not on disk"):
        read_lists("ucf101", tmp_path)
    touch(tmp_path / "half", "train/a/1.mp4", "train/b/2.mp4")
    with pytest.raises(MissingBenchmark):
        read(tmp_path / "half")


def test_classes_and_predictions_are_written_beside_the_record(tmp_path):
    """Three clips, the second of which could not be read, and two heads."""
    from eval_encoder.probe.config import build_config, build_parser

    report = tmp_path / "report"
    config = build_config(build_parser().parse_args(["--save_report", str(report)]))
    figures = {"top1": 50.0, "ci95_clips": 1.0, "seeds": [50.0]}
    record = {
        "dataset": "mine", "family": "clip", "view": "frame", "weight": "w", "num_frames": 2,
        "head": "knn", "metric": "top1", "clips": {"val": 2}, "last_epoch": figures,
        "best_epoch": None,
    }  # fmt: skip
    costs = Costs(1.0, 1.0, 98.0, 1, 1, "cpu")
    facts = {"unreadable": {"val": {}}}
    labels = np.array([0, 1, 1])
    evaluation = Evaluation(
        labels=labels,
        evaluated=np.array([True, False, True]),
        true_rank=np.array([[1, 0, 1], [1, 0, 2]]),
        predicted=np.array([[0, 0, 1], [0, 0, 0]]),
        num_classes=2,
    )
    clips = LabelledList(
        tmp_path, "val", ["a.mp4", "b.mp4", "c.mp4"], labels, 2, ("riding a bike", "walk, run")
    )
    write_results(config, record, evaluation, clips, costs, facts)
    assert record["classes"] == "000_mine_classes.csv"
    assert listed(report / record["classes"]) == [["0", "riding a bike"], ["1", "walk, run"]]
    assert listed(report / record["predictions"]) == [
        ["clip", "class", "predicted_1", "predicted_2"],
        ["a.mp4", "0", "0", "0"],
        ["c.mp4", "1", "1", "0"],
    ]


def prepare_kinetics(root: Path, videos: Path, train: str, val: str):
    (root / "train.csv").write_text(HEAD + train)
    (root / "val.csv").write_text(HEAD + val)
    command = ["kinetics", "--train", str(root / "train.csv"), "--val", str(root / "val.csv")]
    call(probe_prepare.main, *command, "--videos", str(videos), "--output", str(root / "k700"))
    rows = [listed(root / "k700" / f"{split}_new.csv") for split in ("train", "val")]
    return [os.path.normpath(root / "k700" / row[0]) for split in rows for row in split]


@pytest.mark.parametrize(
    "layout",
    [
        "{split}/dancing ballet/{name}",
        "{split}/dancing_ballet/{name}",
        "{split}/{name}",
        "dancing ballet/{name}",
        "dancing_ballet/{name}",
        "{name}",
        "compress/{split}_256/dancing_ballet/{name}",
        "videos/{split}/dancing ballet/{name}",
    ],
)
def test_kinetics_is_found_as_its_downloaders_lay_it_out(tmp_path, layout):
    want = [
        layout.format(split="train", name="0347ZoDXyP0_000095_000105.mp4"),
        layout.format(split="val", name="0wR5jVB-WPk_000417_000427.mkv"),
    ]
    touch(tmp_path / "vid", *want)
    train = "dancing ballet,0347ZoDXyP0,95,105,train\n"
    val = "dancing ballet,0wR5jVB-WPk,417,427,val\n"
    found = prepare_kinetics(tmp_path, tmp_path / "vid", train, val)
    assert found == [str(tmp_path / "vid" / name) for name in want]


def test_a_video_in_both_splits_is_that_of_its_own_split(tmp_path):
    touch(tmp_path / "vid", "train/zumba/abc.mp4", "val/zumba/abc.mp4", "training dog/q.mp4")
    found = prepare_kinetics(
        tmp_path,
        tmp_path / "vid",
        train="zumba,abc,1,11,train\n",
        val="zumba,abc,50,60,val\ntraining dog,q,1,11,val\n",
    )
    names = ("train/zumba/abc.mp4", "val/zumba/abc.mp4", "training dog/q.mp4")
    assert found == [str(tmp_path / "vid" / name) for name in names]


def test_copies_that_the_list_does_not_tell_apart_are_an_error_naming_both(tmp_path):
    touch(tmp_path / "vid", "zumba/abc.mp4", "zumba/abc.mkv", "zumba/q.mp4")
    rows = {"train": "zumba,abc,1,11,train\n", "val": "zumba,q,1,11,val\n"}
    with pytest.raises(SystemExit, match="train.csv line 2: abc may be .*abc.mkv or .*abc.mp4"):
        prepare_kinetics(tmp_path, tmp_path / "vid", **rows)
    assert not (tmp_path / "k700").exists()


def test_lines_that_name_a_video_again_are_one_with_one_class_and_an_error_with_two(
    tmp_path, capsys
):
    touch(tmp_path / "vid", "abc_000001_000011.mp4", "q.mp4")
    row = "zumba,abc,1,11,train\n"
    found = prepare_kinetics(tmp_path, tmp_path / "vid", train=row + row, val="zumba,q,1,11,val\n")
    assert len(found) == 2 and "1 lines of train name a video again" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"line 3: .*abc_.* has class 0 here and 1 in .*line 2"):
        train = row + "archery,abc,1,11,train\n"
        prepare_kinetics(tmp_path, tmp_path / "vid", train=train, val="zumba,q,1,11,val\n")


@pytest.mark.parametrize("times", ["x,11", "1,inf", "nan,11"])
def test_times_that_are_no_seconds_are_named(tmp_path, times):
    touch(tmp_path / "vid", "abc.mp4")
    with pytest.raises(SystemExit, match="train.csv line 2: times .* are no seconds"):
        prepare_kinetics(
            tmp_path, tmp_path / "vid", f"zumba,abc,{times},train\n", "zumba,q,1,2,v\n"
        )


def prepare_hmdb(root: Path, line: bytes) -> list[str]:
    (root / "splits").mkdir(exist_ok=True)
    (root / "splits" / "kick_test_split1.txt").write_bytes(line + b"\nother.avi 2 \n")
    touch(root / "splits", "._kick_test_split1.txt")  # a file manager's: no class
    command = ["hmdb51", "--splits", str(root / "splits"), "--videos", str(root / "v")]
    call(probe_prepare.main, *command, "--output", str(root / "hmdb51"))
    return [row[0] for row in listed(root / "hmdb51" / "train_new.csv")]


def test_of_copies_the_one_with_the_lists_own_ending_is_taken(tmp_path):
    touch(tmp_path / "v", "kick/a.avi", "kick/a.mp4", "kick/other.avi", "old/kick/other.avi")
    assert prepare_hmdb(tmp_path, b"a.avi 1 ") == ["../v/kick/a.avi"]
    (tmp_path / "v" / "kick" / "a.avi").rename(tmp_path / "v" / "kick" / "a.mkv")
    with pytest.raises(SystemExit, match="kick_test_split1.txt line 1: .*a.mkv or .*a.mp4"):
        prepare_hmdb(tmp_path, b"a.avi 1 ")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_latin1_split_list_means_the_video_that_is_there(tmp_path, encoding):
    touch(tmp_path / "v", "kick/other.avi")
    name = os.fsencode(tmp_path / "v" / "kick") + b"/" + "amélie.avi".encode(encoding)
    with open(name, "wb") as stream:
        stream.write(b"x")
    found = prepare_hmdb(tmp_path, "amélie.avi 1 ".encode("latin-1"))
    assert os.fsencode(found[0]) == b"../v/kick/" + "amélie.avi".encode(encoding)
    train, _ = read_lists(
        str(tmp_path / "hmdb51"), tmp_path, train_csv="train_new.csv", val_csv="val_new.csv"
    )
    assert (train.folder / train.names[0]).is_file(), "what was written is read again"


def test_the_shared_split_list_without_its_video_is_an_error_with_file_and_line(tmp_path, shared):
    touch(tmp_path / "v", "kick/other.avi")
    case = (shared / "cases" / "folders" / "latin1_split_list.txt").read_bytes().strip()
    with pytest.raises(SystemExit, match="kick_test_split1.txt line 1: .* is no UTF-8"):
        prepare_hmdb(tmp_path, case)
    with pytest.raises(SystemExit, match="kick_test_split1.txt line 1: .* is no `NAME.avi`"):
        prepare_hmdb(tmp_path, b"a.avi")


def test_preparing_ends_where_links_lead_back_to_the_folder(tmp_path, capsys):
    touch(tmp_path / "v", "kick/a.avi", "kick/other.avi")
    (tmp_path / "v" / "up").symlink_to("..")
    (tmp_path / "v" / "kick" / "up2").symlink_to("../..")
    (tmp_path / "v" / "self.avi").symlink_to("self.avi")
    assert prepare_hmdb(tmp_path, b"a.avi 1 ") == ["../v/kick/a.avi"]
    assert "3 links of" in capsys.readouterr().err


def test_ucf_labels_must_agree_with_its_table(tmp_path):
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "classInd.txt").write_text("1 Archery\n")
    (splits / "testlist01.txt").write_text("Archery/b.avi\n")
    (splits / "trainlist01.txt").write_text("Archery/a.avi 2\n")
    with pytest.raises(ValueError, match="trainlist01.txt line 1: class 2, but .* number 1"):
        probe_prepare.read_ucf101(splits, 1)


@pytest.mark.parametrize("number", ["1.9", True, None, "²", -1])
def test_ssv2_numbers_that_are_no_integers_are_named(tmp_path, number):
    (tmp_path / "labels.json").write_text(json.dumps({"Holding something": number}))
    with pytest.raises(ValueError, match="labels.json: class 'Holding something' has number"):
        probe_prepare.read_ssv2(tmp_path)
