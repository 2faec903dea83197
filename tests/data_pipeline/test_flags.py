"""Flags of `python -m data_pipeline`, which cannot stand at the fields that they fill."""

import dataclasses

import pytest

from data_pipeline.__main__ import build_parser
from data_pipeline.clustering.feature_sources import FeatureConfig
from data_pipeline.clustering.pipeline import ClusterConfig
from data_pipeline.codec.saliency import SaliencyConfig
from data_pipeline.shards.sample_builder import SampleConfig
from data_pipeline.shards.tasks import PackConfig

PACK = ["pack", "in", "--output", "out"]
CLUSTER = ["cluster", "in", "--num-centroids", "4", "--output", "out"]
ELSEWHERE = {"size", "patch_size", "normalise", "features", "num_centroids"}  # in commands.py


@pytest.mark.parametrize(
    "kind, words",
    [
        (SampleConfig, PACK),
        (SaliencyConfig, PACK),
        (PackConfig, PACK),
        (ClusterConfig, CLUSTER),
        (FeatureConfig, CLUSTER),
    ],
)
def test_flags_have_the_names_and_defaults_of_their_fields(kind, words):
    args = vars(build_parser().parse_args(words))
    filled = [f for f in dataclasses.fields(kind) if f.name in args and f.name not in ELSEWHERE]
    assert len(filled) >= 3
    for field in filled:
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        assert args[field.name] == default, field.name
