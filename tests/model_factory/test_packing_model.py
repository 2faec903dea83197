"""The packed encoder: items do not see each other, wrong input is named,
attention back ends agree.
"""

import pytest
import torch

from model_factory.attention import available_backends, varlen_attention
from model_factory.packing import patchify, unpatchify
from model_factory.registry import create_model

GRIDS = torch.tensor([[1, 4, 4], [3, 2, 5], [1, 1, 7], [2, 4, 2]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").eval()


def rows_of(grids, seed=0):
    return torch.randn(int(grids.prod(1).sum()), 768, generator=torch.Generator().manual_seed(seed))


def test_packed_equals_alone(model):
    rows = rows_of(GRIDS)
    with torch.no_grad():
        packed = model(rows, GRIDS)
        starts = [0, *GRIDS.prod(1).cumsum(0).tolist()]
        for i, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            alone = model(rows[start:stop], GRIDS[i : i + 1])
            assert torch.allclose(
                packed.last_hidden_state[start:stop], alone.last_hidden_state, atol=1e-5
            )
            assert torch.allclose(packed.pooler_output[i], alone.pooler_output[0], atol=1e-5)


def test_permuting_items_permutes_outputs(model):
    pieces = list(rows_of(GRIDS).split(GRIDS.prod(1).tolist()))
    order = [2, 0, 3, 1]
    with torch.no_grad():
        straight = model(torch.cat(pieces), GRIDS).pooler_output
        permuted = model(torch.cat([pieces[i] for i in order]), GRIDS[order]).pooler_output
    assert torch.allclose(straight[order], permuted, atol=1e-5)


def test_sparse_items_need_boundaries_and_positions_only(model):
    rows = rows_of(GRIDS)
    with torch.no_grad():
        by_grid = model(rows, GRIDS)
        from model_factory.packing import (
            compute_patch_positions_from_grid_thw,
            cu_seqlens_from_grid,
        )

        sparse = model(
            rows,
            patch_positions=compute_patch_positions_from_grid_thw(GRIDS),
            cu_seqlens=cu_seqlens_from_grid(GRIDS),
            max_seqlen=30,
        )
    assert torch.equal(by_grid.pooler_output, sparse.pooler_output)


def test_hidden_states_are_one_more_than_layers(model):
    with torch.no_grad():
        out = model(rows_of(GRIDS), GRIDS, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(model.layernorm_post(out.hidden_states[-1]), out.last_hidden_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_thw": torch.tensor([[1, 4, 5]])}, "hold 20 patches.* hidden_states has 16 rows"),
        (
            {"grid_thw": torch.tensor([[1, -4, -4]])},
            "grid_thw must be positive, got the smallest entry -4",
        ),
        ({"grid_thw": None}, "give grid_thw"),
        ({"patch_positions": torch.zeros(15, 3)}, r"patch_positions must have shape \[16, 3\]"),
        ({"hidden_states": torch.zeros(16, 588)}, r"\[S, 768\].*got \[16, 588\]"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, "hold 9 patches"),
    ],
)
def test_wrong_input_is_a_value_error_with_both_numbers(model, change, message):
    arguments = {
        "hidden_states": torch.zeros(16, 768),
        "grid_thw": torch.tensor([[1, 4, 4]]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_grouped_attention_equals_a_loop_over_items():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(40, 2, 32, generator=generator) for _ in range(3))
    bounds = torch.tensor([0, 5, 15, 20, 39, 40], dtype=torch.int32)
    got = varlen_attention(q, k, v, bounds, 19)
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) / 32**0.5
        want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:stop])
        assert torch.allclose(got[start:stop], want, atol=1e-5)


def test_unavailable_backend_is_named():
    q = torch.zeros(4, 1, 32)
    assert available_backends(q) == ["sdpa"]
    with pytest.raises(ValueError, match="'flash' cannot run on cpu"):
        varlen_attention(q, q, q, torch.tensor([0, 4]), 4, backend="flash")


def test_patch_rows_are_channel_first_in_raster_order():
    picture = torch.arange(3 * 4 * 6).float().view(3, 4, 6)
    rows = patchify(picture, 2)
    assert rows.shape == (6, 12)
    assert torch.equal(unpatchify(rows, 2)[4], picture[:, 2:4, 2:4])
    with pytest.raises(ValueError, match="4x6, not a multiple of patch_size 4"):
        patchify(picture, 4)
