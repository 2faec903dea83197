"""What the encoder is shown: the published frames, drawn versions that can be drawn again, crops,
and the encoder that was named.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import write_video
from forked import forked

from data_pipeline.codec.patches import SelectionConfig
from data_pipeline.codec.timeline import segment_frames
from data_pipeline.errors import RejectedInput
from data_pipeline.loading.packing import pack_views
from data_pipeline.loading.views import still_view
from data_pipeline.shards.sample_builder import SampleConfig, build_sample
from data_pipeline.shards.schema import decode_array
from eval_encoder.clip_reader import recolour
from eval_encoder.clip_views import (
    Look,
    chosen_decoder,
    chosen_gop,
    positions_within,
    view_of_file,
)
from eval_encoder.feature_cache import file_identity
from eval_encoder.probe.benchmarks import LabelledList
from eval_encoder.probe.clips import RawClips
from eval_encoder.probe.config import build_config, build_parser
from eval_encoder.probe.encoders import build_encoder, packed_model, time_code
from model_factory.backbone import save_backbone
from model_factory.export_folder import save_encoder_folder
from model_factory.files import CHECKSUMS_NAME
from model_factory.packing import CLIP_MEAN, CLIP_STD
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingConfig, LlavaViTPackingModel

DECODERS = ["av", "decord"]


def config_of(*flags):
    return build_config(build_parser().parse_args([str(flag) for flag in flags])).input


def frame_numbers(total, look, config):
    return segment_frames(total, positions_within(look, config))


def needs(decoder):
    if decoder == "decord":
        pytest.importorskip("decord")


def pictures(view, size):
    """uint8 [T, H, W, 3] of a frame view."""
    rows = torch.empty(len(view), view.patch_dim, dtype=torch.uint8)
    view.write(rows)
    frames, height, width = view.grid
    side = size // height
    tiles = rows.view(frames, height, width, 3, side, side)
    return tiles.permute(0, 1, 4, 2, 5, 3).reshape(frames, size, size, 3).numpy()


def batch_of(*views):
    count = len(views)
    facts = (torch.arange(count), torch.zeros(count, 0, dtype=torch.int64), torch.ones(count))
    return pack_views(list(views), *facts)


def test_frames_are_the_published_ones():
    config = config_of("--num_frames", 8)
    assert frame_numbers(64, Look(0), config).tolist() == [3, 11, 19, 27, 35, 43, 51, 59]
    assert frame_numbers(3, Look(0), config).max() <= 2
    crops = [frame_numbers(64, Look(0, within=w), config) for w in (1 / 6, 0.5, 5 / 6)]
    assert all((a < b).all() for a, b in zip(crops, crops[1:], strict=False))


def test_drawn_frames_stay_in_their_segments_and_are_drawn_alike_again():
    config, edges = config_of("--num_frames", 4), np.arange(5) * 99 / 4
    drawn = [frame_numbers(100, Look(7, version), config) for version in range(1, 200)]
    assert all((edges[:4] - 1 <= d).all() and (d <= edges[1:]).all() for d in drawn)
    assert len({tuple(d) for d in drawn}) > 150
    assert np.array_equal(drawn[4], frame_numbers(100, Look(7, 5), config))
    still = config_of("--num_frames", 4, "--augment", "hue")
    assert np.array_equal(
        frame_numbers(100, Look(7, 5), still), frame_numbers(100, Look(7), config)
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_frames_read_are_the_frames_asked_for(tmp_path, decoder):
    """Frame i of the clip is of brightness 5 i + 20."""
    needs(decoder)
    frames = [np.full((64, 96, 3), 5 * i + 20, np.uint8) for i in range(40)]
    write_video(tmp_path / "clip.mp4", frames, bf="2", crf="8")
    for look in (Look(0), Look(0, 3), Look(0, within=0.9)):
        plain = config_of("--num_frames", 5, "--decoder", decoder, "--augment", "jitter")
        view = view_of_file(tmp_path / "clip.mp4", look, plain, 32, 16)
        shown = (pictures(view, 32).mean(axis=(1, 2, 3)) - 20) / 5
        assert np.abs(shown - frame_numbers(40, look, plain)).max() < 0.6


@pytest.mark.parametrize("decoder", DECODERS)
def test_raw_frames_lie_on_the_time_base(clips, decoder):
    needs(decoder)
    config = config_of("--num_frames", 4, "--decoder", decoder)
    view = view_of_file(clips / "clips" / "train_00000.mp4", Look(0), config, 112, 16)
    assert view.grid == (4, 7, 7) and len(view) == 196 and view.patch_dim == 768
    times = view.positions[::49, 0].tolist()
    assert all(abs(time - want) <= 1 for time, want in zip(times, (8, 24, 40, 56), strict=True))


def test_small_frames_show_the_same_moments_in_fewer_tokens(clips):
    """Frames of 112 px as frames of 32 px: four tokens each, means of what the large ones show."""
    path = clips / "clips" / "train_00000.mp4"
    large, small = (
        view_of_file(path, Look(0), config_of("--num_frames", 24, *flags), 112, 16)
        for flags in ((), ("--frame_scale", 2 / 7))
    )
    assert small.grid == (24, 2, 2) and len(small) == 96
    assert small.positions[::4, 0].tolist() == large.positions[::49, 0].tolist()
    shown = pictures(small, 32).mean(axis=(1, 2))
    assert np.abs(shown - pictures(large, 112).mean(axis=(1, 2))).max() < 3
    for flags, message in (
        (("--frame_scale", 1.5), "at most 1"),
        (("--frame_scale", 0.5, "--model_family", "clip"), "clip sees frames at its own size"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(*flags)


def test_a_turned_video_is_shown_upright_by_any_reader(shared):
    needs("decord")
    path = shared / "videos" / "rotation_180_3frames.mov"
    shown = {
        decoder: pictures(view_of_file(path, Look(0), config_of("--decoder", decoder), 64, 16), 64)
        for decoder in DECODERS
    }
    assert np.array_equal(shown["av"], shown["decord"])


def test_crops_lie_along_the_long_side(tmp_path):
    """Columns grow brighter from left to right, so a square's mean tells where it lies."""
    ramp = np.linspace(0, 250, 240).astype(np.uint8)
    frame = np.repeat(np.tile(ramp, (64, 1))[..., None], 3, axis=2)
    write_video(tmp_path / "wide.mp4", [frame] * 20, crf="8")
    for family in ("llava_vit_sampling", "llava_vit_codec"):
        config = config_of("--model_family", family, "--K_keep", 256, "--gop", 64)
        means = []
        for across in (0.0, 0.5, 1.0):
            view = view_of_file(tmp_path / "wide.mp4", Look(0, across=across), config, 64, 16)
            rows = torch.empty(len(view), view.patch_dim, dtype=torch.uint8)
            view.write(rows)
            means.append(rows.float().mean().item())
        assert means[0] < 60 and 100 < means[1] < 150 and means[2] > 190, (family, means)


def test_raw_codec_patches_are_those_that_packing_keeps(clips, packed):
    from data_pipeline.loading.config import ViewConfig
    from data_pipeline.loading.samples import sequential_batches
    from data_pipeline.shards.manifest import load_manifest

    config = config_of("--model_family", "llava_vit_codec", "--K_keep", 98, "--gop", 64)
    view = view_of_file(clips / "clips" / "train_00003.mp4", Look(3), config, 112, 16)
    manifest = load_manifest(packed / "train")
    (batch,) = sequential_batches(manifest, [3], 1, "codec", ViewConfig(max_tokens=98))
    assert torch.equal(view.positions, batch.patch_positions)
    rows = torch.empty_like(batch.pixels)
    view.write(rows)
    assert (rows.float() - batch.pixels.float()).abs().mean() < 6  # JPEG


def test_colours_change_for_all_frames_alike_and_each_part_can_be_switched_off():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    frames = np.stack([one, one])
    parts = ("brightness", "saturation", "hue", "channels")
    changed = [recolour(frames, np.random.default_rng(i), parts) for i in range(60)]
    assert all(np.array_equal(a[0], a[1]) for a in changed)
    share = np.mean([not np.array_equal(a, frames) for a in changed])
    assert share > 0.9
    for part, probability in zip(parts, (0.8, 0.8, 0.8, 0.1), strict=True):
        alone = [recolour(frames, np.random.default_rng(i), (part,)) for i in range(300)]
        share = np.mean([not np.array_equal(a, frames) for a in alone])
        assert abs(share - probability) < 0.08, part
    assert np.array_equal(recolour(frames, rng, ()), frames)


def test_unreadable_files_are_rejected_by_every_reader(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    for decoder in DECODERS:
        needs(decoder)
        with pytest.raises(RejectedInput):
            view_of_file(tmp_path / "text.mp4", Look(0), config_of("--decoder", decoder), 32, 16)


def test_a_wrong_weight_path_is_an_error_never_another_model(tmp_path):
    config = config_of()
    for weight in ("NULL", str(tmp_path / "nothing"), str(tmp_path)):
        with pytest.raises(ValueError, match="no Hugging Face folder"):
            build_encoder(config, "llava_vit_tiny_ln", weight, 0)
        for family in ("clip", "dinov3"):
            with pytest.raises(ValueError, match="does not exist"):
                build_encoder(config_of("--model_family", family), "x", weight, 0)
    fields = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, patch_size=16)
    clip = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**fields, num_attention_heads=2, image_size=32)
    )
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="clip_vision_model"):
        build_encoder(config_of("--model_family", "dinov2"), "x", str(tmp_path / "clip"), 0)
    with pytest.raises(ValueError, match="pass --model_family clip or metaclip"):
        build_encoder(config, "llava_vit_tiny_ln", str(tmp_path / "clip"), 0)


def test_random_weights_follow_the_seed_and_names_the_weights():
    first, again, other = (
        build_encoder(config_of(), "llava_vit_tiny_ln", "random", seed) for seed in (1, 1, 2)
    )
    assert first.sha256 == again.sha256 != other.sha256


def test_a_still_clip_is_looked_at_as_packing_does(tmp_path):
    """Noise on a resting picture: whole frames at even times, not the noisiest patches."""
    rng = np.random.default_rng(0)
    still = rng.integers(0, 255, (64, 64, 3))
    frames = [np.clip(still + rng.normal(0, 1, still.shape), 0, 255) for _ in range(64)]
    write_video(tmp_path / "still.mp4", [f.astype(np.uint8) for f in frames], crf="18")
    config = SampleConfig(size=64, gop=64, budget=48, num_full_frames=4)
    info = build_sample(tmp_path / "still.mp4", "still.mp4", config)[1]
    assert info.is_static
    shown = config_of("--model_family", "llava_vit_codec", "--K_keep", 48)
    view = view_of_file(tmp_path / "still.mp4", Look(0), shown, 64, 16)
    counts = np.unique(view.positions[:, 0].numpy(), return_counts=True)[1]
    assert counts.tolist() == [16, 16, 16], "three whole frames"


def test_codec_patches_of_a_short_clip_lie_on_the_time_base(tmp_path):
    """Ten frames over 64 instants: seven apart."""
    noise = np.random.default_rng(0).integers(0, 255, (10, 64, 64, 3)).astype(np.uint8)
    write_video(tmp_path / "short.mp4", list(noise), crf="18")
    config = config_of("--model_family", "llava_vit_codec", "--K_keep", 160)
    view = view_of_file(tmp_path / "short.mp4", Look(0), config, 64, 16)
    assert sorted(set(view.positions[:, 0].tolist())) == list(range(0, 64, 7))


@pytest.mark.parametrize(
    "rule", ["differences", "random", "i_frames_random", "published", "published_llava"]
)
def test_each_rule_selects_for_a_probe_what_it_selects_for_packing(clips, rule):
    path = clips / "clips" / "train_00001.mp4"
    sample = SampleConfig(size=112, gop=64, budget=98, selection=SelectionConfig(rule=rule))
    members, info = build_sample(path, "clip.mp4", sample)
    packed = decode_array(members["positions.npy"], member="positions.npy", name="clip.mp4")
    config = config_of("--model_family", "llava_vit_codec", "--K_keep", 98, "--rule", rule)
    view = view_of_file(path, Look(0), config, 112, 16)
    assert view.positions.tolist() == packed.tolist() and info.num_patches == 98
    whole = {"differences": 49, "i_frames_random": 49, "published_llava": 49}.get(rule, 0)
    assert (packed[:whole, 0] == 0).all()


def test_a_share_of_the_i_frame_leaves_more_to_the_others(clips):
    path = clips / "clips" / "train_00001.mp4"
    flags = ("--model_family", "llava_vit_codec", "--K_keep", 49, "--i_frame_share", 0.5)
    view = view_of_file(path, Look(0), config_of(*flags), 112, 16)
    assert (view.positions[:, 0] == 0).sum() == 24 and len(view) == 49


@pytest.mark.parametrize(("budget", "gop"), [(4096, 16), (2048, 16), (1024, 32), (512, 64)])
def test_a_smaller_budget_has_fewer_whole_frames(budget, gop):
    config = config_of("--model_family", "ov_encoder_codec", "--K_keep", budget)
    assert chosen_gop(config, 14, 14) == gop
    with pytest.raises(ValueError, match="--K_keep 100 cannot hold"):
        chosen_gop(config_of("--K_keep", 100), 14, 14)


def test_image_encoders_see_a_frame_once_cut_and_other_preprocessing_is_another_encoder(tmp_path):
    fields = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**fields, image_size=28)).eval()
    model.save_pretrained(tmp_path)
    described = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    described |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    config = config_of("--model_family", "dinov2")
    encoder = build_encoder(config, "x", str(tmp_path), 0)
    frame = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    encoded = encoder(batch_of(still_view([torch.from_numpy(frame)], 28, torch.zeros(1))))
    with torch.no_grad():
        pixels = torch.from_numpy(frame).movedim(-1, 0)[None] / 127.5 - 1
        wanted = model(pixel_values=pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoded.pooled, wanted.mean(1), rtol=1e-4, atol=1e-4)
    described["image_mean"] = [0.4] * 3
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    assert build_encoder(config, "x", str(tmp_path), 0).sha256 != encoder.sha256


def test_files_of_one_name_in_two_folders_do_not_share_features(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.mp4").write_bytes(b"x")
        os.utime(tmp_path / place / "1.mp4", (1, 1))
    first, second = (file_identity(tmp_path / place / "1.mp4") for place in "ab")
    assert first != second and first == file_identity(tmp_path / "b" / ".." / "a" / "1.mp4")


@pytest.mark.e2e
def test_a_run_a_checkpoint_and_its_exports_are_the_same_encoder(tmp_path):
    flags = ("-m", "training.train_univit", "--preset", "debug", "--list_batch_size", 16)
    forked(*flags, "--num_sampled_data", 16 * 10, "--output", tmp_path)
    places = ("", "hf", "backbone.pt", "checkpoints/step_00000010")
    found = [build_encoder(config_of(), "llava_vit_base_ln", str(tmp_path / p), 0) for p in places]
    shutil.rmtree(tmp_path / "hf")
    found.append(
        build_encoder(config_of(), "llava_vit_base_ln", str(tmp_path), 0)
    )  # the newest checkpoint
    assert len({encoder.sha256 for encoder in found}) == 1, "wherever the weights stand"
    weights = [encoder._model.state_dict() for encoder in found]
    for other in weights[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in weights[0].items())


def test_image_encoders_see_every_frame_and_its_number(tmp_path):
    fields = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, patch_size=16)
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**fields, num_attention_heads=2, image_size=64)
    ).eval()
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    view = still_view([torch.from_numpy(f) for f in frames], 16, torch.arange(3))
    one = still_view([torch.from_numpy(frames[1])], 16, torch.zeros(1))
    encoder = build_encoder(config_of("--model_family", "clip"), "x", str(tmp_path), 0)
    assert (encoder.width, encoder.size) == (32, 64)
    encoded = encoder(batch_of(view, one))
    assert encoded.lengths.tolist() == [48, 16] and encoded.tokens.shape == (64, 32)
    pixels = torch.from_numpy(frames).movedim(-1, 1) / 255
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        wanted = model(pixel_values=pixels).last_hidden_state[:, 1:]
    code = time_code(3, 32)
    wanted = (wanted + code[:, None]).flatten(0, 1)
    torch.testing.assert_close(encoded.tokens[:48], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        encoded.tokens[48:] - code[0], wanted[16:32] - code[1], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(encoded.pooled[1], (encoded.tokens[48:] - code[0]).mean(0))
    flags = ("--model_family", "clip", "--mean", 0.5, 0.5, 0.5, "--std", 0.5, 0.5, 0.5)
    half = build_encoder(config_of(*flags), "x", str(tmp_path), 0)
    with torch.no_grad():
        pixels = torch.from_numpy(frames).movedim(-1, 1) / 127.5 - 1
        wanted = model(pixel_values=pixels).last_hidden_state[:, 1:] + code[:, None]
    got = half(batch_of(view)).tokens
    torch.testing.assert_close(got, wanted.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_reader_that_never_returns_makes_its_clip_unreadable_and_no_other(clips, tmp_path):
    """A stand-in for decord hangs on one clip: it is left out by name, and the next one is read."""
    (tmp_path / "decord.py").write_text(
        "import time, types\n"
        "import numpy as np\n"
        "DECORDError = RuntimeError\n"
        "cpu = lambda number: None\n"
        "class VideoReader:\n"
        "    def __init__(self, path, **options):\n"
        "        while path.endswith('train_00001.mp4'):\n"
        "            time.sleep(1)\n"
        "    def __len__(self):\n"
        "        return 8\n"
        "    def get_batch(self, numbers):\n"
        "        frames = np.zeros((len(numbers), 32, 32, 3), np.uint8)\n"
        "        return types.SimpleNamespace(asnumpy=lambda: frames)\n"
    )
    names = [f"clips/train_0000{number}.mp4" for number in range(3)]
    listed = LabelledList(clips, "train", names, np.zeros(3, np.int64), 1)
    flags = ("--decoder", "decord", "--wall_seconds", "5", "--dali_py_num_workers", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        reader = RawClips(listed, config_of(*flags), size=32, patch_size=16)
        packs = list(reader.packs([Look(number) for number in range(3)], batch_size=2))
    assert [look.clip for looks, _ in packs for look in looks] == [0, 2]
    assert list(reader.unreadable) == [names[1]]
    assert "timeout" in reader.unreadable[names[1]]


def test_the_default_reader_is_the_packers():
    assert chosen_decoder(config_of()) == chosen_decoder(config_of("--decoder", "av")) == "av"


def test_an_export_that_lost_a_file_is_an_error_and_nothing_else_is_taken_for_it(tmp_path):
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    model = LlavaViTPackingModel(LlavaViTPackingConfig(**shape))
    save_encoder_folder(model, tmp_path / "hf")
    save_backbone(model, tmp_path / "backbone.pt")
    (tmp_path / "checkpoints").mkdir()
    packed_model(None, str(tmp_path))
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "hf" / name).rename(tmp_path / "kept")
        with pytest.raises(ValueError, match=f"{name} is listed there and absent"):
            packed_model(None, str(tmp_path))
        (tmp_path / "kept").rename(tmp_path / "hf" / name)
    (tmp_path / "hf" / CHECKSUMS_NAME).unlink()
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        packed_model(None, str(tmp_path))
