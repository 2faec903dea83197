"""Scores and answer files of a multimodal model: values counted by hand, pairing by id alone, the
formats that servers take.
"""

import csv
import importlib.util
import json

import pytest
from conftest import call, run

from eval_encoder.lmm.scoring import answers as lmm_answers
from eval_encoder.lmm.scoring import scorers as lmm_scorers
from eval_encoder.lmm.scoring.answers import FORMATS, normalise_answer, read_answers
from eval_encoder.lmm.scoring.scorers import (
    COGNITION,
    PERCEPTION,
    SCORERS,
    leading_yes,
    option_letter,
    says_yes,
    score,
    soft_accuracy,
    summarise_pope,
)


def lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def answers(folder, texts, prompts=None):
    """An answers file; texts {id: text} or [(id, text)]."""
    pairs = list(texts.items() if isinstance(texts, dict) else texts)
    rows = [
        {"question_id": id, "prompt": "Q?", "text": text, "answer_id": f"a{n}", "model_id": "m"}
        | {"metadata": {}}
        for n, (id, text) in enumerate(pairs)
    ]
    for row, prompt in zip(rows, prompts or (), strict=bool(prompts)):
        row["prompt"] = prompt
    return lines(folder / "answers.jsonl", rows)


def dump(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def gqa(tmp_path):
    """Annotations of three questions."""
    truths = {"10": "left", "11": "no", "12": "blue"}
    return dump(tmp_path / "gqa.json", {k: {"answer": v, "isBalanced": True} for k, v in
                                        truths.items()})  # fmt: skip


# pairing


def test_answers_are_paired_by_id_whatever_their_order(tmp_path, gqa):
    found = score("gqa", answers(tmp_path, {"12": "Blue.", "10": "right", "11": "no"}), gqa)
    assert found.figures == {"accuracy": pytest.approx(200 / 3)} and found.questions == 3


def test_an_id_is_the_same_as_number_and_as_text(tmp_path, gqa):
    assert score("gqa", answers(tmp_path, {12: "blue", 10: "left", 11: "no"}), gqa).figures == {
        "accuracy": 100
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("10", "left")], r"2 missing .*: '11', '12'"),
        ([("10", "a"), ("11", "a"), ("12", "a"), ("11", "b")], r"1 doubled .*: '11'"),
        ([("10", "a"), ("11", "a"), ("12", "a"), ("7", "b")], r"1 foreign .*: '7'"),
        ([("10", "a"), ("11", "a"), ("7", "b")], r"1 missing .*'12'; 1 foreign .*'7'"),
    ],
)
def test_missing_doubled_and_foreign_ids_are_errors_that_name_file_id_and_count(
    tmp_path, gqa, given, message
):
    with pytest.raises(ValueError, match=rf"answers\.jsonl .*{message}"):
        score("gqa", answers(tmp_path, given), gqa)


def test_a_damaged_line_is_named(tmp_path, gqa):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": "10", "prompt": "", "text": ""}\n{"question_id": "11"\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl line 2 is no readable JSON"):
        score("gqa", path, gqa)
    lines(path, [{"question_id": "10", "prompt": ""}])
    with pytest.raises(ValueError, match=r"answers\.jsonl line 1 has no 'text'"):
        score("gqa", path, gqa)
    lines(path, [{"question_id": "10", "prompt": "", "text": 3}])
    with pytest.raises(ValueError, match=r"line 1: 'text' is 3, expected str"):
        score("gqa", path, gqa)
    path.write_bytes(b'{"question_id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl line 1 is no readable JSON"):
        score("gqa", path, gqa)


def test_only_a_line_feed_ends_a_line(tmp_path, gqa):
    rows = [{"question_id": i, "prompt": "a\u2028b\x85c", "text": "no"} for i in (10, 11, 12)]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert score("gqa", path, gqa).questions == 3


@pytest.mark.parametrize("benchmark", SCORERS)
def test_absent_annotations_and_empty_answers_are_errors(tmp_path, benchmark):
    path = answers(tmp_path, {})
    with pytest.raises(ValueError, match="absent"):
        score(benchmark, path, tmp_path / "absent")
    with pytest.raises(ValueError, match="unknown benchmark 'vqa'"):
        score("vqa", path, tmp_path)


# scorers


def test_pope_reads_the_first_sentence():
    no = ["No", "no.", "No, there is none.", "There is not a dog.", "NO!"]
    yes = ["Yes", "Yes. No doubt.", "There is a dog", "nothing", "a note", ""]
    assert not any(map(says_yes, no)) and all(map(says_yes, yes))


def write_pope(folder, labels):
    for name, values in labels.items():
        rows = [{"question_id": n + 1, "image": "a.jpg", "text": "Is there a dog in the image?",
                 "label": value} for n, value in enumerate(values)]  # fmt: skip
        lines(folder / f"coco_pope_{name}.json", rows)


def test_pope_by_hand(tmp_path):
    write_pope(tmp_path, {"random": ["yes", "yes", "no", "no"], "popular": ["yes", "no"],
                          "adversarial": ["no", "yes"]})  # fmt: skip
    given = {"adversarial/1": "Yes", "adversarial/2": "no", "popular/2": "No", "popular/1": "Yes"}
    given |= {"random/1": "Yes", "random/2": "no", "random/3": "yes", "random/4": "yes"}
    found = score("pope", answers(tmp_path, given), tmp_path).figures
    one = {"accuracy": 25, "precision": 100 / 3, "recall": 50, "f1": 40, "yes": 75}
    assert {k: found[f"random_{k}"] for k in one} == pytest.approx(one)
    perfect = {"accuracy": 100, "precision": 100, "recall": 100, "f1": 100, "yes": 50}
    assert {k: found[f"popular_{k}"] for k in perfect} == perfect
    assert found["adversarial_f1"] == 0 == found["adversarial_precision"]
    assert next(iter(found)) == "f1" and found["f1"] == pytest.approx((40 + 100 + 0) / 3)
    with pytest.raises(ValueError, match=r"1 foreign .*'1'\. Ids asked: 'random/1'"):
        score("pope", answers(tmp_path, given | {1: "Yes"}), tmp_path)


def test_pope_figures_of_published_counts():
    """LLaVA-1.5 7B on the 2910 random questions."""
    counts = {(True, True): 1183, (True, False): 31, (False, False): 1379, (False, True): 317}
    pairs = [pair for pair, count in counts.items() for _ in range(count)]
    found = summarise_pope({"random": pairs})
    assert found["random_accuracy"] == pytest.approx(88.04123711)
    assert found["random_precision"] == pytest.approx(97.44645799)
    assert found["random_recall"] == pytest.approx(78.86666667)
    assert found["random_f1"] == found["f1"] == pytest.approx(87.17759764)
    never = summarise_pope({"random": [(False, True), (False, False)]})
    assert never["random_precision"] == never["random_recall"] == never["f1"] == 0


def test_pope_label_files_must_be_the_official_ones(tmp_path):
    write_pope(tmp_path, {"random": ["yes", "maybe"], "popular": ["no"], "adversarial": ["no"]})
    path = answers(tmp_path, {})
    with pytest.raises(ValueError, match=r"coco_pope_random\.json id 2: label 'maybe'"):
        score("pope", path, tmp_path)
    lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, "label": "no"}] * 2)
    with pytest.raises(ValueError, match=r"coco_pope_random\.json names question_id 1 twice"):
        score("pope", path, tmp_path)


def test_gqa_strips_case_and_final_dot_alone(tmp_path, gqa):
    texts = {"10": "LEFT.", "11": "no way", "12": "the blue"}
    assert score("gqa", answers(tmp_path, texts), gqa).figures["accuracy"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. because", "B"),
        ("I think so. The answer is C.", "C"),
        ("The answer is C. No: The answer is D.", None),
        ("The answer is C", None),
        ("B.", None),
        ("Because", None),
        ("b", None),
        ("F", None),
        ("", None),
    ],
)
def test_option_letters(text, letter):
    assert option_letter(text) == letter


def test_scienceqa_reports_the_questions_with_pictures_and_all(tmp_path):
    problem = {"choices": ["x", "y"], "split": "test"}
    problems = {
        "3": problem | {"answer": 0, "image": "image.png"},
        "5": problem | {"answer": 1, "image": "image.png"},
        "8": problem | {"answer": 1, "image": None},
        "9": problem | {"answer": 0, "image": None, "split": "train"},
    }
    dump(tmp_path / "problems.json", problems)
    dump(tmp_path / "pid_splits.json", {"train": ["9"], "test": ["3", "5", "8"]})
    path = answers(tmp_path, {"8": "The answer is B.", "5": "no idea", "3": "A. x"})
    found = score("sqa", path, tmp_path).figures
    assert found == {"image": 50, "all": pytest.approx(200 / 3)}
    del problems["8"]
    dump(tmp_path / "problems.json", problems)
    with pytest.raises(ValueError, match=r"problems\.json has no '8'"):
        score("sqa", path, tmp_path)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Two dogs.", "2 dogs"),
        ("None", "0"),
        ("10,000", "10000"),
        ("3.5 m.", "3.5 m"),
        ("dont  stop", "don't stop"),
        ("couldntve", "couldntve"),
        ("couldn'tve shouldnt've twas", "couldn't've shouldn't've 'twas"),
        ("well, were ill", "well were ill"),
        ("John's", "john 's"),
        ("coca-cola", "coca cola"),
        ("coca - cola x-y", "coca cola xy"),
        ('"stop!"', "stop"),
        ("what?\n2:50 pm", "what 2:50 pm"),
        ("a", ""),
    ],
)
def test_answers_are_normalised_as_the_server_does(text, normal):
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(("agreeing", "value"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_soft_accuracy_leaves_one_annotator_out(agreeing, value):
    references = ["The Two."] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert soft_accuracy("two", references) == pytest.approx(value)


def test_textvqa_pairs_by_image_and_question(tmp_path):
    def entry(number, image, question, *answers):
        return {"question_id": number, "image_id": image, "question": question,
                "answers": [*answers, *(["x"] * (10 - len(answers)))]}  # fmt: skip

    data = [
        entry(34602, "f00", "what is the brand?", "nokia", "Nokia"),
        entry(34603, "f00", "what time is it? ", "5"),
        entry(34604, "a11", "What is the brand?", *["dakota"] * 9),
        entry(34605, "a11", "what is the brand?", *["dakota"] * 3),
    ]
    annotations = dump(tmp_path / "val.json", {"dataset_type": "val", "data": data})
    asked = [
        ("a11", "What is the brand?", "Dakota."),
        ("f00", "What time is it?", "five"),
        ("f00", "what is the brand?", "nokia"),
        ("a11", "what is the brand?", "dakota"),
    ]
    prompts = [f"{question}\nReference OCR token: A, B\nAnswer." for _, question, _ in asked]
    path = answers(tmp_path, [(image, text) for image, _, text in asked], prompts)
    expected = 100 * (0.6 + 0.3 + 1 + 0.9) / 4
    assert score("textvqa", path, annotations).figures == {"accuracy": pytest.approx(expected)}
    prompts[1] = "What else?"
    path = answers(tmp_path, [(image, text) for image, _, text in asked], prompts)
    with pytest.raises(ValueError, match=r"1 missing .*time is it\?'\); 1 foreign .*what else"):
        score("textvqa", path, annotations)


@pytest.fixture
def seed(tmp_path):
    """Annotations of three questions about images and one about a video."""
    rows = [("101", "A", "image", 1), ("102", "B", "image", 1), ("103", "C", "image", 9)]
    rows += [("v1", "D", "video", 10)]
    names = ("question_id", "answer", "data_type", "question_type_id")
    questions = [dict(zip(names, row, strict=True)) for row in rows]
    return dump(tmp_path / "seed.json", {"questions": questions, "question_type": {}})


def test_seed_total_and_parts(tmp_path, seed):
    texts = {"v1": "D", "103": "C. because", "102": "B", "101": "A\n"}
    assert score("seed", answers(tmp_path, texts), seed).figures == {
        "total": 75,
        "image": pytest.approx(200 / 3),
        "video": 100,
        "image_type_1": 100,
        "image_type_9": 0,
        "video_type_10": 100,
    }


def test_seed_image_asks_for_the_images_alone(tmp_path, seed):
    texts = {"103": "C", "102": "B", "101": "B"}
    found = score("seed_image", answers(tmp_path, texts), seed).figures
    assert found == {"image": pytest.approx(200 / 3), "image_type_1": 50, "image_type_9": 100}
    with pytest.raises(ValueError, match="1 missing .*'v1'"):
        score("seed", answers(tmp_path, texts), seed)
    with pytest.raises(ValueError, match="1 foreign .*'v1'"):
        score("seed_image", answers(tmp_path, texts | {"v1": "D"}), seed)


def test_mme_reads_the_first_four_characters():
    assert leading_yes("Yes") and leading_yes(" yes, it is") and leading_yes("'Yes'")
    assert leading_yes("No.") is False and leading_yes("not") is False
    assert leading_yes("Maybe no") is None and leading_yes("") is None


def write_mme(folder):
    """Every task: two pictures, each with a question of the answer yes and one of the answer no."""
    questions = (("so", "Yes"), ("not so", "No"))
    for task in PERCEPTION + COGNITION:
        rows = [
            f"{picture}.jpg\tIs it {word}?  Please answer yes or no.\t{truth}\n"
            for picture in range(2)
            for word, truth in questions
        ]
        (folder / f"{task}.txt").write_text("".join(rows))


def mme_answers(folder, texts):
    """texts {task: of picture 0 so, not so, of picture 1 so, not so}"""
    pairs, prompts = [], []
    for task in COGNITION + PERCEPTION:
        given = texts.get(task, ["Yes", "No", "Yes", "No"])
        for place in (3, 0, 2, 1):
            middle = "images/" if task == "artwork" else ""
            pairs.append((f"{task}/{middle}{place // 2}.jpg", given[place]))
            prompts.append(f"Is it {'not so' if place % 2 else 'so'}?\nAnswer in one word.")
    return answers(folder, pairs, prompts)


def test_mme_by_hand(tmp_path):
    write_mme(tmp_path)
    texts = {"count": ["Yes", "Yes", "yes", "no"], "OCR": ["no", "yes", "hm", "Yes"]}
    texts |= {"code_reasoning": ["Yes", "no", "No", "No"]}
    found = score("mme", mme_answers(tmp_path, texts), tmp_path)
    assert found.questions == 14 * 4
    figures = found.figures
    assert figures["count_accuracy"] == 75 and figures["count_accuracy_plus"] == 50
    assert figures["OCR_accuracy"] == 0 == figures["OCR_accuracy_plus"]
    assert figures["artwork_accuracy"] == 100 == figures["artwork_accuracy_plus"]
    assert figures["perception"] == 8 * 200 + 125 and figures["cognition"] == 3 * 200 + 125
    assert list(figures)[:2] == ["perception", "cognition"]


def test_mme_needs_two_questions_of_each_picture_and_whole_lines(tmp_path):
    write_mme(tmp_path)
    path = mme_answers(tmp_path, {})
    text = (tmp_path / "scene.txt").read_text()
    (tmp_path / "scene.txt").write_text(text + "\n2.jpg\tIs it?\n")
    with pytest.raises(ValueError, match=r"scene\.txt line 6"):
        score("mme", path, tmp_path)
    rows = text.splitlines(keepends=True)
    (tmp_path / "scene.txt").write_text("".join(rows[1:]))
    kept = [
        line for line in path.read_text().splitlines() if "scene/0" not in line or "not" in line
    ]
    path.write_text("\n".join(kept))
    with pytest.raises(ValueError, match=r"scene\.txt asks 1, not 2, of 0\.jpg"):
        score("mme", path, tmp_path)


# command and intervals


def test_intervals_hold_the_figure_and_are_the_same_each_time(tmp_path):
    truths = {str(n): {"answer": "yes"} for n in range(200)}
    annotations = dump(tmp_path / "gqa.json", truths)
    path = answers(tmp_path, {str(n): "yes" if n % 4 else "no" for n in range(200)})
    first, again = (score("gqa", path, annotations, confidence=True) for _ in range(2))
    low, high = first.intervals["accuracy"]
    assert first == again and first.figures["accuracy"] == 75
    half = 1.96 * 100 * (0.75 * 0.25 / 200) ** 0.5
    assert high - low == pytest.approx(2 * half, rel=0.15) and low < 75 < high


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys, gqa):
    path = answers(tmp_path, {"10": "left", "11": "no", "12": "no"})
    output = tmp_path / "new" / "gqa.json"
    words = ["gqa", "--answers", path, "--annotations"]
    call(lmm_scorers.main, *words, gqa, "--output", output, "--confidence")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "gqa: 3 questions" and printed[1].split()[:2] == ["accuracy", "66.67"]
    written = json.loads(output.read_text())
    assert written["figures"]["accuracy"] == pytest.approx(200 / 3)
    assert written["benchmark"] == "gqa" and len(written["intervals"]["accuracy"]) == 2
    with pytest.raises(SystemExit, match="error: .*absent"):
        call(lmm_scorers.main, *words, "absent")


@pytest.mark.parametrize("module", ["lmm_scorers", "lmm_answers"])
def test_help_imports_nothing_heavy(module):
    done = run("-X", "importtime", f"eval_encoder/{module}.py", "--help")
    assert "usage:" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "av", "openpyxl"}


# answer files


def write(folder, name, given, questions, suffix=".json"):
    output = folder / f"out{suffix}"
    FORMATS[name](read_answers(given), questions, output)
    return output


def test_vqav2_and_vizwiz_hold_normalised_answers_in_the_questions_order(tmp_path):
    rows = [{"question_id": 7, "image": "a.jpg"}, {"question_id": 3, "image": "b.jpg"}]
    questions = lines(tmp_path / "questions.jsonl", rows)
    given = answers(tmp_path, {3: "The Two.", 7: "Unanswerable"})
    assert json.loads(write(tmp_path, "vqav2", given, questions).read_text()) == [
        {"question_id": 7, "answer": "unanswerable"},
        {"question_id": 3, "answer": "2"},
    ]
    assert json.loads(write(tmp_path, "vizwiz", given, questions).read_text()) == [
        {"image": "a.jpg", "answer": "unanswerable"},
        {"image": "b.jpg", "answer": "2"},
    ]


def test_mmvet_keys_have_the_prefix(tmp_path):
    questions = lines(tmp_path / "questions.jsonl", [{"question_id": n} for n in range(2)])
    output = write(tmp_path, "mmvet", answers(tmp_path, {1: "The end.", 0: "So"}), questions)
    assert json.loads(output.read_text()) == {"v1_0": "So", "v1_1": "The end."}


def test_llavabench_keeps_the_rows_in_the_questions_order(tmp_path):
    questions = lines(tmp_path / "questions.jsonl", [{"question_id": n} for n in range(3)])
    given = answers(tmp_path, {2: "c", 0: "a", 1: "b"})
    output = write(tmp_path, "llavabench", given, questions, ".jsonl")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    kept = {row["question_id"]: row for row in map(json.loads, given.read_text().splitlines())}
    assert rows == [kept[0], kept[1], kept[2]]
    lines(given, [{"question_id": n, "prompt": "", "text": ""} for n in range(3)])
    with pytest.raises(ValueError, match=r"answers\.jsonl id 0 has no 'answer_id'"):
        write(tmp_path, "llavabench", given, questions, ".jsonl")


@pytest.fixture
def mmbench(tmp_path):
    """The official table, with a picture longer than csv allows and a quoted question."""
    path = tmp_path / "mmbench.tsv"
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t")
        writer.writerow(["index", "question", "hint", "A", "B", "category", "image"])
        writer.writerow([241, 'Is it "so"?\nOr?', "", "yes", "no", "logic", "x" * 200_000])
        writer.writerow([5, "Which\tone?", "none", "this", "that", "logic", "y"])
    return path


def test_mmbench_table_has_the_columns_and_the_prediction(tmp_path, mmbench):
    output = write(tmp_path, "mmbench", answers(tmp_path, {5: "B", 241: "A"}), mmbench, ".tsv")
    with open(output, newline="") as stream:
        assert list(csv.reader(stream, delimiter="\t")) == [
            ["index", "question", "hint", "A", "B", "category", "prediction"],
            ["241", 'Is it "so"?\nOr?', "", "yes", "no", "logic", "A"],
            ["5", "Which\tone?", "none", "this", "that", "logic", "B"],
        ]


def test_mmbench_workbook_or_the_reason_why_not(tmp_path, mmbench):
    given = answers(tmp_path, {5: "B", 241: "A"})
    if importlib.util.find_spec("openpyxl") is None:
        with pytest.raises(ValueError, match="openpyxl, which is not installed"):
            write(tmp_path, "mmbench", given, mmbench, ".xlsx")
        return
    from openpyxl import load_workbook

    sheet = load_workbook(write(tmp_path, "mmbench", given, mmbench, ".xlsx")).active
    assert [row[-1] for row in sheet.values] == ["prediction", "A", "B"]


def test_mmbench_refuses_other_tables(tmp_path, mmbench):
    given = answers(tmp_path, {5: "B", 241: "A"})
    with pytest.raises(ValueError, match=r"ends with \.tsv or \.xlsx"):
        write(tmp_path, "mmbench", given, mmbench, ".csv")
    mmbench.write_text("index\tquestion\n5\tWhich?\tmore\n")
    with pytest.raises(ValueError, match=r"mmbench\.tsv line 2: not 2 cells"):
        write(tmp_path, "mmbench", given, mmbench, ".tsv")
    mmbench.write_text("number\tquestion\n5\tWhich?\n")
    with pytest.raises(ValueError, match="no column `index`"):
        write(tmp_path, "mmbench", given, mmbench, ".tsv")


@pytest.mark.parametrize("name", FORMATS)
def test_every_question_of_a_server_is_answered_exactly_once(tmp_path, name, mmbench):
    questions, suffix = mmbench, ".tsv"
    if name != "mmbench":
        rows = [{"question_id": n, "image": "a.jpg"} for n in (241, 5)]
        questions, suffix = lines(tmp_path / "questions.jsonl", rows), ".json"
    for given, message in (
        ([(241, "A")], r"answers\.jsonl .*1 missing .*'5'"),
        ([(241, "A"), (5, "B"), (5, "A")], "1 doubled .*'5'"),
        ([(241, "A"), (5, "B"), (6, "A")], "1 foreign .*'6'"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path, name, answers(tmp_path, given), questions, suffix)
        assert not (tmp_path / f"out{suffix}").exists()


def test_the_command_writes_a_file_or_says_why_not(tmp_path, capsys):
    questions = lines(tmp_path / "questions.jsonl", [{"question_id": 1}, {"question_id": 2}])
    given = answers(tmp_path, {2: "b", 1: "a"})
    output = tmp_path / "new" / "mmvet.json"
    words = ["mmvet", "--answers", str(given), "--questions", str(questions)]
    call(lmm_answers.main, *words, "--output", output)
    assert json.loads(output.read_text()) == {"v1_1": "a", "v1_2": "b"}
    assert capsys.readouterr().out == f"2 answers in {output}\n"
    lines(questions, [{"question_id": 1}] * 2)
    with pytest.raises(SystemExit, match="error: .*names question_id 1 twice"):
        call(lmm_answers.main, *words, "--output", output)
