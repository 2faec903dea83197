"""An encoder of tubes from its training over its exports to its probe, and what refuses it."""

import json

import pytest
import torch
from forked import forked, forked_ranks

from eval_encoder.lmm.model.open import open_tower
from model_factory.backbone import load_backbone
from model_factory.export_llava_tower import main as export_llava_tower
from model_factory.open_encoder import locate_encoder, open_encoder
from training.config.cli import build_config, build_parser
from training.config.schema import ModelConfig, compared, fingerprint
from training.encoder import build_encoder

VIEW = "heads.0.stream.view"
MODEL = "llava_vit_tiny_ln"
TUBES = (
    *("--residual_ratio", 0, "--frame_sampling_ratio", 1, "--num_frames", 4, "--target_num", 98),
    *("--set", f"{VIEW}.frames_per_token=2"),
)


def command(packed, output, *extra, steps=2):
    return (
        *("-m", "training.train_univit", "--preset", "demo", "--list_datasets", packed / "train"),
        *("--list_batch_size", 4, "--num_sampled_data", 4 * steps, "--output", output, *extra),
    )


def config_of(*flags):
    return build_config(build_parser().parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def run(packed, tmp_path_factory):
    """Output of two steps on one rank."""
    output = tmp_path_factory.mktemp("tubes")
    forked_ranks(1, *command(packed, output, *TUBES))
    return output


def outputs(encoder):
    rows = torch.randn(2 * 12, 1536, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return encoder.eval()(rows, torch.tensor([[2, 3, 4]])).last_hidden_state


@pytest.mark.e2e
@pytest.mark.dali
def test_every_export_is_the_encoder_that_was_trained(run, tmp_path):
    described = json.loads((run / "backbone.json").read_text())
    assert described["num_channels"] == 6
    want = outputs(load_backbone(run / "backbone.pt", MODEL))
    assert torch.equal(outputs(open_encoder(locate_encoder(run / "hf"))), want)
    assert "16 x 16 pixels of 2 successive frames" in (run / "hf" / "README.md").read_text()
    # from the checkpoint alone, whose fingerprint knows the number
    forked("-m", "training.export", run, "--output", tmp_path / "again")
    assert torch.equal(outputs(open_encoder(locate_encoder(tmp_path / "again" / "hf"))), want)
    converter = "model_factory/convert_llava_vit_packing_to_hf.py"
    converted = tmp_path / "converted"
    done = forked(converter, MODEL, run / "backbone.pt", "--output_dir", converted)
    assert done.stdout.count("agree") == 12 and "bit for bit" in done.stdout
    assert torch.equal(outputs(open_encoder(locate_encoder(converted))), want)


@pytest.mark.e2e
@pytest.mark.dali
def test_training_goes_on_from_its_weights_and_its_checkpoint(run, packed, tmp_path):
    done = forked_ranks(1, *command(packed, run, *TUBES))
    assert done.returncode == 0  # nothing is left to do
    other = ("--num_frames", 4, "--residual_ratio", 0, "--frame_sampling_ratio", 1)
    other = (*other, "--target_num", 98)
    done = forked_ranks(1, *command(packed, run, *other), check=False)
    assert done.returncode != 0
    assert f"{VIEW}.frames_per_token: checkpoint 2, now None" in done.stderr
    assert "--resume_allow" not in done.stderr, "the encoder has another shape"
    config = ModelConfig(name=MODEL, init_from=str(run / "backbone.pt"))
    torch.testing.assert_close(
        outputs(build_encoder(config, seed=0, frames_per_token=2)),
        outputs(load_backbone(run / "backbone.pt", MODEL)),
    )
    with pytest.raises(ValueError, match="backbone.pt has num_channels 6.*frames_per_token 1"):
        build_encoder(config, seed=0)


@pytest.mark.e2e
@pytest.mark.dali
def test_the_probe_reads_tubes_of_videos_and_of_packed_shards(run, packed, clips, tmp_path):
    import shutil

    raw = tmp_path / "raw" / "motion_shapes"
    shutil.copytree(clips / "clips", raw / "clips")
    for name in ("train.csv", "val.csv"):
        shutil.copy(clips / name, raw / name)

    def probe(root, name, *extra, **options):
        return forked(
            *("eval_encoder/attentive_probe.py", "--dataset", "motion_shapes", "--data_root", root),
            *("--model_weight", run, "--model_name", MODEL, "--input_size", 112),
            *("--batch_size", 8, "--default_epoch", 1, "--train_views", 1),
            *("--output", tmp_path / name, *extra),
            **options,
        )

    for name, root in (("raw_probe", raw.parent), ("packed_probe", packed.parent)):
        probe(root, name, "--num_frames", 4)
        (line,) = (tmp_path / name / "results.jsonl").read_text().splitlines()
        record = json.loads(line)
        assert record["costs"]["tokens_per_clip"] == 98, "two tubes of 49"
    done = probe(packed.parent, "odd", "--num_frames", 3, check=False)
    assert "--num_frames 3: the encoder takes tokens of 2 frames" in done.stderr
    codec = ("--model_family", "llava_vit_codec", "--K_keep", 98)
    done = probe(packed.parent, "codec", *codec, check=False)
    assert "llava_vit_codec: the encoder takes tokens of 2 whole frames" in done.stderr


@pytest.mark.e2e
@pytest.mark.dali
def test_samples_are_clustered_by_an_encoder_of_tubes(run, packed):
    from data_pipeline.clustering.feature_sources import _packing_model_rows
    from data_pipeline.shards.manifest import load_manifest

    rows = _packing_model_rows(load_manifest(packed / "val"), locate_encoder(run))(range(4))
    assert rows.shape == (4, 128) and len({row.tobytes() for row in rows}) == 4


@pytest.mark.e2e
@pytest.mark.dali
def test_no_tower_is_made_of_it(run, tmp_path, capsys):
    words = [str(run / "backbone.pt"), "--output_dir", str(tmp_path / "tower")]
    assert export_llava_tower(words) != 0
    assert "backbone.pt has num_channels 6, tokens of 2 frames" in capsys.readouterr().err
    assert not (tmp_path / "tower").exists()
    with pytest.raises(ValueError, match="tubes.*has num_channels 6.*frames_per_token 1"):
        open_tower(run)


def test_noise_trains_an_encoder_of_tubes(tmp_path):
    output = tmp_path / "noise"
    forked_ranks(
        1,
        *("-m", "training.train_univit", "--preset", "debug", "--use_synthetic_data"),
        *("--num_sampled_data", 16, "--output", output, *TUBES),
    )
    assert json.loads((output / "backbone.json").read_text())["num_channels"] == 6


def test_heads_must_agree_on_the_frames_of_a_token():
    two = ("--list_datasets", "a/x", "b/y", *TUBES)
    with pytest.raises(ValueError, match="frames_per_token of the heads .*'x': 2, 'y': 1.*agree"):
        config_of(*two)
    config = config_of(*two, "--set", "heads.1.stream.view.frames_per_token=2")
    assert config.frames_per_token == 2


def test_a_fingerprint_without_tubes_is_that_of_before_there_were_any():
    single = fingerprint(config_of("--preset", "demo"), 1)
    assert not [key for key in single if "frames_per_token" in key]
    joined = fingerprint(config_of("--preset", "demo", *TUBES), 1)
    assert joined[f"{VIEW}.frames_per_token"] == 2
    assert compared(joined) == joined
