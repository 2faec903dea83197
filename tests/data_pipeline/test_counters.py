"""Counter-based randomness: the published hash, and draws that never share their numbers."""

import math
import zlib

import numpy as np
import torch

from data_pipeline.random import counter_normal, counter_rng, counter_uniform

MASK = (1 << 64) - 1


def split_mix(word: int) -> int:
    """SplitMix64 as published, in Python's integers."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def test_uniform_numbers_are_those_of_split_mix():
    ids = [0, 1, 2, 77, 2**31, 2**40 + 5, 2**62]
    found = counter_uniform(torch.tensor(ids), 12345, "view", 3, 9)
    state = 0
    for word in (12345, zlib.crc32(b"view"), 3, 9):
        state = split_mix(state ^ word)
    # the upper 24 bits, as many as a float32 holds
    assert found.tolist() == [(split_mix(i ^ state) >> 40) / 2**24 for i in ids]


def test_long_lists_of_ids_are_the_same_numbers_as_short_ones():
    ids = torch.arange(100_000)
    assert torch.equal(
        counter_uniform(ids, 1, "view")[70_000:70_010],
        counter_uniform(ids[70_000:70_010], 1, "view"),
    )


def test_normal_numbers_take_radius_and_angle_from_different_draws():
    rows = torch.tensor([3, 500])
    ids = rows[:, None] * 4 + torch.arange(4)
    radius = (-2 * torch.log1p(-counter_uniform(ids, 7, "centers", 0))).sqrt()
    angle = 2 * math.pi * counter_uniform(ids, 7, "centers", 1)
    torch.testing.assert_close(counter_normal(rows, 4, 7, "centers"), radius * angle.cos())


def test_draws_of_another_purpose_seed_or_counter_are_other_numbers():
    ids = torch.arange(50)
    calls = [(0, "view", 1), (1, "view", 1), (0, "labels", 1), (0, "view", 2)]
    hashed = {tuple(counter_uniform(ids, *call).tolist()) for call in calls}
    drawn = {tuple(counter_rng(*call).permutation(50).tolist()) for call in calls}
    assert len(hashed) == len(drawn) == len(calls)
    again = counter_rng(0, "view", 1).permutation(50)
    assert np.array_equal(again, counter_rng(0, "view", 1).permutation(50))
