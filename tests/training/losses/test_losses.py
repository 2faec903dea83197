"""Partial FC: golden vectors on one and two processes,
and a dense reference for everything else.
"""

import pytest
import torch
from forked import forked, forked_ranks

from data_pipeline.random import counter_normal, counter_uniform
from training.losses.margin import margin_losses
from training.losses.partial_fc import PartialFCConfig, class_range

SCRIPT = "tests/training/losses/partial_fc_ranks.py"


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_golden_vectors(shared, world_size):
    vectors = shared / "vectors" / f"partial_fc_world{world_size}.safetensors"
    done = forked_ranks(world_size, SCRIPT, "golden", vectors)
    assert done.stdout.count("golden ok") == 2 * world_size


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_equals_a_dense_reference_with_sampling_padding_and_odd_shards(world_size):
    done = forked_ranks(world_size, SCRIPT, "dense")
    assert done.stdout.count("dense ok") == world_size


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_ranks_may_have_any_number_of_samples_and_need_three_collectives(world_size):
    done = forked_ranks(world_size, SCRIPT, "uneven")
    assert done.stdout.count("uneven ok") == world_size


@pytest.mark.dist
def test_a_label_out_of_range_is_an_error_on_every_rank():
    done = forked_ranks(2, SCRIPT, "range")
    assert done.stdout.count("range ok") == 2


def brute_force(cosines, labels, negatives, scale, margin, threshold, mask):
    """Loss of every (row, label), term by term."""
    import math

    losses = torch.zeros(labels.shape, dtype=torch.float64)
    for i, row in enumerate(labels.tolist()):
        for j, label in enumerate(row):
            if label < 0:
                continue
            target = math.exp(scale * (float(cosines[i, j]) - margin))
            total = target + math.exp(float(negatives[i]))
            others = {c: float(cosines[i, k]) for k, c in enumerate(row) if c >= 0 and c != label}
            if not mask:
                total += sum(
                    math.exp(scale * (c if c <= threshold else 0)) for c in others.values()
                )
            losses[i, j] = math.log(total / target)
    return losses


@pytest.mark.parametrize("mask", [False, True])
def test_margin_losses_equal_a_loop(mask):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[3, 5, 5, -1], [1, 2, 3, 4], [7, -1, -1, -1]])
    cosines = torch.rand(3, 4, generator=generator) * 1.6 - 0.8
    cosines[0, 2] = cosines[0, 1]  # the same class twice
    negatives = torch.tensor([2.0, -torch.inf, 5.0])
    got = margin_losses(cosines, labels, negatives, 8.0, 0.3, 0.5, mask)
    want = brute_force(cosines, labels, negatives, 8.0, 0.3, 0.5, mask)
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_counter_draws_depend_on_their_counters_only():
    ids = torch.arange(1000)
    whole = counter_uniform(ids, 1, "negatives", 7)
    assert torch.equal(whole[400:500], counter_uniform(ids[400:500], 1, "negatives", 7))
    assert not torch.equal(whole, counter_uniform(ids, 1, "negatives", 8))
    assert (
        abs(float(whole.mean()) - 0.5) < 0.03 and 0 <= float(whole.min()) and float(whole.max()) < 1
    )
    normal = counter_normal(ids, 64, 0, "centers")
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.std()) - 1) < 0.02
    assert torch.equal(normal[10:12], counter_normal(ids[10:12], 64, 0, "centers"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_class_ranges_partition_all_classes(world_size):
    for num_classes in (1, 5, 10, 101):
        ranges = [class_range(num_classes, rank, world_size) for rank in range(world_size)]
        assert [c for start, stop in ranges for c in range(start, stop)] == list(range(num_classes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_rate": 0.0}, "--list_sample_rates 0.0"),
        ({"margin": float("nan")}, "--list_margins nan"),
        ({"filter_threshold": -0.1}, "--list_filters"),
        ({"scale": float("nan")}, "scale nan"),
        ({"init_std": 0.0}, "init_std 0.0"),
        ({"label_reduction": "max"}, "choose one of"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        PartialFCConfig(**changes)


def test_single_process_needs_no_launcher():
    assert "dense ok" in forked(SCRIPT, "dense").stdout


@pytest.mark.parametrize("gap", [6.0, 12.0, 15.0, 30.0])
def test_losses_of_well_fitted_rows_keep_their_digits_at_full_scale(gap):
    """A row whose logit stands `gap` above its rivals: loss and gradient against fp64."""
    got, want = [], []
    for dtype, results in ((torch.float32, got), (torch.float64, want)):
        cosine = torch.full((1, 1), 0.3 + gap / 64, dtype=dtype, requires_grad=True)
        rivals = torch.zeros(1, dtype=dtype)
        loss = margin_losses(cosine, torch.zeros(1, 1, dtype=torch.int64), rivals, 64.0, 0.3, 1.0)
        (gradient,) = torch.autograd.grad(loss.sum(), cosine)
        results += [loss.item(), gradient.item()]
    assert got == pytest.approx(want, rel=1e-4)


@pytest.fixture
def alone():
    """A group of one."""
    from training.distributed import process_group

    with process_group() as ranks:
        yield ranks


def test_a_label_out_of_range_poisons_the_gradient_where_reading_it_would_wait(alone, monkeypatch):
    from training.losses.partial_fc import PartialFC

    head = PartialFC(10, 8, PartialFCConfig(), alone)
    monkeypatch.setattr(PartialFC, "check_labels", lambda self: None)  # as on a GPU
    for label in (10, -2, 2**31 + 3, 2**32 + 3):
        rows = torch.randn(2, 8, requires_grad=True)
        head(rows, torch.tensor([[1], [label]]), torch.ones(2), 0).objective.backward()
        assert rows.grad.isnan().any(), label
    monkeypatch.undo()
    with pytest.raises(ValueError, match="out of range"):
        head.check_labels()


def test_what_stands_in_a_row_without_weight_changes_nothing(alone):
    from training.losses.partial_fc import PartialFC

    head = PartialFC(10, 8, PartialFCConfig(sample_rate=1.0), alone)
    labels, weights = torch.tensor([[1], [2], [3]]), torch.tensor([1.0, 0.0, 1.0])
    found = []
    for filling in (0.5, torch.nan):
        rows = torch.randn(3, 8, generator=torch.manual_seed(0))
        rows[1] = filling
        rows.requires_grad_()
        head.zero_grad()
        loss = head(rows, labels, weights, 0).objective
        loss.backward()
        found.append((loss.item(), rows.grad, head.centers.grad.to_dense().clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1]) and not found[0][1][1].any()
    assert torch.equal(found[0][2], found[1][2])


def test_a_row_without_labels_takes_no_part_in_the_mean(alone):
    from training.losses.partial_fc import PartialFC

    head = PartialFC(10, 8, PartialFCConfig(sample_rate=1.0), alone)
    rows, labels = torch.randn(3, 8), torch.tensor([[1, 4], [-1, -1], [3, -1]])
    with_it = head(rows, labels, torch.ones(3), 0)
    without = head(rows[[0, 2]], labels[[0, 2]], torch.ones(2), 0)
    assert with_it.objective.item() == pytest.approx(without.objective.item())
    assert with_it.reported.item() == pytest.approx(without.reported.item())


def test_starting_centres_are_checked_and_crowded_ones_are_seen(alone):
    from training.losses.partial_fc import PartialFC

    head = PartialFC(10, 8, PartialFCConfig(), alone)
    centers = torch.randn(10, 8, generator=torch.manual_seed(1))
    for bad in (0.0, torch.nan):
        spoilt = centers.clone()
        spoilt[4] = bad
        with pytest.raises(ValueError, match="first is of class 4"):
            head.load_centers(spoilt)
    head.load_centers(centers)
    assert head.crowding() < 0.1 and torch.equal(head.whole_centers(), centers)
    head.load_centers(centers * 0.01 + 1.0)
    assert head.crowding() == 1.0
    other = PartialFC(10, 8, PartialFCConfig(), alone, name="another")
    assert not torch.equal(other.centers, PartialFC(10, 8, PartialFCConfig(), alone).centers)
