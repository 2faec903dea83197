"""The demo's report: which folder of labels a round is, whatever else lies beside it."""

import json

import numpy as np
import pytest

from data_pipeline.clustering.labels import save_labels
from data_pipeline.shards.manifest import load_manifest
from eval_encoder.probe.report import compose
from model_factory.files import write_json


@pytest.fixture
def demo(packed, tmp_path):
    """OUTPUT of a demo of two rounds, with a stray file beside the labels."""
    for number in (1, 2):
        folder = tmp_path / "train" / f"round_{number}"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"loss/mine": 2.0}) + "\n")
    clusters = tmp_path / "train" / "round_1" / "clusters"
    manifest = load_manifest(packed / "train")
    labels = np.zeros((len(manifest), 1), np.int32)
    save_labels(clusters / "mine", labels, manifest, num_classes=1, details={})
    (clusters / ".DS_Store").touch()
    change = {"after_round": 1, "mine": {"classes": 1, "nmi_with_labels_before": 0.25}}
    write_json(tmp_path / "train" / "rounds.json", {"rounds": [change]})
    return tmp_path


def test_labels_of_a_round_are_found_by_their_heads_name(packed, demo):
    report = compose(demo, packed / "train", truth=packed / "train.csv")
    assert "encoder of round 1" in report and "0.250" in report
    assert "selected patches per sample" in report


def test_a_second_head_is_refused_by_the_files_name(packed, demo):
    heads = {"mine": {}, "other": {}}
    write_json(demo / "train" / "rounds.json", {"rounds": [{"after_round": 1, **heads}]})
    with pytest.raises(ValueError, match=r"rounds\.json round 1 names 2 heads.*run the demo again"):
        compose(demo, packed / "train")
