"""How a clip is looked at: crops, drawn versions, and what features are stored under."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval_encoder.clip_reader import RARE, recolour
from eval_encoder.clip_views import Look
from eval_encoder.intervals import half_interval
from eval_encoder.probe.benchmarks import LabelledList
from eval_encoder.probe.config import build_config, build_parser
from eval_encoder.probe.features import ClipFeatures

ENCODER = SimpleNamespace(size=112, patch_size=16, frames_per_token=1, sha256="0" * 64)


@pytest.fixture
def features(tmp_path):
    """ClipFeatures of three files under flags; nothing is decoded."""
    names = [f"{number}.mp4" for number in range(3)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    clips = LabelledList(tmp_path, "train", names, np.zeros(3, int), 1)

    def made(*flags: str) -> ClipFeatures:
        config = build_config(build_parser().parse_args(list(flags)))
        return ClipFeatures(clips, config, ENCODER, torch.device("cpu"))

    return made


def test_crops_lie_in_the_middles_of_equal_parts_and_from_one_border_to_the_other(features):
    looks = features("--num_temporal_crops", "2", "--num_spatial_crops", "3").crops([1])
    places = [(look.within, look.across) for look in looks]
    assert places == [(within, across) for within in (0.25, 0.75) for across in (0, 0.5, 1)]
    assert features().crops([2, 0]) == [Look(2), Look(0)]


@pytest.mark.parametrize(
    ("views", "versions"), [(1, [0, 0, 0, 0]), (2, [1, 2, 1, 2]), (0, [1, 2, 3, 4])]
)
def test_drawn_versions_come_in_turns_or_never_again(features, views, versions):
    drawn = features("--train_views", str(views))
    looks = [drawn.drawn_looks([1], epoch) for epoch in (1, 2, 3, 4)]
    assert looks == [[Look(1, version)] for version in versions]


def test_features_are_stored_under_all_that_a_draw_depends_on(features):
    plain, other_seed = (
        features("--train_views", "2"),
        features("--train_views", "2", "--seed", "7"),
    )
    looks = [Look(0), Look(1), Look(0, 1), Look(0, 2), Look(0, within=0.25), Look(0, across=1.0)]
    names = {plain._identity(look) for look in looks}
    assert len(names) == len(looks)
    assert other_seed._identity(Look(0)) in names, "a plain look draws nothing"
    assert other_seed._identity(Look(0, 1)) not in names
    bare = features("--train_views", "2", "--augment", "none")
    assert bare._identity(Look(0, 1)) not in names


def test_a_part_that_is_switched_off_leaves_the_others_as_they_are():
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    seeds = [s for s in range(20) if np.random.default_rng(s).random(4)[3] >= RARE]
    for seed in seeds:  # for which red and blue stay where they are
        some, more = (
            recolour(frames, np.random.default_rng(seed), parts)
            for parts in (("brightness",), ("brightness", "channels"))
        )
        assert np.array_equal(some, more)


def test_the_larger_of_two_intervals_is_shown():
    assert half_interval({"ci95_clips": 1.5, "ci95_seeds": 0.4}) == 1.5
    assert half_interval({"ci95_clips": 1.5, "ci95_seeds": 2.5}) == 2.5
    assert half_interval({"ci95_clips": 1.5, "ci95_seeds": None}) == 1.5
