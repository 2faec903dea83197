"""Packs as the encoder gets them: normalised as public weights expect, items apart."""

import pytest
import torch

from data_pipeline.loading.packing import joined_inputs, pack_views
from data_pipeline.loading.views import View, image_view
from model_factory.packing import CLIP_MEAN, CLIP_STD


def pack_of(*views: View, budget: int | None = None):
    count = len(views)
    labels = torch.zeros(count, 1, dtype=torch.int64)
    return pack_views(list(views), torch.arange(count), labels, torch.ones(count), budget)


def picture(seed: int, rows: int, columns: int) -> View:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (16 * rows, 16 * columns, 3), generator=draw, dtype=torch.uint8)
    return image_view(pixels, 16)


def test_rows_are_scaled_centred_and_divided_by_the_spread_of_their_channel():
    view = picture(0, 2, 3)
    patches = torch.cat([piece.flatten(0, 1) for piece in view.pieces]).double()
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    wanted = ((patches / 255 - mean) / std).flatten(1)
    rows = pack_of(view).hidden_states()
    torch.testing.assert_close(rows.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budgets", [(None, None), (10, 20)])
def test_joined_packs_are_their_items_one_after_the_other(budgets):
    first = pack_of(picture(0, 2, 2), picture(1, 1, 3), budget=budgets[0])
    second = pack_of(picture(2, 3, 3), budget=budgets[1])
    joined = joined_inputs([first, second])
    bounds, longest = joined["cu_seqlens"].tolist(), joined["max_seqlen"]
    lengths = [*first.cu_seqlens.diff().tolist(), *second.cu_seqlens.diff().tolist()]
    assert bounds == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert longest == max(lengths) == 9
    assert torch.equal(joined["hidden_states"][len(first.pixels) :], second.hidden_states())
    assert torch.equal(joined["patch_positions"][: len(first.pixels)], first.patch_positions)
