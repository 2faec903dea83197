"""What a caller may pass, and what every wrong input says before anything is computed."""

import pytest
import torch

from model_factory.packing import compute_patch_positions_from_grid_thw, patchify, unpatchify
from model_factory.registry import create_model

GRIDS = torch.tensor([[1, 4, 4], [3, 2, 5], [1, 1, 7], [2, 4, 2]])
BOUNDS = torch.tensor([0, 16, 46, 53, 69], dtype=torch.int32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_model("hf_llava_vit_packing_tiny_ln", rope_pairing="rotary").eval()


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    return create_model("llava_vit_tiny_ln").eval()


def rows(count=69, seed=0):
    return torch.randn(count, 768, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "described",
    [
        {"cu_seqlens": BOUNDS},
        {"cu_seqlens": BOUNDS, "max_seqlen": 30},
        {"cu_seqlens": BOUNDS.long(), "grid_thw": GRIDS},
        {"grid_thw": GRIDS.int(), "max_seqlen": 64},
        {"grid_thw": GRIDS.tolist()},
    ],
)
@pytest.mark.parametrize("explicit", [True, False])
def test_every_sufficient_description_means_the_same_pack(model, described, explicit):
    positions = compute_patch_positions_from_grid_thw(GRIDS)
    if explicit:
        described = {**described, "patch_positions": positions}
    elif "grid_thw" not in described:
        pytest.skip("nothing would place the patches")
    with torch.no_grad():
        want, got = model(rows(), GRIDS), model(rows(), **described)
    assert torch.equal(want.pooler_output, got.pooler_output)
    assert torch.equal(want.last_hidden_state, got.last_hidden_state)


def test_a_sparse_item_is_any_number_of_rows_with_its_positions(model):
    """Dropping rows of a clip gives what a grid of one item per kept row set would."""
    positions = compute_patch_positions_from_grid_thw(GRIDS)
    keep = torch.tensor([0, 3, 5, 16, 20, 45, 46, 60, 61, 68])
    bounds = torch.tensor([0, 3, 6, 7, 10])
    with torch.no_grad():
        sparse = model(rows()[keep], patch_positions=positions[keep], cu_seqlens=bounds)
        faked = model(
            rows()[keep],
            grid_thw=torch.tensor([[1, 1, 3], [1, 1, 3], [1, 1, 1], [1, 1, 3]]),
            patch_positions=positions[keep],
        )
        described = model(
            rows()[keep], grid_thw=GRIDS, patch_positions=positions[keep], cu_seqlens=bounds
        )
    assert sparse.pooler_output.shape == (4, 128)
    assert torch.equal(sparse.pooler_output, faked.pooler_output)
    assert torch.equal(sparse.pooler_output, described.pooler_output)


GRID = torch.tensor([[1, 4, 4]])
POSITIONS = torch.zeros(16, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_thw": torch.tensor([[1, 4, 5]])}, "grid_thw describes 20 patches.*has 16 rows"),
        ({"grid_thw": torch.tensor([[1, 3, 5]])}, "grid_thw describes 15 patches.*has 16 rows"),
        ({"grid_thw": torch.tensor([[1, -4, -4]])}, r"positive, row 0 is \[1, -4, -4\]"),
        ({"grid_thw": torch.tensor([[1, 4, 4], [0, 4, 4]])}, r"row 1 is \[0, 4, 4\]"),
        ({"grid_thw": torch.zeros(0, 3, dtype=torch.long)}, r"N >= 1, got \[0, 3\]"),
        ({"grid_thw": torch.tensor([1, 4, 4])}, r"grid_thw must have shape \[N, 3\].*got \[3\]"),
        ({"grid_thw": torch.tensor([[1.0, 4.0, 4.0]])}, "grid_thw must hold integers.*float32"),
        ({"grid_thw": None}, "give grid_thw"),
        ({"grid_thw": None, "cu_seqlens": torch.tensor([0, 16])}, "places no patch"),
        ({"patch_positions": torch.zeros(15, 3)}, r"shape \[16, 3\].*got \[15, 3\]"),
        ({"patch_positions": torch.zeros(16, 2)}, r"shape \[16, 3\].*got \[16, 2\]"),
        ({"patch_positions": torch.zeros(16, 3).bool()}, "patch_positions must be.*bool"),
        ({"hidden_states": torch.zeros(16, 588)}, r"\[S, 768\].*got \[16, 588\]"),
        ({"hidden_states": torch.zeros(1, 16, 768)}, r"\[S, 768\].*got \[1, 16, 768\]"),
        ({"hidden_states": torch.zeros(0, 768)}, r"S >= 1, got \[0, 768\]"),
        ({"hidden_states": torch.zeros(16, 768, dtype=torch.uint8)}, "normalised.*uint8"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens ends at 9 patches.*has 16 rows"),
        ({"cu_seqlens": torch.tensor([0, 9, 25]), "patch_positions": POSITIONS}, "ends at 25"),
        (
            {"cu_seqlens": torch.tensor([0, 9]), "max_seqlen": 9, "patch_positions": POSITIONS},
            "cu_seqlens ends at 9 patches.*has 16 rows",
        ),
        ({"cu_seqlens": torch.tensor([0, 9, 9, 16])}, "shortest item 0"),
        ({"cu_seqlens": torch.tensor([0, 12, 9, 16])}, "shortest item -3"),
        ({"cu_seqlens": torch.tensor([3, 16])}, "first entry 3"),
        ({"cu_seqlens": torch.tensor([0])}, r"N >= 1, got \[1\]"),
        ({"cu_seqlens": torch.tensor([0.0, 16.0])}, "cu_seqlens must hold integers"),
        ({"cu_seqlens": torch.tensor([0, 9, 16])}, "grid_thw has 1 items, cu_seqlens has 2"),
        (
            {"cu_seqlens": torch.tensor([0, 9, 16]), "grid_thw": torch.tensor([[1, 2, 4]] * 2)},
            "row 0 describes 8 patches, cu_seqlens gives that item 9",
        ),
        ({"max_seqlen": 9}, "max_seqlen is 9, the longest item has 16"),
        (
            {"grid_thw": torch.tensor([[1, 2, 2], [1, 3, 4]]), "max_seqlen": 11},
            "max_seqlen is 11, the longest item has 12",
        ),
        ({"max_seqlen": 0}, "max_seqlen is 0"),
        (
            {
                "grid_thw": torch.tensor([[1, 1, 1]]),
                "cu_seqlens": torch.tensor([0, 16]),
                "patch_positions": POSITIONS,
            },
            "row 0 describes 1 patches, cu_seqlens gives that item 16",
        ),
    ],
)
def test_wrong_packs_are_value_errors_before_any_compute(model, monkeypatch, change, message):
    monkeypatch.setattr(model.patch_embed, "forward", lambda rows: pytest.fail("computed"))
    arguments = {"hidden_states": torch.zeros(16, 768), "grid_thw": GRID, **change}
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("bounds", "longest", "message"),
    [
        (torch.zeros(5, 2, dtype=torch.int32), 4, r"cu_seqlens must have shape \[N \+ 1\]"),
        (torch.zeros(1, dtype=torch.int32), 4, r"N >= 1, got \[1\]"),
        (torch.zeros(5), 4, "cu_seqlens must hold integers"),
        (torch.zeros(5, dtype=torch.int32), -2, "max_seqlen is -2"),
    ],
)
def test_shapes_are_checked_where_values_are_trusted(bounds, longest, message):
    with torch.device("meta"):
        model = create_model("hf_llava_vit_packing_tiny_ln")
        rows, positions = torch.zeros(48, 768), torch.zeros(48, 3)
    with pytest.raises(ValueError, match=message):
        model(rows, patch_positions=positions, cu_seqlens=bounds.to("meta"), max_seqlen=longest)
    on_host = torch.tensor([0, 9, 25])
    with pytest.raises(ValueError, match="cu_seqlens ends at 25 patches"):
        model(rows, patch_positions=positions, cu_seqlens=on_host, max_seqlen=16)


def test_dense_pictures_clips_and_visible_indices_equal_the_packed_call(source):
    pixels = torch.randn(2, 3, 4, 32, 48, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[4, 2, 3]] * 2)
    visible = torch.tensor([[23, 0, 7], [5, 6, 11]])
    patches = patchify(pixels.transpose(1, 2), 16).flatten(1, 2)
    positions = compute_patch_positions_from_grid_thw(grid).view(2, 24, 3)
    with torch.no_grad():
        image = source(pixels[:, :, 0], visible_indices=visible)  # ignored for pictures
        clip, sparse = source(pixels), source(pixels, visible_indices=visible)
        want_image = source.trunk(patches[:, :6].flatten(0, 1), torch.tensor([[1, 2, 3]] * 2))
        want_clip = source.trunk(patches.flatten(0, 1), grid)
        picked = [torch.stack([x[i, visible[i]] for i in (0, 1)]) for x in (patches, positions)]
        want_sparse = source.trunk(
            picked[0].flatten(0, 1),
            patch_positions=picked[1].flatten(0, 1),
            cu_seqlens=torch.tensor([0, 3, 6]),
        )
        own = source(pixels, visible_indices=visible, patch_positions=positions + 5)
        shared = source(pixels, visible_indices=visible, patch_positions=positions[0] + 5)
    for got, want in ((image, want_image), (clip, want_clip), (sparse, want_sparse)):
        assert torch.equal(got["head_output"], want.pooler_output)
        assert torch.equal(got["visible_embeddings"].flatten(0, 1), want.last_hidden_state)
    assert torch.equal(own["head_output"], shared["head_output"])
    assert not torch.equal(own["head_output"], sparse["head_output"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": torch.zeros(3, 32, 48)}, r"\[B, 3, H, W\].*got \[3, 32, 48\]"),
        ({"pixel_values": torch.zeros(2, 1, 32, 48)}, r"got \[2, 1, 32, 48\]"),
        ({"pixel_values": torch.zeros(2, 3, 0, 32, 48)}, "no empty side"),
        ({"pixel_values": torch.zeros(2, 3, 4, 32, 40)}, "32x40, not a multiple of patch_size 16"),
        ({"pixel_values": torch.zeros(2, 3, 4, 32, 48).byte()}, "pixel_values must be.*uint8"),
        ({"visible_indices": torch.tensor([[0, 24], [1, 2]])}, "from 0 to 24.*patches 0 to 23"),
        ({"visible_indices": torch.tensor([[0, -1], [1, 2]])}, "from -1 to 2"),
        ({"visible_indices": torch.tensor([[0, 1]])}, r"shape \[2, K\].*got \[1, 2\]"),
        ({"visible_indices": torch.zeros(2, 0).long()}, r"got \[2, 0\]"),
        ({"visible_indices": torch.zeros(2, 1, 4, 32, 48)}, r"got \[2, 1, 4, 32, 48\]"),
        ({"visible_indices": torch.zeros(2, 3)}, "must be integers, got torch.float32"),
        ({"patch_positions": torch.zeros(23, 3)}, r"\[24, 3\] or \[2, 24, 3\], got \[23, 3\]"),
    ],
)
def test_wrong_dense_inputs_are_value_errors(source, change, message):
    with pytest.raises(ValueError, match=message):
        source(**{"pixel_values": torch.zeros(2, 3, 4, 32, 48), **change})


def test_patch_rows_are_channel_first_in_raster_order():
    picture = torch.arange(3 * 4 * 6).float().view(3, 4, 6)
    cut = patchify(picture, 2)
    assert cut.shape == (6, 12)
    assert torch.equal(unpatchify(cut, 2)[4], picture[:, 2:4, 2:4])
    with pytest.raises(ValueError, match="4x6, not a multiple of patch_size 4"):
        patchify(picture, 4)
