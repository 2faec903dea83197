"""A label belongs to exactly one sample and is a class; whatever else a list holds is an error that
names file, line and value.
"""

import json

import numpy as np
import pytest

from data_pipeline.clustering.browse import read_truth
from data_pipeline.clustering.labels import import_labels
from data_pipeline.errors import DataPipelineError, MissingData
from data_pipeline.shards.manifest import Manifest


def packed_as(tmp_path, *sources, rejected=()) -> Manifest:
    """A manifest of samples that exist in name alone."""
    samples = [{"source": source} for source in sources]
    shard = {"samples": samples, "rejected": [{"source": source} for source in rejected]}
    return Manifest(tmp_path, "0" * 64, {}, (shard,))


def imported(tmp_path, *lines, sources=("a.mp4", "b.mp4"), rejected=()):
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    manifest = packed_as(tmp_path, *sources, rejected=rejected)
    return import_labels(manifest, path, num_classes=5, width=3).tolist()


def entry(source, *labels) -> str:
    return json.dumps({"source": source, "labels": labels})


def test_every_sample_gets_the_labels_of_its_line_in_any_order(tmp_path):
    lines = (entry("b.mp4"), "", entry("a.mp4", 4, 0), entry("bad.mp4", 1), entry("c.mp4", 2, -1))
    found = imported(tmp_path, *lines, sources=("a.mp4", "b.mp4", "c.mp4"), rejected=["bad.mp4"])
    assert found == [[4, 0, -1], [-1, -1, -1], [2, -1, -1]]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("[1.9]", "label 1.9 is no integer"),
        ("[2.0]", "label 2.0 is no integer"),
        ("[true]", "label true is no integer"),
        ('["2"]', 'label "2" is no integer'),
        ("[null]", "label null is no integer"),
        ("[[1]]", r"label \[1\] is no integer"),
        ("[NaN]", "label NaN is no integer"),
        ("[0, -2]", "label -2, but classes are 0 to 4 and -1 for none"),
        ("[5]", "label 5, but classes are 0 to 4"),
        ("[99999999999999999999999]", "label 99999999999999999999999, but"),
        ("2", "is no"),
        ("null", "is no"),
    ],
)
def test_what_is_no_class_is_an_error_with_line_and_value(tmp_path, value, shown):
    lines = (entry("a.mp4", 1), f'{{"source": "b.mp4", "labels": {value}}}')
    with pytest.raises(DataPipelineError, match=rf"labels.jsonl line 2: .*{shown}"):
        imported(tmp_path, *lines)


@pytest.mark.parametrize(
    "line",
    ["[1]", "oops", '{"labels": [1]}', '{"source": 3, "labels": [1]}', "[" * 100_000, "1" * 5000],
)
def test_a_line_of_another_form_is_named(tmp_path, line):
    with pytest.raises(DataPipelineError, match="labels.jsonl line 2"):
        imported(tmp_path, entry("a.mp4", 1), line)


def test_a_line_for_no_sample_a_second_line_and_a_missing_one_are_errors(tmp_path):
    a, b = entry("a.mp4", 1), entry("b.mp4", 2)
    with pytest.raises(DataPipelineError, match='line 3: no sample is named "c.mp4".*e.g. "a.mp4"'):
        imported(tmp_path, a, b, entry("c.mp4", 2))
    with pytest.raises(DataPipelineError, match=r"line 3: a second line for a.mp4.*line 1: keep"):
        imported(tmp_path, a, b, a)
    with pytest.raises(MissingData, match="no line for 1 samples, 'b.mp4' first"):
        imported(tmp_path, a)


def test_two_samples_of_one_name_are_an_error_that_names_both(tmp_path):
    with pytest.raises(DataPipelineError, match="samples 0 and 2 of .* are both named x.mp4"):
        imported(tmp_path, entry("x.mp4", 1), sources=("x.mp4", "y.mp4", "x.mp4"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([[0.0], [np.nan]]), "row 1: nan is no integer"),
        (np.array([[0.0], [1.5]]), "row 1: 1.5 is no integer"),
        (np.array([[True], [False]]), r"holds bool \[2, 1\]"),
        (np.array([["1"], ["2"]]), "holds <U1"),
        (np.array([1, 2]), r"holds int64 \[2\]"),
        (np.array([[1], [2], [3]]), r"expected integers \[2, L\]"),
        (np.array([[1], [-2]]), "row 1: label -2, but classes are 0 to 4 and -1"),
        (np.array([[1, 5], [0, 0]]), "row 0: label 5"),
        (np.array([[1], [2**64 - 1]], np.uint64), "row 1: label 18446744073709551615"),
    ],
)
def test_an_array_that_holds_no_classes_is_an_error_with_row_and_value(tmp_path, rows, message):
    path = tmp_path / "labels.npy"
    np.save(path, rows, allow_pickle=False)
    manifest = packed_as(tmp_path, "a.mp4", "b.mp4")
    with pytest.raises(DataPipelineError, match=f"labels.npy.*{message}"):
        import_labels(manifest, path, num_classes=5, width=3)


def test_an_array_of_objects_is_never_read(tmp_path):
    path = tmp_path / "labels.npy"
    header = {"descr": "|O", "fortran_order": False, "shape": (2, 1)}
    with open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(bytes(64))
    with pytest.raises(DataPipelineError, match="labels.npy.*no array of numbers"):
        import_labels(packed_as(tmp_path, "a.mp4", "b.mp4"), path, num_classes=5, width=3)


def test_a_truth_list_names_a_sample_once_and_may_name_others(tmp_path):
    manifest = packed_as(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    path = tmp_path / "truth.csv"
    path.write_text("c.mp4,run\nother.mp4,sit\na.mp4,sit\nb.mp4,\n")
    assert read_truth(manifest, path).tolist() == [1, -1, 0]
    path.write_text("a.mp4,run\n./a.mp4,sit\n")
    with pytest.raises(DataPipelineError, match='line 2: .* has label "sit" here and "run" in'):
        read_truth(manifest, path)
    path.write_text("a.mp4,run\nb.mp4\n")
    with pytest.raises(DataPipelineError, match=r'line 2: \["b.mp4"\] is no `relative path,label`'):
        read_truth(manifest, path)


def test_the_shared_case_names_its_first_wrong_line(tmp_path, shared):
    manifest = packed_as(tmp_path, *(f"{n}.3gp" for n in range(1, 11)), "z.ts", "zz.webm")
    case = shared / "cases" / "folders" / "labels_of_odd_types.jsonl"
    with pytest.raises(DataPipelineError, match="types.jsonl line 1: label 1.9 is no integer"):
        import_labels(manifest, case, num_classes=5, width=3)
