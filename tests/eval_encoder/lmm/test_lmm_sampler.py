"""The order under group_by_modality_length: every sample once, like with like, even batches."""

import numpy as np
import pytest
import torch

from eval_encoder.lmm.data.sampler import ModalityLengthSampler, modality_length_order

BATCH, BATCHES = 4, 6  # batches of a step
SIZE = BATCH * BATCHES
MIXES = [(200, 130), (SIZE * 3, SIZE * 2), (200, 0), (0, 130), (5, 3), (SIZE + 1, 1), (1, 0)]


def lengths_of(multimodal, text):
    g = np.random.default_rng(0)
    lengths = np.concatenate([g.integers(1, 300, multimodal), -g.integers(1, 900, text)])
    return g.permutation(lengths)


def mega_batches(lengths, seed=0, epoch=0):
    return modality_length_order(lengths, BATCH, BATCHES, seed, epoch)


def batches_of(mega_batch):
    return [mega_batch[start : start + BATCH] for start in range(0, len(mega_batch), BATCH)]


@pytest.mark.parametrize("multimodal, text", MIXES)
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_sample_comes_once(multimodal, text, epoch):
    sampler = ModalityLengthSampler(lengths_of(multimodal, text), BATCH, BATCHES, 7)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(multimodal + text))
    assert len(sampler) == len(order)
    assert all(type(index) is int for index in order)


@pytest.mark.parametrize("multimodal, text", MIXES)
def test_only_the_last_mega_batch_is_mixed_and_all_others_are_full(multimodal, text):
    lengths = lengths_of(multimodal, text)
    *full, last = mega_batches(lengths)
    for mega_batch in full:
        assert len(mega_batch) == SIZE
        assert len(np.unique(np.sign(lengths[mega_batch]))) == 1
    kinds = [multimodal, text]
    assert len(full) == sum(max(0, -(-count // SIZE) - 1) for count in kinds)
    assert last == sorted(last)
    assert {int(sign) for sign in np.sign(lengths[last])} == {
        sign for sign, count in zip((1, -1), kinds, strict=True) if count
    }


def test_batches_of_a_step_have_equal_counts_and_even_lengths():
    lengths = lengths_of(SIZE * 20, SIZE * 10)
    spreads, chance = [], []
    for mega_batch in mega_batches(lengths)[:-1]:
        batches = batches_of(mega_batch)
        assert [len(batch) for batch in batches] == [BATCH] * BATCHES
        sums = [np.abs(lengths[batch]).sum() for batch in batches]
        shuffled = np.random.default_rng(len(spreads)).permutation(mega_batch)
        spreads.append(np.ptp(sums) / np.mean(sums))
        chance.append(np.ptp(np.abs(lengths[shuffled]).reshape(BATCHES, BATCH).sum(1)))
        chance[-1] /= np.mean(sums)
    assert np.mean(spreads) < 0.25 * np.mean(chance)


def greedy_sums(lengths, batches):
    """The rule in its plainest words."""
    held = [[] for _ in range(batches)]
    for length in sorted(lengths, reverse=True):
        room = [batch for batch in held if len(batch) < len(lengths) // batches]
        min(room, key=sum).append(length)
    return [sum(batch) for batch in held]


def test_every_mega_batch_is_dealt_by_the_rule():
    lengths = lengths_of(200, 130)
    for mega_batch in mega_batches(lengths)[:-1]:
        sums = [int(np.abs(lengths[batch]).sum()) for batch in batches_of(mega_batch)]
        assert sums == greedy_sums(np.abs(lengths[mega_batch]).tolist(), BATCHES)


def test_order_depends_on_seed_and_epoch_only():
    lengths = lengths_of(200, 130)
    expected = mega_batches(lengths)
    torch.manual_seed(5)
    np.random.seed(5)
    assert mega_batches(lengths.tolist()) == expected
    assert mega_batches(lengths, seed=1) != expected
    assert mega_batches(lengths, epoch=1) != expected
    sampler = ModalityLengthSampler(lengths, BATCH, BATCHES, 0)
    first = list(sampler)
    assert first == list(sampler) == [index for piece in expected for index in piece]
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


@pytest.mark.parametrize("other", [dict(seed=1), dict(epoch=1)])
def test_both_draws_change_with_seed_and_epoch(other):
    lengths = lengths_of(SIZE * 20, SIZE * 20)
    one, two = mega_batches(lengths), mega_batches(lengths, **other)
    assert not {frozenset(piece) for piece in one} & {frozenset(piece) for piece in two}
    kinds = [[lengths[piece[0]] > 0 for piece in pieces[:-1]] for pieces in (one, two)]
    assert kinds[0] != kinds[1]


def test_mega_batches_of_both_kinds_are_shuffled_together():
    lengths = lengths_of(SIZE * 20, SIZE * 20)
    signs = [int(np.sign(lengths[piece[0]])) for piece in mega_batches(lengths)[:-1]]
    changes = sum(a != b for a, b in zip(signs, signs[1:], strict=False))
    assert changes > 8


def test_a_loader_takes_the_order():
    lengths = lengths_of(50, 30)
    sampler = ModalityLengthSampler(lengths, BATCH, BATCHES, 0)
    loader = torch.utils.data.DataLoader(range(80), batch_size=BATCH, sampler=sampler)
    assert torch.cat(list(loader)).tolist() == list(sampler)


def test_samples_of_no_kind_and_empty_batches_are_refused():
    with pytest.raises(ValueError, match=r"sample 2 has length 0 \(2 such samples\)"):
        ModalityLengthSampler([5, -3, 0, 2, 0], BATCH, BATCHES, 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        ModalityLengthSampler([5], 0, BATCHES, 0)
    with pytest.raises(ValueError, match="batches_per_step is -1"):
        ModalityLengthSampler([5], BATCH, -1, 0)
