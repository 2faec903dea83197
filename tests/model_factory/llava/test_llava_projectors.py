"""Projectors by name: sizes, names of tensors, and what is refused."""

import pytest
import torch

from model_factory.llava.projectors import build_projector


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("linear", 4_198_400),
        ("mlp1x_gelu", 4_198_400),
        ("mlp2x_gelu", 20_979_712),
        ("mlp3x_gelu", 37_761_024),
        ("identity", 0),
    ],
)
def test_parameter_counts_at_the_published_size(kind, count):
    with torch.device("meta"):
        model = build_projector(kind, 1024, 4096)
    assert sum(p.numel() for p in model.parameters()) == count


def test_names_of_tensors_are_those_of_llava():
    names = set(build_projector("mlp2x_gelu", 8, 12).state_dict())
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_gelu_", "xmlp2x_gelu", "mlp2x_relu", ""])
def test_names_that_match_in_part_are_refused(kind):
    with pytest.raises(ValueError, match="choose one of linear"):
        build_projector(kind, 8, 12)


def test_four_neighbours_become_one_token():
    model = build_projector("spatial_merge", 8, 12)
    tokens = torch.randn(2, 24, 8)
    out = model(tokens, (4, 6))
    assert out.shape == (2, 6, 12)
    square = model.norm(tokens[:, [2, 3, 8, 9]]).flatten(1)  # second square of the first row
    torch.testing.assert_close(out[:, 1], model.mlp(square))
    for grid in ((3, 8), (4, 5)):
        with pytest.raises(ValueError, match="2 x 2"):
            model(tokens, grid)
