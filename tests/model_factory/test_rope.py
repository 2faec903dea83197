"""Rotary positions against a scalar loop; which of the two rules is a rotation."""

import math

import pytest
import torch

from model_factory.rope import ROPE_PAIRINGS, apply_rope, rope_tables

HEAD_DIM = 64
COUNTS = (8, 12, 12)  # channels of t, h, w inside half a head


def loop_reference(x, position, pairing):
    """One vector, written out: angles by axis, then every pair."""
    angles = []
    for axis, count in enumerate(COUNTS):
        for i in range(count):
            angles.append(position[axis] * 10000.0 ** (-i / count))
    out = list(x)
    for pair in range(HEAD_DIM // 2):
        a, b = 2 * pair, 2 * pair + 1
        first = angles[a % 32] if pairing == "legacy" else angles[pair]
        second = angles[b % 32] if pairing == "legacy" else angles[pair]
        out[a] = x[a] * math.cos(first) - x[b] * math.sin(first)
        out[b] = x[b] * math.cos(second) + x[a] * math.sin(second)
    return out


def rotate(x, positions, pairing):
    return apply_rope(x[:, None], rope_tables(positions, HEAD_DIM, pairing))[:, 0]


@pytest.mark.parametrize("pairing", ROPE_PAIRINGS)
def test_tables_match_a_scalar_loop(pairing):
    x = torch.randn(5, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 0, 0], [63, 13, 2], [7, 0, 31], [1, 1, 1], [32, 100, 5]])
    got = rotate(x, positions, pairing)
    want = torch.tensor(
        [
            loop_reference(row.tolist(), p.tolist(), pairing)
            for row, p in zip(x, positions, strict=True)
        ]
    )
    assert torch.allclose(got, want, atol=2e-5)


def scores_at_two_places(pairing):
    generator = torch.Generator().manual_seed(1)
    q, k = (
        torch.randn(1, HEAD_DIM, generator=generator),
        torch.randn(1, HEAD_DIM, generator=generator),
    )
    offset = torch.tensor([[3, 2, 5]])
    scores = []
    for base in (torch.tensor([[0, 0, 0]]), torch.tensor([[40, 11, 9]])):
        scores.append(float((rotate(q, base, pairing) * rotate(k, base + offset, pairing)).sum()))
    return scores


def test_rotary_scores_depend_on_relative_position_only():
    first, second = scores_at_two_places("rotary")
    assert abs(first - second) < 1e-3


def test_legacy_scores_do_not_and_the_difference_is_kept_for_public_weights():
    first, second = scores_at_two_places("legacy")
    assert abs(first - second) > 0.1


def test_head_width_that_cannot_be_split_is_an_error():
    with pytest.raises(ValueError, match="head_dim is 48"):
        rope_tables(torch.zeros(1, 3), 48, "rotary")


@pytest.mark.parametrize("pairing", ROPE_PAIRINGS)
def test_the_compiled_form_equals_the_complex_one(pairing, monkeypatch):
    x = torch.randn(7, 3, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    tables = rope_tables(torch.randint(0, 64, (7, 3)), HEAD_DIM, pairing)
    want = apply_rope(x, tables)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(apply_rope(x, tables), want, atol=1e-6)


def test_position_scale_shrinks_rows_and_columns_but_not_time():
    positions = torch.tensor([[5, 8, 12]])
    scaled = rope_tables(positions, HEAD_DIM, "rotary", position_scale=0.25)
    moved = rope_tables(torch.tensor([[5, 2, 3]]), HEAD_DIM, "rotary")
    assert torch.allclose(scaled.cos, moved.cos) and torch.allclose(scaled.turn, moved.turn)
