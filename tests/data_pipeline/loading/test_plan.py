"""The plan: exact, elastic and resumable for any size, any ranks, samples or packs."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataPipelineError
from data_pipeline.loading.plan import EpochPlan, SampleOrder, batches_from, first_fit

BUDGET = 100


def tokens_of(ids: np.ndarray, stages: np.ndarray, epoch: int) -> np.ndarray:
    """Between 5 and 64 tokens, other ones in another epoch or stage."""
    return 5 + (ids * 7919 + epoch * 31 + stages * 13) % 60


def make(sizes, units, packs=False, seed=0, window=3, stages=(0,), absent=()) -> EpochPlan:
    order = SampleOrder(np.array(sizes), seed, window, absent)
    return EpochPlan(order, units, tokens_of, BUDGET if packs else None, stages)


def epoch_batches(plan: EpochPlan, epoch: int) -> list:
    batches = []
    while (batch := plan.batch(epoch, len(batches))) is not None:
        batches.append(batch)
    return batches


plans = {
    "sizes": st.lists(st.integers(1, 40), min_size=1, max_size=12),
    "ranks": st.integers(1, 6),
    "per_rank": st.integers(1, 4),
    "seed": st.integers(0, 2**31),
    "epoch": st.integers(0, 3),
    "packs": st.booleans(),
}


def fitting(sizes, units, packs, seed=0) -> EpochPlan | None:
    try:
        return make(sizes, units, packs, seed)
    except DataPipelineError:
        return None


@given(**plans)
@settings(max_examples=150, deadline=None)
def test_every_epoch_holds_every_sample_once_and_every_rank_has_as_many_units(
    sizes, ranks, per_rank, seed, epoch, packs
):
    plan = fitting(sizes, ranks * per_rank, packs, seed)
    if plan is None:
        return
    seen = Counter()
    for batch in epoch_batches(plan, epoch):
        shares = [batch.share(rank, ranks) for rank in range(ranks)]
        assert all(len(share.unit_sizes) == per_rank for share in shares)
        assert all(len(share.sample_ids) >= per_rank for share in shares), "an empty rank"
        assert {share.rows for share in shares} == {max(len(s.sample_ids) for s in shares)}
        for name in ("sample_ids", "weights", "stages"):
            joined = np.concatenate([getattr(share, name) for share in shares])
            assert np.array_equal(joined, getattr(batch, name))
        seen.update(batch.sample_ids[batch.weights > 0].tolist())
    assert seen == Counter(range(sum(sizes)))


@given(**plans)
@settings(max_examples=60, deadline=None)
def test_the_global_batch_is_the_same_for_every_world_size(
    sizes, ranks, per_rank, seed, epoch, packs
):
    plan = fitting(sizes, 12, packs, seed)
    if plan is None:
        return
    for batch in epoch_batches(plan, epoch)[:3]:
        for world in (1, 2, 3, 4, 6, 12):
            parts = [batch.share(rank, world).sample_ids for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), batch.sample_ids)


@given(**plans)
@settings(max_examples=60, deadline=None)
def test_a_fresh_plan_started_anywhere_goes_on_alike(sizes, ranks, per_rank, seed, epoch, packs):
    plan = fitting(sizes, ranks * per_rank, packs, seed)
    if plan is None:
        return
    straight = epoch_batches(plan, epoch) + epoch_batches(plan, epoch + 1)
    for start in {0, len(epoch_batches(plan, epoch)) // 2, len(epoch_batches(plan, epoch))}:
        fresh = batches_from(make(sizes, ranks * per_rank, packs, seed), epoch, start)
        for want in straight[start : start + 3]:
            batch = next(fresh)
            assert (batch.epoch, batch.index) == (want.epoch, want.index)
            assert np.array_equal(batch.sample_ids, want.sample_ids)
            assert np.array_equal(batch.weights, want.weights)


@given(
    lengths=st.lists(st.integers(1, 50), max_size=200),
    budget=st.integers(50, 120),
    look_ahead=st.integers(1, 20),
)
def test_packs_hold_every_item_once_and_never_more_than_the_budget(lengths, budget, look_ahead):
    packs = first_fit(lengths, budget, look_ahead)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(pack for pack in packs)
    assert all(sum(lengths[item] for item in pack) <= budget for pack in packs)


def test_packs_of_mixed_lengths_are_nearly_full_and_nothing_waits_long():
    lengths = np.random.default_rng(0).choice([64, 196, 256, 1024, 1568, 2048], 5000).tolist()
    packs = first_fit(lengths, 16384)
    fill = sum(lengths) / (16384 * len(packs))
    assert fill > 0.98, fill
    late = [min(pack) for pack in packs]
    assert all(later > earlier - 200 for earlier, later in zip(late, late[1:], strict=False))


def test_only_a_window_of_shards_is_read_at_a_time():
    plan = make([50] * 20, 10, window=4)
    ids = np.concatenate([batch.sample_ids for batch in epoch_batches(plan, 2)])
    for start in range(0, 1000, 200):
        shards = np.unique(ids[start : start + 200] // 50)
        assert len(shards) == 4
    assert len(np.unique(ids[:40] // 50)) == 4, "samples of a window's shards are mixed"
    again = np.concatenate([batch.sample_ids for batch in epoch_batches(plan, 3)])
    assert set(np.unique(again[:200] // 50)) != set(np.unique(ids[:200] // 50))


def test_seeds_and_epochs_have_different_orders():
    first = make([50], 10, seed=1)
    assert not np.array_equal(first.batch(0, 0).sample_ids, first.batch(1, 0).sample_ids)
    assert not np.array_equal(
        first.batch(0, 0).sample_ids, make([50], 10, seed=2).batch(0, 0).sample_ids
    )


def test_the_tail_is_filled_with_the_epochs_first_units_at_weight_zero():
    plan = make([10, 13], 5)
    *_, last = epoch_batches(plan, 0)
    assert last.weights.tolist() == [1, 1, 1, 0, 0]
    assert np.array_equal(last.sample_ids[3:], plan.batch(0, 0).sample_ids[:2])
    packs = make([40], 4, packs=True)
    *_, last = epoch_batches(packs, 0)
    first_pack = packs.batch(0, 0).sample_ids[: packs.batch(0, 0).unit_sizes[0]]
    padded = last.sample_ids[last.weights == 0]
    assert len(padded) == 0 or np.array_equal(padded[: len(first_pack)], first_pack)


@pytest.mark.parametrize("packs", [False, True])
def test_a_dataset_smaller_than_one_global_batch_is_refused(packs):
    with pytest.raises(DataPipelineError, match="7 samples|packs of 100 tokens"):
        make([7], 8, packs)


def test_missing_shards_leave_the_ids_of_the_others_as_they_are():
    plan = make([10, 10, 10], 5, absent={1})
    ids = np.concatenate([batch.sample_ids for batch in epoch_batches(plan, 0)])
    assert sorted(ids) == [*range(10), *range(20, 30)]


def test_stages_begin_after_their_number_of_samples():
    plan = make([10] * 4, 5, stages=(0, 20, 60), window=1)
    stages = np.concatenate([b.stages for epoch in (0, 1) for b in epoch_batches(plan, epoch)])
    assert stages.tolist() == [0] * 20 + [1] * 40 + [2] * 20
    packs = make([10] * 4, 2, packs=True, stages=(0, 20, 60), window=1)
    for epoch, windows in ((0, [0, 0, 1, 1]), (1, [1, 1, 2, 2])):
        order = [packs.order.window(epoch, w) for w in range(4)]
        where = {int(i): w for w, ids in enumerate(order) for i in ids}
        for batch in epoch_batches(packs, epoch):
            expected = [windows[where[int(i)]] for i in batch.sample_ids]
            assert batch.stages.tolist() == expected


def test_reserves_depend_on_epoch_and_sample_and_spread_over_the_dataset():
    plan = make([100] * 5, 10)
    chosen = [plan.reserve(0, sample, 0) for sample in range(300)]
    assert chosen == [plan.reserve(0, sample, 0) for sample in range(300)]
    assert len(set(chosen)) > 150 and max(chosen) > 400 and min(chosen) < 100
    assert [plan.reserve(1, sample, 0) for sample in range(300)] != chosen
    assert [plan.reserve(0, sample, 1) for sample in range(300)] != chosen


def test_reserves_of_neighbouring_samples_do_not_follow_each_other():
    """Bad samples lie side by side (a damaged shard): they must not all try the same few."""
    plan = make([1000], 10)
    tried = [[plan.reserve(0, sample, attempt) for attempt in range(3)] for sample in range(100)]
    shared = sum(one[1:] == two[:2] for one, two in zip(tried, tried[1:], strict=False))
    assert shared == 0


def test_a_plan_of_a_hundred_million_samples_keeps_next_to_nothing():
    sizes = np.full(100_000, 1000)
    tracemalloc.start()
    plan = EpochPlan(SampleOrder(sizes, 0, 16), 4096)
    batch = plan.batch(3, 20_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(batch.sample_ids)) == 4096 and batch.sample_ids.max() < 100_000_000
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"
