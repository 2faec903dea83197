"""The stages of every recipe on tiny parts: what is written, resumed, equal, and refused."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import PATIENCE_S, ROOT
from forked import forked_ranks, path_with_python
from lmm_parts import write_parts
from PIL import Image

from eval_encoder.lmm.config import RECIPES, parse_arguments
from eval_encoder.lmm.data.conversation import Turn, Visual, stage_samples
from eval_encoder.lmm.data.dataset import Collator
from eval_encoder.lmm.data.features import FeatureStore
from eval_encoder.lmm.generate import Decoding, Request, open_speaker
from eval_encoder.lmm.model.open import compose, open_lmm
from eval_encoder.lmm.questions import main as answer
from eval_encoder.lmm.stage import build_dataset, build_reader, training_arguments
from eval_encoder.lmm.trainer import LmmTrainer
from eval_encoder.lmm_probe import main as probe

EPOCHS = 20
SMALL = ["--gradient_checkpointing", "False", "--disable_tqdm", "True", "--save_strategy", "no",
         "--per_device_train_batch_size", "4", "--global_batch_size", "8", "--num_frames", "2",
         "--learning_rate", "3e-3"]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder)
    return folder


def flags(parts, recipe, stage, output, *more, tower="tower", data=None, whole=None):
    """`whole`: a model of an earlier stage instead of parts."""
    data = data or ("align" if stage == 1 and recipe != "crossget" else "tune")
    given = ["--recipe", recipe, "--stage", stage, "--output_dir", output, *SMALL]
    if whole is None:
        given += ["--model_name_or_path", parts / "language_model", "--vision_tower", parts / tower]
        given += ["--mm_vision_select_layer", "-1"]
    else:
        given += ["--model_name_or_path", whole]
    given += ["--image_folder", parts / "media", "--data_path", parts / f"{data}.json", *more]
    return [str(part) for part in given]


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def llava15(parts):
    """Folders of both stages."""
    first, second = parts / "llava15_1", parts / "llava15_2"
    assert probe(flags(parts, "llava15", 1, first, "--num_train_epochs", "2")) == 0
    projector = ("--pretrain_mm_mlp_adapter", first / "mm_projector.bin")
    more = (*projector, "--num_train_epochs", str(EPOCHS))
    assert probe(flags(parts, "llava15", 2, second, *more)) == 0
    return first, second


def test_both_stages_run_and_write_what_the_next_one_needs(parts, llava15):
    first, second = llava15
    written = {path.name for path in first.iterdir()}
    assert {"mm_projector.bin", "config.json", "parts.json", "record.json", "metrics.jsonl", "runs",
            "preprocessor_config.json", "tokenizer.json", "SHA256SUMS"} <= written  # fmt: skip
    assert not list(first.glob("*.safetensors")) and not list(first.rglob("training_args.bin"))
    assert (second / "model.safetensors").is_file()
    assert losses(second)[-1] < 0.3 * losses(second)[0]
    aligned = open_lmm(first)  # language model and tower come from their own folders
    tuned = open_lmm(second)
    tower, again = aligned.model.tower.state_dict(), tuned.model.tower.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in tower.items())
    assert not torch.equal(aligned.model.lm_head.weight, tuned.model.lm_head.weight)
    record = json.loads((second / "record.json").read_text())
    assert record["tokens_per_picture"] == 16 and record["arguments"]["version"] == "v1"


def test_the_schedule_warms_up_and_ends_at_zero(llava15):
    lines = [json.loads(li) for li in (llava15[1] / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert len(rates) == 4 * EPOCHS  # 26 samples in batches of 8, the last one smaller
    top = rates.index(max(rates))
    assert 1 <= top <= 4 and rates[0] < rates[top]
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))
    assert rates[-1] < 0.02 * max(rates)


def test_the_trained_model_answers_and_the_answer_does_not_depend_on_its_batch(parts, llava15):
    rows = [{"question_id": n, "image": f"{n}.png", "text": "What colour is it?"} for n in range(9)]
    rows += [{"question_id": "text", "text": "What is one and one?"}]
    rows += [{"question_id": "clip", "video": "clip.mp4", "text": "<video>\nWhere does it move?"}]
    questions = parts / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", llava15[1], "--questions", questions, "--image_folder", parts / "media"]
    given += ["--max_new_tokens", "8"]
    files = {}
    for size in (1, 11):
        files[size] = parts / f"answers_{size}.jsonl"
        assert (
            answer([str(p) for p in [*given, "--answers", files[size], "--batch_size", size]]) == 0
        )
    assert files[1].read_bytes() == files[11].read_bytes()
    said = [json.loads(line)["text"] for line in files[1].read_text().splitlines()]
    assert said[9] == "two" and said[10] == "left"
    assert sum(said[n] == ("red", "green", "blue")[n % 3] for n in range(9)) >= 8
    cut = parts / "cut.jsonl"
    cut.write_bytes(files[1].read_bytes()[:700])
    assert answer([str(p) for p in [*given, "--answers", cut]]) == 0
    assert cut.read_bytes() == files[1].read_bytes(), "a killed run goes on"
    chunks = []
    for number in range(3):
        chunks.append(parts / f"chunk_{number}.jsonl")
        part = [*given, "--answers", chunks[-1], "--num_chunks", 3, "--chunk_idx", number]
        assert answer([str(p) for p in part]) == 0
    assert b"".join(c.read_bytes() for c in chunks) == files[1].read_bytes()


def test_a_killed_stage_resumes_to_the_same_bits(parts, tmp_path):
    for recipe, stage in (("llava15", 1), ("llava15", 2)):
        more = ("--save_strategy", "steps", "--save_steps", "3", "--max_steps", "8")
        whole, cut = tmp_path / f"whole_{stage}", tmp_path / f"cut_{stage}"
        assert probe(flags(parts, recipe, stage, whole, *more)) == 0
        shutil.copytree(whole, cut)
        for path in cut.iterdir():  # as a kill after step 7 would have left it
            if path.name in ("model.safetensors", "mm_projector.bin", "checkpoint-8", "runs"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if stage == 1:  # the checkpoint of step 3 is then the newest that is whole
            state = cut / "checkpoint-6" / "optimizer.pt"
            state.write_bytes(state.read_bytes()[:-1] + b"x")
        assert probe(flags(parts, recipe, stage, cut, *more)) == 0
        assert losses(cut) == losses(whole)
        name = "mm_projector.bin" if stage == 1 else "model.safetensors"
        if stage == 1:
            read = [torch.load(f / name, weights_only=True) for f in (whole, cut)]
            assert all(torch.equal(t, read[1][n]) for n, t in read[0].items())
        else:
            assert (whole / name).read_bytes() == (cut / name).read_bytes()


@pytest.mark.parametrize("tower", ["tower", "clip"])
@pytest.mark.parametrize("recipe", ["llava15", "vitsplit"])
def test_stored_features_train_as_the_tower_itself(parts, tmp_path, recipe, tower):
    more = ("--max_steps", "6")
    assert probe(flags(parts, recipe, 1, tmp_path / "live", *more, tower=tower)) == 0
    stored = (*more, "--feature_cache", tmp_path / "features")
    assert probe(flags(parts, recipe, 1, tmp_path / "stored", *stored, tower=tower)) == 0
    live, found = (losses(tmp_path / name) for name in ("live", "stored"))
    np.testing.assert_allclose(found, live, rtol=2e-3)
    count = len(list((tmp_path / "features").rglob("*.npy")))
    assert count == 24
    assert probe(flags(parts, recipe, 1, tmp_path / "again", *stored, tower=tower)) == 0
    assert losses(tmp_path / "again") == found


@pytest.mark.parametrize("recipe", ["llava15", "vitsplit"])
def test_stored_features_are_of_what_was_read_and_damaged_ones_are_made_again(
    parts, tmp_path, recipe, caplog
):
    arguments, _ = parse_arguments(flags(parts, recipe, 1, tmp_path))
    lmm = compose(arguments)
    lmm.model.train_parts()

    def filled():
        reader = build_reader(arguments, lmm)
        store = FeatureStore(tmp_path / "features", lmm.model, reader)
        samples = stage_samples(arguments)
        dataset = build_dataset(arguments, samples=samples, lmm=lmm, reader=reader, store=store)
        return dataset, store, store.fill(dataset.visuals)

    dataset, store, count = filled()
    assert count == 24 and filled()[2] == 0
    entries = sorted((tmp_path / "features").rglob("??/*.npy"))
    written = [path.read_bytes() for path in entries]
    for path, data in zip(entries, written, strict=True):  # one bit each, all over the file
        place = 8 * len(data) * entries.index(path) // len(entries)
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
    lmm.model.train()
    caplog.clear()
    for index in range(len(dataset)):
        dataset[index]
    assert [path.read_bytes() for path in entries] == written, "made again to the same bits"
    for path in entries:
        assert f"{path} are made again: it changed" in caplog.text
    lmm.model.eval()
    lmm.model.bfloat16()
    batch = Collator(lmm.tokenizer.pad_token_id, store=store)([dataset[0], dataset[1]])
    assert lmm.model(**batch).loss.isfinite()
    lmm.model.float()
    lmm.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert filled()[2] == 24
    (parts / "media" / "0.png").touch()
    assert filled()[2] == 1
    lmm.model.train_parts(tower_from=None)
    next(lmm.model.tower.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="frozen tower"):
        filled()


def test_vitsplit_crossget_and_convllava_run_all_their_stages(parts, llava15, tmp_path):
    def stage(recipe, number, *more, **where):
        output = tmp_path / f"{recipe}_{number}"
        given = flags(parts, recipe, number, output, "--max_steps", "4", *more, **where)
        assert probe(given) == 0
        return output

    first = stage("vitsplit", 1)
    second = stage("vitsplit", 2, "--pretrain_mm_mlp_adapter", first / "mm_projector.bin")
    assert json.loads((second / "config.json").read_text())["projector_type"] == "vitsplit"
    reduced = ("--mm_reduction_r", "4", "2", "0", "--data_fraction", "1")
    crossed = stage("crossget", 1, *reduced, whole=llava15[1])
    model = open_lmm(crossed).model
    assert model.tokens_for((1, 4, 4), 16) == 17 - 3 * 2
    for learned in (model.tower.cross_tokens.weight, model.model.text_cross_tokens.weight):
        assert learned.any() and learned.isfinite().all() and learned.abs().max() < 0.1
    five = ("--vision_add_five_stage", "1", "--vision_five_stage_width", "128")
    size = ("--mm_vision_resolution", "64", "--video_size", "64")
    one = stage("convllava", 1, *five, *size, tower="convnext")
    two = stage("convllava", 2, *size, whole=one, data="align")
    three = stage("convllava", 3, *size, whole=two)
    towers = [open_lmm(folder).model.tower.state_dict() for folder in (one, two, three)]

    def stages(a, b):
        return {n.split("stages.")[1][0] for n, t in a.items() if not torch.equal(t, b[n])}

    assert stages(towers[0], towers[1]) == {"2", "3", "4"}
    assert stages(towers[1], towers[2]) == set()
    assert "lm_head.weight" in dict(open_lmm(one).model.named_parameters())


def test_lora_and_the_blind_baseline_run(parts, llava15, tmp_path):
    projector = ("--pretrain_mm_mlp_adapter", llava15[0] / "mm_projector.bin", "--max_steps", "3")
    lora = ("--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0")
    assert probe(flags(parts, "llava15", 2, tmp_path / "lora", *projector, *lora)) == 0
    base, tuned = open_lmm(llava15[0]).model, open_lmm(tmp_path / "lora").model
    assert torch.equal(base.lm_head.weight, tuned.lm_head.weight)
    added = {n: p for n, p in tuned.named_parameters() if "lora_B" in n}
    assert added and all(p.any() for p in added.values())
    assert probe(flags(parts, "llava15", 2, tmp_path / "blind", "--blind", "--max_steps", "3")) == 0
    assert losses(tmp_path / "blind")


def test_generation_with_and_without_a_cache_says_the_same(parts, llava15, tmp_path):
    output = tmp_path / "crossget"
    more = ("--mm_reduction_r", "2", "--data_fraction", "1", "--num_train_epochs", "2")
    assert probe(flags(parts, "crossget", 1, output, *more, whole=llava15[1])) == 0
    requests = [
        Request((Turn("human", "<image>\nWhat colour is it?"),), (Visual("image", "1.png"),)),
        Request((Turn("human", "What is one and one?"),)),
    ]
    said, logits = [], []
    for cache in (True, False):
        decoding = Decoding(max_new_tokens=6, use_cache=cache)
        speaker = open_speaker(output, parts / "media", decoding=decoding)
        model, ids = speaker.lmm.model, torch.tensor([[1, 50, 60]])
        torch.manual_seed(0)
        for scale in (0, 1):  # large enough to be heard
            model.model.text_cross_tokens.weight.data.normal_().mul_(scale)
            with torch.no_grad():
                logits.append(model(input_ids=ids).logits[0, -1])
        said.append(speaker.answer(requests))
    assert said[0] == said[1] and any(said[0])
    assert (logits[0] - logits[1]).abs().max() > 0.01


@pytest.mark.e2e
@pytest.mark.dist
@pytest.mark.parametrize(
    ("recipe", "stage", "steps", "shardings"),
    [("vitsplit", 2, 8, ("zero2", "zero3")), ("crossget", 1, 4, ("zero3",))],
)
def test_deepspeed_and_ddp_give_the_same_losses(
    parts, llava15, tmp_path, recipe, stage, steps, shardings
):
    """With crossget every process sees one sample at a time, so that text meets pictures."""
    more, whole = ["--max_steps", steps, "--learning_rate", "1e-3"], None
    if recipe == "crossget":
        more += ["--mm_reduction_r", 2, "--data_fraction", 1, "--per_device_train_batch_size", 1]
        more += ["--alignment_weight", 0.1, "--group_by_modality_length", False]
        whole = llava15[1]
    runs = {name: tmp_path / name for name in ("ddp", *shardings)}
    for name, output in runs.items():
        given = flags(parts, recipe, stage, output, *more, whole=whole)
        if name != "ddp":
            given += ["--deepspeed", str(ROOT / "shells" / f"{name}.json")]
        script = str(ROOT / "eval_encoder" / "lmm_probe.py")
        forked_ranks(2, script, *given)
    plain, wanted = losses(runs["ddp"]), open_lmm(runs["ddp"]).model.state_dict()
    assert len(plain) == steps
    count = json.loads((runs["ddp"] / "record.json").read_text())["parameters"]
    for name in shardings:
        np.testing.assert_allclose(losses(runs[name]), plain, atol=1e-4)
        tensors = open_lmm(runs[name]).model.state_dict()
        for key, tensor in wanted.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=5e-4)
        assert json.loads((runs[name] / "record.json").read_text())["parameters"] == count > 0


def test_recomputed_blocks_give_the_same_losses(parts, tmp_path):
    found = {}
    for recompute in ("True", "False"):
        output = tmp_path / recompute
        more = ("--max_steps", "4", "--gradient_checkpointing", recompute)
        assert probe(flags(parts, "vitsplit", 2, output, *more)) == 0
        found[recompute] = losses(output)
    np.testing.assert_allclose(found["True"], found["False"], rtol=1e-5)


def test_projector_and_tower_have_learning_rates_of_their_own(parts, llava15, tmp_path, caplog):
    size = ("--mm_vision_resolution", "64", "--video_size", "64", "--max_steps", "1")
    five = ("--vision_add_five_stage", "1", "--vision_five_stage_width", "128")
    given = flags(parts, "convllava", 1, tmp_path / "one", *size, *five, tower="convnext")
    caplog.set_level("INFO")
    assert probe(given) == 0
    assert "batch 8 = 1 ranks x 4 x 2 accumulated" in caplog.text
    more = ("--mm_projector_lr", "0.5", "--vision_tower_lr", "0")
    arguments, others = parse_arguments([*given, *more])
    args = training_arguments(arguments, others)
    lmm = open_lmm(tmp_path / "one")
    lmm.model.train_parts(language_model=True, tower_from=5)
    reader = build_reader(arguments, lmm)
    samples = stage_samples(arguments)
    dataset = build_dataset(arguments, samples=samples, lmm=lmm, reader=reader, store=None)
    trainer = LmmTrainer(lmm, arguments, args, dataset)
    rates = {p: g["lr"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    for name, parameter in lmm.model.named_parameters():
        if parameter.requires_grad:
            own = 0.5 if "projector" in name else 0.0 if "vision_tower" in name else 3e-3
            assert rates[parameter] == own, name


@pytest.mark.e2e
def test_the_demo_trains_every_recipe_and_prints_a_table(parts, tmp_path):
    """With the encoder of the other tests; what it learns in two steps is not looked at."""
    small = {"STEPS": "2", "TRAIN": "20", "VAL": "192", "UNIVIT_INSTALLED": "1"}
    small["PATH"] = path_with_python(tmp_path / "bin")
    command = ["bash", str(ROOT / "shells" / "lmm_probe.sh"), "--demo"]
    command += ["--tower", str(parts / "tower"), "--output", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S,
                          env={**os.environ, **small})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split(" | ") for line in (tmp_path / "demo" / "table.md").read_text().splitlines()]
    assert [row[0].strip("| ") for row in rows[2:]] == [
        "blind", "llava15", "vitsplit", "crossget", "convllava"
    ]  # fmt: skip
    tokens = {row[0].strip("| "): row[1] for row in rows[2:]}
    assert tokens["blind"] == "0" and int(tokens["crossget"]) < int(tokens["llava15"])
    assert str(tmp_path / "demo" / "table.md") in done.stdout


def test_recipes_are_the_published_ones(parts):
    def arguments(recipe, stage):
        needed = ["--model_name_or_path", "x", "--data_path", "y"]
        return parse_arguments(["--recipe", recipe, "--stage", str(stage), *needed])

    ours, others = arguments("llava15", 1)
    assert ours.tune_mm_mlp_adapter and ours.version == "plain" and ours.global_batch_size == 256
    assert others[others.index("--learning_rate") + 1] == "0.001"
    assert others[others.index("--warmup_steps") + 1] == "0.03"
    ours, others = arguments("llava15", 2)
    assert not ours.tune_mm_mlp_adapter and ours.image_aspect_ratio == "pad"
    assert others[others.index("--learning_rate") + 1] == "2e-05" and ours.group_by_modality_length
    assert arguments("vitsplit", 2)[0].global_batch_size == 256
    crossget = arguments("crossget", 1)[0]
    assert (crossget.mm_reduction_r, crossget.alignment_weight) == ([13], 1e-3)
    assert (crossget.data_fraction, crossget.global_batch_size) == (0.1, 128)
    rates = {("vitsplit", 1): "0.0005", ("vitsplit", 2): "2e-05", ("crossget", 1): "2e-05"}
    rates |= {("convllava", 1): "0.0003", ("convllava", 2): "2e-05", ("convllava", 3): "2e-05"}
    for (recipe, stage), rate in rates.items():
        others = arguments(recipe, stage)[1]
        assert others[others.index("--learning_rate") + 1] == rate
    five = arguments("convllava", 1)[0]
    assert (five.vision_add_five_stage, five.vision_five_stage_width) == (6, 3072)
    assert five.mm_vision_resolution == 768 and five.version == "v1"
    assert [arguments("convllava", n)[0].tune_vit_from_layer for n in (1, 2, 3)] == [5, 3, None]
    assert set(RECIPES) == {"llava15", "vitsplit", "crossget", "convllava"}
    for wrong, text in ((("--recipe", "x"), "choose one of"), (("--bits", "3"), "4, 8 or 16"),
                        (("--mm_patch_merge_type", "spatial"), "flat")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            parse_arguments([*wrong, "--model_name_or_path", "x", "--data_path", "y"])


def test_mistakes_end_with_one_line_that_names_them(parts, llava15, tmp_path, capsys):
    def says(*more, **where):
        assert probe(flags(parts, "llava15", 2, tmp_path / "x", *more, **where)) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "flags of neither" in says("--no_such_flag", "3")
    assert "no multiple of" in says("--global_batch_size", "6")
    assert "does not exist" in says("--model_name_or_path", str(tmp_path))
    assert "no.bin does" in says("--pretrain_mm_mlp_adapter", str(tmp_path / "no.bin"))
    whole = ("--model_name_or_path", str(llava15[1]))
    assert "is a whole model" in says(*whole, "--mm_projector_type", "linear")
    assert "has no stages" in says("--tune_vit_from_layer", "2")
    assert "nothing learns" in says("--freeze_backbone", "True", "--freeze_mm_mlp_adapter", "True")
    zero3 = str(ROOT / "shells" / "zero3.json")
    assert "does not go with ZeRO-3" in says("--feature_cache", "f", "--deepspeed", zero3)
    assert "the loss of step" in says("--learning_rate", "1e30", "--max_grad_norm", "1e30")
    assert "21 of 21 pictures and clips" in says("--image_folder", str(tmp_path))
    shutil.copytree(parts / "media", tmp_path / "media")
    (tmp_path / "media" / "3.png").write_bytes(b"no picture")
    said = says("--image_folder", str(tmp_path / "media"))
    assert "3.png" in said and "sample" in said
    Image.new("RGB", (8, 8)).save(tmp_path / "media" / "3.png")
    (tmp_path / "media" / "4.png").unlink()
    assert "4.png" in says("--image_folder", str(tmp_path / "media"))
