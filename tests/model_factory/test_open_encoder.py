"""One place decides what a path is: every kind of it, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from model_factory.backbone import save_backbone
from model_factory.configuration import LlavaViTPackingConfig
from model_factory.export_folder import save_encoder_folder
from model_factory.open_encoder import Kind, locate_encoder, open_encoder
from model_factory.packing import CLIP_MEAN, CLIP_STD, gain_and_offset
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

SHAPE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)


@pytest.fixture
def run(tmp_path):
    """A run's folder: its configuration, a checkpoint's folder, and both exports."""
    model = LlavaViTPackingModel(LlavaViTPackingConfig(**SHAPE))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"optimizer": {}}')
    save_encoder_folder(model, tmp_path / "run" / "hf")
    save_backbone(model, tmp_path / "run" / "backbone.pt")
    return tmp_path / "run"


def test_every_kind_of_path_is_told_apart(run, tmp_path):
    def kind_and_path(name):
        location = locate_encoder(name)
        return location.kind, location.path

    hf = run / "hf"
    assert locate_encoder(None).kind is locate_encoder("random").kind is Kind.RANDOM
    for name in (run, hf, hf / "model.safetensors"):
        assert kind_and_path(name) == (Kind.FOLDER, hf)
    assert kind_and_path(run / "backbone.pt") == (Kind.WEIGHTS, run / "backbone.pt")
    hf.rename(tmp_path / "tower")
    assert kind_and_path(run) == (Kind.RUN, run)
    assert kind_and_path(tmp_path) == (Kind.FOLDER, tmp_path / "tower")
    for name in ("NULL", tmp_path / "absent", run / "checkpoints"):
        assert locate_encoder(name).kind is Kind.NOTHING
    location = locate_encoder("dinov2:some/folder")
    assert (location.kind, location.family) == (Kind.IMAGE, "dinov2")


def test_all_ways_to_an_encoder_load_the_same_weights(run):
    names = (run, run / "hf", run / "hf" / "model.safetensors", run / "backbone.pt")
    states = [open_encoder(locate_encoder(name)).state_dict() for name in names]
    for state in states[1:]:
        assert all(torch.equal(tensor, state[name]) for name, tensor in states[0].items())


def test_what_holds_no_encoder_is_refused_with_its_kind(run, tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (run / "hf").rename(tmp_path / "moved")
    for name, message in (
        (tmp_path / "vit", "is a vit model, and no encoder of ours"),
        (run, "python -m training.export"),
        ("clip:folder", "clip:folder is no encoder of ours"),
        ("random", "random weights need the name of a model"),
        (tmp_path / "absent", "is no Hugging Face folder"),
    ):
        with pytest.raises(ValueError, match=message):
            open_encoder(locate_encoder(name))
    read = open_encoder(locate_encoder(run), read_run=lambda path: path)
    assert read == run


def test_locating_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from model_factory.open_encoder import locate_encoder\n"
        "print(locate_encoder('clip:x').family)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "clip\n", done.stderr


def test_gain_and_offset_normalise_bytes():
    gain, offset = gain_and_offset()
    pixels = torch.tensor([0.0, 127.0, 255.0])[:, None]
    wanted = (pixels / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(pixels * gain + offset, wanted)
