"""Lists that came from others: their paths stay below the folder that the user named, and a file of
another form is refused by file and line.
"""

import json

import pytest

from eval_encoder.lmm import questions as lmm_eval
from eval_encoder.lmm.data.conversation import read_samples
from eval_encoder.lmm.questions import read_questions


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures with a link to another disk, beside what no list may name."""
    images = tmp_path / "images"
    (images / "coco").mkdir(parents=True)
    (tmp_path / "other_disk").mkdir()
    (images / "linked").symlink_to(tmp_path / "other_disk")
    (tmp_path / "also_images").symlink_to(images)
    return images


def read_both(tmp_path, folder, kind, path):
    """Paths of a list and of a question file that name it in their second line."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This"}]
    sample = {"id": 1, "conversations": turns}
    question = {"question_id": 1, "text": "What?"}
    lists = ((sample, "samples", read_samples), (question, "questions", read_questions))
    read = []
    for row, name, reader in lists:
        file = tmp_path / f"{name}.jsonl"
        rows = [row, {**row, "question_id": 2, kind: path}]
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
        visuals = reader(file, folder)[1].visuals
        read.append(visuals[0].path)
    return read


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    "path",
    ["../secret.png", "coco/../../secret.png", "/etc/passwd", "..", "a\0b", "../shards#0", "/"],
)
def test_a_path_that_leads_out_of_the_folder_is_refused_by_line_and_value(
    tmp_path, folder, kind, path
):
    with pytest.raises(ValueError, match="is not below --image_folder") as refused:
        read_both(tmp_path, folder, kind, path)
    assert f"samples.jsonl line 2 (id 1): {kind} {path.replace(chr(0), chr(92) + 'x00')}" in str(
        refused.value
    )
    with pytest.raises(ValueError, match="questions.jsonl line 2: .* is not below"):
        file = tmp_path / "questions.jsonl"
        rows = [{"question_id": 1, "text": "?"}, {"question_id": 2, "text": "?", kind: path}]
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
        read_questions(file, folder)


def test_paths_below_the_folder_are_taken_as_they_stand(tmp_path, folder):
    for path in ("coco/1.jpg", "linked/2.jpg", "shards#00000_3", f"{folder}/coco/1.jpg"):
        assert read_both(tmp_path, folder, "video", path) == [path, path]
    # the folder by another of its names
    assert read_both(tmp_path, tmp_path / "also_images", "image", f"{folder}/1.jpg")


def test_absolute_paths_are_read_where_the_user_names_the_root(tmp_path):
    assert read_both(tmp_path, "/", "image", "/data/1.jpg") == ["/data/1.jpg"] * 2


def test_a_list_that_nothing_is_read_of_may_name_anything(tmp_path):
    assert read_both(tmp_path, None, "image", "../1.jpg") == ["../1.jpg"] * 2


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{oh", "no readable JSON"),
        (b"[" * 100_000, "no readable JSON"),
        (b'{"question_id": "\xff", "text": "a"}', "no readable JSON"),
        (b"[1]", "holds a list"),
        (b'{"text": "a"}', "has no 'question_id'"),
        (b'{"question_id": [1], "text": "a"}', "'question_id' is"),
        (b'{"question_id": 1, "text": null}', "'text' is"),
        (b'{"question_id": 1, "text": "a", "image": [7]}', "image is 7"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b'{"question_id": 0, "text": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message) as refused:
        read_questions(path)
    assert f"{path} line 2" in str(refused.value)


def test_earlier_answers_that_are_damaged_are_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    for damaged, message in (
        (b"{oh\n", "no readable JSON"),
        (b'{"question_id": 1}\n', "has no 'model_id'"),
    ):
        path.write_bytes(b'{"question_id": 0, "model_id": "m"}\n' + damaged)
        with pytest.raises(ValueError, match=message):
            lmm_eval._answered(path, tmp_path / "m")
