"""Folders of multimodal models and of their parts: bound by checksums, nothing of them executed."""

import random
import shutil

import pytest
import torch
from hostile_folders import add_code, change_json, flip, write_pickle
from lmm_parts import language_model, lmm_of, native, ours, tokenizer

from eval_encoder.lmm.config import parse_arguments
from eval_encoder.lmm.demo.tiny import write_language_model
from eval_encoder.lmm.model.open import (
    PARTS_FILE,
    compose,
    open_lmm,
    open_tokenizer,
    open_tower,
    read_language_model,
)
from eval_encoder.lmm.model.projector_file import load_projector, save_projector
from eval_encoder.lmm.trainer import newest_whole
from model_factory.export_folder import image_processor_json
from model_factory.files import CHECKSUMS_NAME, write_checksums
from model_factory.model_folder import seal_folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """whole/, as a later stage leaves it, and stage_1/ with its two parts."""
    place = tmp_path_factory.mktemp("lmm")
    lmm = lmm_of(ours(2), layers=2)
    lmm.model.save_pretrained(place / "whole")
    lmm.save_processors(place / "whole")
    seal_folder(place / "whole")
    language_model(2).save_pretrained(place / "speaker")
    lmm.model.tower.model.save_pretrained(place / "tower")
    lmm.save_processors(place / "tower")
    save_projector(lmm.model, place / "stage_1")
    lmm.save_processors(place / "stage_1")
    parts = {"model_name_or_path": str(place / "speaker"), "vision_tower": str(place / "tower")}
    change_json(place / "stage_1" / PARTS_FILE, **parts)
    seal_folder(place / "stage_1", also=[PARTS_FILE])
    return place


@pytest.fixture
def speaker(tmp_path):
    """A language model's folder without checksums."""
    folder = tmp_path / "speaker"
    language_model(2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["whole", "stage_1"])
def test_no_flip_over_a_model_of_the_probe_is_loaded(written, tmp_path, kind):
    open_lmm(written / kind)
    folder, draw = shutil.copytree(written / kind, tmp_path / kind), random.Random(0)
    listed = [line.split()[-1] for line in (folder / CHECKSUMS_NAME).read_text().splitlines()]
    weights = "model.safetensors" if kind == "whole" else "mm_projector.bin"
    assert {weights, "config.json", "tokenizer.json", "preprocessor_config.json"} <= set(listed)
    for name in listed * 2 + [weights] * 20:
        before = flip(folder / name, draw.randrange(1 << 30))
        with pytest.raises(ValueError, match=f"{name} changed since it was written"):
            open_lmm(folder)
        (folder / name).write_bytes(before)
    (folder / listed[-1]).unlink()
    with pytest.raises(ValueError, match=f"{listed[-1]} is listed there and absent"):
        open_lmm(folder)


def test_where_the_parts_of_a_projector_are_is_bound(written, tmp_path):
    folder = shutil.copytree(written / "stage_1", tmp_path / "stage_1")
    change_json(folder / PARTS_FILE, vision_tower="/elsewhere")
    with pytest.raises(ValueError, match="parts.json changed"):
        open_lmm(folder)


def test_a_projector_is_compared_with_the_list_beside_it(written, tmp_path):
    folder = shutil.copytree(written / "stage_1", tmp_path / "stage_1")
    model = open_lmm(folder).model
    flip(folder / "mm_projector.bin", 1 << 14)
    with pytest.raises(ValueError, match="mm_projector.bin changed"):
        load_projector(model, folder / "mm_projector.bin")


def test_code_in_a_projector_is_not_run(written, tmp_path):
    path, mark = tmp_path / "mm_projector.bin", tmp_path / "mark"
    write_pickle(path, mark, {})
    with pytest.raises(ValueError, match=r"mm_projector.bin is no readable file of tensors"):
        load_projector(lmm_of(ours(2), layers=2).model, path)
    assert not mark.exists()


@pytest.mark.parametrize("described", ["config.json", "tokenizer_config.json"])
def test_a_language_model_or_tokenizer_with_code_is_refused(speaker, tmp_path, described):
    add_code(speaker, described, tmp_path / "mark")
    flags = ["--model_name_or_path", str(speaker), "--vision_tower", "none", "--data_path", "none"]
    arguments, _ = parse_arguments(["--recipe", "llava15", *flags, "--output_dir", "none"])
    for read in (open_tokenizer, lambda _: compose(arguments)):
        with pytest.raises(ValueError, match=f"{described} names code of its own"):
            read(speaker)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["clip", "ours"])
def test_a_tower_whose_processor_is_code_is_refused(tmp_path, kind):
    tower = native("clip") if kind == "clip" else ours(2)
    tower.save_pretrained(tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").write_text(image_processor_json(32))
    open_tower(tmp_path / "tower")
    add_code(tmp_path / "tower", "preprocessor_config.json", tmp_path / "mark")
    with pytest.raises(ValueError, match="preprocessor_config.json names code"):
        open_tower(tmp_path / "tower")
    assert not (tmp_path / "mark").exists()


def test_a_language_model_in_bin_files_is_read_as_tensors_and_never_executed(speaker, tmp_path):
    wanted = read_language_model(speaker, torch.float32).state_dict()
    (speaker / "model.safetensors").unlink()
    torch.save(wanted, speaker / "pytorch_model.bin")
    found = read_language_model(speaker, torch.float32).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    write_pickle(speaker / "pytorch_model.bin", tmp_path / "mark", wanted)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is no readable .*nothing but tensors"):
        read_language_model(speaker, torch.float32)
    (speaker / "pytorch_model.bin").rename(speaker / "shard.bin")
    index = speaker / "pytorch_model.bin.index.json"
    change_json(index, metadata={}, weight_map=dict.fromkeys(wanted, "shard.bin"))
    with pytest.raises(ValueError, match=r"shard.bin is no readable .*nothing but tensors"):
        read_language_model(speaker, torch.float32)
    change_json(index, weight_map=dict.fromkeys(wanted, "../shard.bin"))
    with pytest.raises(ValueError, match=r"index.json names '../shard.bin' as a shard"):
        read_language_model(speaker, torch.float32)
    assert not (tmp_path / "mark").exists()


def test_the_tiny_language_model_is_bound_too(tmp_path):
    write_language_model(["a b c"] * 3, tmp_path, layers=1, width=32, vocabulary=300)
    read_language_model(tmp_path, torch.float32)
    flip(tmp_path / "model.safetensors", 1 << 16)
    with pytest.raises(ValueError, match="model.safetensors changed"):
        read_language_model(tmp_path, torch.float32)


def test_a_stage_passes_over_checkpoints_that_are_damaged_or_cut(tmp_path, caplog):
    for step in (3, 6, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"state" * 9)
    for step in (3, 6, 9):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    for step in (6, 9):
        write_checksums(tmp_path / f"checkpoint-{step}")
    flip(tmp_path / "checkpoint-9" / "optimizer.pt", 7)
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-6")
    assert "checkpoint-12: its save did not come to an end" in caplog.text
    assert "optimizer.pt changed since it was written" in caplog.text
    shutil.rmtree(tmp_path / "checkpoint-6")  # leaves one of an older version, without checksums
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-3")
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert newest_whole(tmp_path) is None
