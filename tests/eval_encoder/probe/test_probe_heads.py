"""Heads and figures: a bank computes the function that one head defines, and evaluations agree with
their definitions.
"""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_probe_lists import clip_list

from eval_encoder.intervals import seed_half_width
from eval_encoder.probe.bank import HeadBank, HeadSetting
from eval_encoder.probe.benchmarks import hold_out
from eval_encoder.probe.config import build_config, build_parser
from eval_encoder.probe.metrics import (
    Evaluation,
    EvaluationBuilder,
    average_precision,
)
from eval_encoder.probe.record import summarise
from eval_encoder.probe.trainer import (
    EpochFigures,
    HeadBatch,
    History,
    NonFiniteProbe,
    ProbeTrainer,
    _chunks,
    _losses,
    _mean_over_crops,
)
from training.distributed import process_group

SETTINGS = [HeadSetting(1e-3, 0.0, 0), HeadSetting(1e-2, 0.0, 0), HeadSetting(1e-3, 0.0, 1)]


def bank_of(kind="attentive", width=192, classes=5):
    bank = HeadBank(kind, width, classes, SETTINGS)
    for parameter in bank.parameters():  # the classifier starts almost at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return bank


@pytest.mark.parametrize("lengths", [(12, 12), (12, 30, 1)])
def test_a_bank_computes_every_head_as_defined_with_its_gradients(lengths):
    torch.manual_seed(0)
    bank, tokens = bank_of().double(), torch.randn(sum(lengths), 192, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    together = bank(list(tokens.split(lengths)))
    for number, head in enumerate(bank.heads):
        alone = head(tokens, bounds, max(lengths))
        torch.testing.assert_close(together[number], alone, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(together)
    got = torch.autograd.grad((together * weights).sum(), list(bank.parameters()))
    parts = [h(tokens, bounds, max(lengths)) for h in bank.heads]
    wanted = torch.autograd.grad((torch.stack(parts) * weights).sum(), list(bank.parameters()))
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


def test_heads_of_one_seed_start_alike_and_of_another_do_not():
    bank = HeadBank("attentive", 64, 5, SETTINGS)
    first, second, other = (list(head.parameters()) for head in bank.heads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


class StoredFeatures:
    """Features of clips that need no encoder: class k has its mean at unit vector k."""

    def __init__(self, clips, width=64):
        rng = np.random.default_rng(len(clips))
        self.clips, self.unreadable = clips, {}
        rows = rng.normal(scale=0.5, size=(len(clips), 4, width)).astype(np.float32)
        rows[np.arange(len(clips)), :, clips.labels] += 9
        self._rows = torch.from_numpy(rows).half().float()  # as stored features are

    def drawn_looks(self, indices, epoch):
        return list(indices)

    crops = staticmethod(list)

    def batches(self, batches):
        for batch in batches:
            yield [clip_look(i) for i in batch], [self._rows[i] for i in batch]


def clip_look(index):
    from eval_encoder.clip_views import Look

    return Look(int(index))


def trainer(*flags):
    config = build_config(build_parser().parse_args(list(flags)))
    labels = np.arange(40) % 4
    lists = [clip_list(labels, 4, split) for split in ("train", "val")]
    return config, [StoredFeatures(clips) for clips in lists]


def probe_of(*flags):
    """A finished trainer on 40 clips; classes overlap, so that no head is always right."""
    config, lists = trainer("--batch_size", "8", "--default_epoch", "3", *flags)
    for features in lists:
        features._rows[:, :, :4] *= 0.1
        if config.heads.kind == "linear":
            features._rows = features._rows[:, :1]  # pooled
    with process_group() as ranks:
        probe = ProbeTrainer(config, 64, *lists, ranks, logging.getLogger("t"))
        probe.run()
    return probe


@pytest.mark.parametrize("kind", ["attentive", "linear"])
def test_seeds_differ_are_drawn_again_alike_and_leave_the_first_one_as_it_is(kind):
    flags = ("--head", kind, "--default_lr_list", "1e-2")
    several, again = (probe_of(*flags, "--num_seeds", "3") for _ in range(2))
    alone = probe_of(*flags)
    weights = [head.classifier.weight.detach() for head in several.bank.heads]
    for one in range(3):
        assert torch.equal(weights[one], again.bank.heads[one].classifier.weight), "same seeds"
        for other in range(one):
            # far beyond the linear head's initial weights (std 2e-5), which are no seed to speak of
            assert (weights[one] - weights[other]).abs().max() > 1e-3
    # a bank is one matrix product: beside other heads, the first one has other last bits
    torch.testing.assert_close(weights[0], alone.bank.heads[0].classifier.weight, rtol=0, atol=1e-4)
    losses = np.array([epoch.loss for epoch in several.history.epochs])
    alone_losses = np.array([epoch.loss for epoch in alone.history.epochs])
    assert losses.shape == (3, 3) and len(set(losses[-1])) == 3
    np.testing.assert_allclose(losses[:, 0], alone_losses[:, 0], atol=1e-3)
    second = probe_of(*flags, "--seed", "2")
    same = torch.allclose(second.bank.heads[0].classifier.weight, weights[1], atol=1e-4)
    assert same == (kind == "linear"), "a linear head's seed decides all that it sees"


def test_every_seed_of_a_linear_head_sees_every_clip_once_an_epoch():
    config, (train, val) = trainer("--head", "linear", "--num_seeds", "2", "--batch_size", "8")
    keep = np.arange(3, 37)
    with process_group() as ranks:
        probe = ProbeTrainer(config, 64, train, val, ranks, logging.getLogger("t"))
        steps = list(probe._head_batches(1, keep, 8))
    seen = [[clip for batches in steps for clip in batches[seed].clips] for seed in range(2)]
    assert len(steps) == 5 and sorted(seen[0]) == sorted(seen[1]) == keep.tolist()
    assert seen[0] != seen[1]


def test_every_head_is_trained_at_its_own_rate_and_weight_decay():
    flags = ("--default_lr_list", "1e-2", "1e-4", "--default_weight_decay", "0", "0.5")
    config, (train, val) = trainer(*flags)
    with process_group() as ranks:
        probe = ProbeTrainer(config, 64, train, val, ranks, logging.getLogger("t"))
    settings = {(1e-2, 0.0), (1e-2, 0.5), (1e-4, 0.0), (1e-4, 0.5)}
    assert {(s.lr, s.weight_decay) for s in probe.bank.settings} == settings
    groups = zip(probe._optimizer.param_groups, probe.bank.heads, probe.bank.settings, strict=True)
    for group, head, setting in groups:
        assert (group["peak"], group["weight_decay"]) == (setting.lr, setting.weight_decay)
        own = {id(parameter) for parameter in head.parameters()}
        assert {id(parameter) for parameter in group["params"]} == own


def test_rates_fall_from_their_peak_to_the_least_over_all_steps():
    flags = ("--default_lr_list", "1e-2", "1e-4", "--default_min_lr", "1e-5")
    config, (train, val) = trainer(*flags, "--batch_size", "8", "--default_epoch", "2")
    rates = []
    with process_group() as ranks:
        probe = ProbeTrainer(config, 64, train, val, ranks, logging.getLogger("t"))
        probe._optimizer.register_step_post_hook(
            lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
        )
        probe.run()
    steps = len(rates)
    assert steps == 2 * -(-len(hold_out(train.clips, config.heads.holdout)[0]) // 8)
    for head, peak in enumerate((1e-2, 1e-4)):
        wanted = [peak + (1e-5 - peak) * step / steps for step in range(steps)]
        np.testing.assert_allclose([rate[head] for rate in rates], wanted)


def test_the_gradient_of_a_step_is_the_mean_over_the_clips_of_all_ranks(monkeypatch):
    config, (train, val) = trainer("--default_lr_list", "1e-3", "--clip_grad", "1e9")
    grads = []
    for others in (1, 3):  # as if so many ranks had as many clips each
        with process_group() as ranks:
            probe = ProbeTrainer(config, 64, train, val, ranks, logging.getLogger("t"))
            batch = HeadBatch([0], [3, 8], [train._rows[3], train._rows[8]])
            monkeypatch.setattr("torch.distributed.all_reduce", lambda x, n=others: x.mul_(n))
            probe._step([batch], progress=0.0)
            monkeypatch.undo()
        grads.append(probe.bank.heads[0].classifier.weight.grad.clone())
    torch.testing.assert_close(grads[0], 3 * grads[1])


def test_every_epoch_and_seed_has_an_order_of_its_own_over_the_same_clips():
    clips = np.arange(20) * 3
    drawn = {(seed, epoch): _chunks(seed, epoch, clips, 8) for seed in (0, 1) for epoch in (1, 2)}
    for chunks in drawn.values():
        assert [len(chunk) for chunk in chunks] == [8, 8, 4]
        assert sorted(np.concatenate(chunks)) == clips.tolist()
    assert len({tuple(np.concatenate(chunks)) for chunks in drawn.values()}) == 4


def test_a_clips_scores_are_the_mean_over_its_crops():
    scores = torch.arange(12.0).view(2, 3, 2)
    clips, found = _mean_over_crops([7, 4, 7], scores)
    assert clips == [7, 4]
    assert found.tolist() == [[[2, 3], [2, 3]], [[8, 9], [8, 9]]]


def test_losses_are_those_of_every_head_alone():
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 5, 4, generator=draw), torch.tensor([0, 3, 1, 1, 2])
    wanted = [
        F.cross_entropy(head, labels, label_smoothing=0.1, reduction="sum") for head in logits
    ]
    torch.testing.assert_close(_losses(logits, labels, 0.1), torch.stack(wanted))
    several = torch.randint(0, 2, (5, 4), generator=draw)
    wanted = [
        F.binary_cross_entropy_with_logits(head, several.float()) * len(several) for head in logits
    ]
    torch.testing.assert_close(_losses(logits, several, 0.1), torch.stack(wanted))


def test_seeds_that_can_decide_nothing_have_no_interval(caplog):
    caplog.set_level(logging.WARNING, "t")
    flags = ("--head", "linear", "--num_seeds", "3", "--batch_size", "64")
    probe = probe_of(*flags)
    record = summarise(probe._config, probe.history, {"train": 40, "val": 40})
    assert record["last_epoch"]["ci95_seeds"] is None
    assert "--num_seeds 3 does nothing" in caplog.text and "--batch_size 64" in caplog.text


def test_the_setting_is_chosen_on_held_out_clips_and_every_figure_is_reported():
    flags = ("--default_lr_list", "1e-9", "1e-2", "--num_seeds", "3", "--default_epoch", "4")
    config, (train, val) = trainer(*flags, "--batch_size", "8")
    with process_group() as ranks:
        history = ProbeTrainer(config, 64, train, val, ranks, logging.getLogger("t")).run()
    record = summarise(config, history, {"train": 40, "val": 40})
    assert record["chosen"]["lr"] == 1e-2 and record["last_epoch"]["top1"] == 100
    assert len(record["last_epoch"]["seeds"]) == 3 and record["last_epoch"]["ci95_seeds"] == 0
    assert record["best_epoch"]["top1"] == 100 and record["best_epoch_on_validation"]["lr"] == 1e-2
    assert len(record["grid"]) == 6 and record["per_class"] == [100.0] * 4


def test_held_out_clips_choose_even_against_the_validation_list():
    labels, judged = np.arange(10) % 5, np.ones(10, bool)
    place = np.ones((2, 10), np.int32)
    place[1, :5] = 3
    last = Evaluation(labels, judged, place, np.tile(labels, (2, 1)), 6)
    figures = EpochFigures(
        1, main=last.main(), top5=last.top5(), held=np.array([40.0, 90.0]), loss=np.zeros(2)
    )
    settings = [HeadSetting(1e-3, 0.0, 1), HeadSetting(1e-2, 0.0, 1)]
    history = History(settings, [figures], last=last)
    record = summarise(trainer()[0], history, {"train": 9, "val": 10})
    assert record["chosen"] == {"lr": 1e-2, "weight_decay": 0.0, "held_out": 90.0}
    assert record["last_epoch"]["top1"] == 50 and record["last_epoch"]["top5"] == 100
    assert record["best_epoch_on_validation"]["top1"] == 100


def test_a_head_that_diverges_is_left_out_and_all_of_them_are_an_error():
    config, (train, val) = trainer("--default_lr_list", "1e-3", "1e-2", "--default_epoch", "2")
    with process_group() as ranks:
        probe = ProbeTrainer(config, 64, train, val, ranks, logging.getLogger("t"))
        with torch.no_grad():
            probe.bank.heads[1].classifier.weight.fill_(torch.nan)
        history = probe.run()
        record = summarise(config, history, {"train": 40, "val": 40})
        assert history.diverged == {1} and record["chosen"]["lr"] == 1e-3
        assert [row["astray"] for row in record["grid"]] == [False, True]
        history.settings[1] = history.settings[0]  # as if of another seed
        record = summarise(config, history, {"train": 40, "val": 40})
        assert len(record["last_epoch"]["seeds"]) == 1, "sound heads alone"
        probe = ProbeTrainer(config, 64, train, val, ranks, logging.getLogger("t"))
        with torch.no_grad():
            for head in probe.bank.heads:
                head.classifier.weight.fill_(torch.nan)
        with pytest.raises(NonFiniteProbe, match="default_lr_list"):
            probe.run()


def test_evaluations_count_ranks_as_sorting_does():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 30)
    scores = torch.from_numpy(rng.integers(0, 5, (2, 30, 7)).astype(np.float32))  # with ties
    builder = EvaluationBuilder(labels, np.arange(30), 2, 7)
    for rows in np.array_split(rng.permutation(30), 4):
        builder.add(rows.tolist(), scores[:, rows])
    judged = builder.evaluation()
    order = np.argsort(-scores.numpy(), axis=-1, kind="stable")
    wanted = 1 + np.argmax(order == labels[None, :, None], axis=-1)
    assert np.array_equal(judged.true_rank, wanted)
    assert np.array_equal(judged.predicted, scores.argmax(-1))
    assert np.array_equal(judged.main(), 100 * (judged.predicted == labels).mean(axis=1))
    confusion = judged.confusion([0, 1])
    assert confusion.sum() == 60 and np.trace(confusion) == (judged.predicted == labels).sum()
    lost = EvaluationBuilder(labels, np.arange(30), 1, 7)
    lost.add(list(range(30)), torch.full((1, 30, 7), torch.nan))
    assert lost.evaluation().main()[0] == 0, "no number is no right answer"
    some = replace(judged, evaluated=np.arange(30) < 20)
    assert some.top(7).tolist() == [100, 100] and some.confusion([0]).sum() == 20


def test_a_gathered_evaluation_holds_the_clips_of_all_ranks(monkeypatch):
    labels, scores = np.array([0, 1, 2, 1]), torch.eye(3)[[0, 0, 2, 1]][None]
    ours, theirs = (EvaluationBuilder(labels, np.arange(4), 1, 3) for _ in range(2))
    ours.add([0, 2], scores[:, [0, 2]])
    theirs.add([1, 3], scores[:, [1, 3]])
    monkeypatch.setattr("torch.distributed.all_reduce", lambda found: found.add_(theirs._results))
    judged = ours.gather()
    assert judged.evaluated.all() and judged.predicted.tolist() == [[0, 0, 2, 1]]
    assert judged.main().tolist() == [75]


def test_clips_that_could_not_be_read_are_in_no_figure():
    """Four clips, of which the second was not read: its places are zeros, as nobody filled them."""
    judged = Evaluation(
        labels=np.array([0, 1, 1, 2]),
        evaluated=np.array([True, False, True, True]),
        true_rank=np.array([[1, 0, 2, 1]]),
        predicted=np.array([[0, 0, 0, 2]]),
        num_classes=4,
    )
    assert judged.main().tolist() == pytest.approx([100 * 2 / 3])
    assert judged.top(2).tolist() == [100]
    assert judged.per_class([0]) == [100.0, 0.0, 100.0, None]
    # rows are true classes, columns what was said
    assert np.argwhere(judged.confusion([0])).tolist() == [[0, 0], [1, 0], [2, 2]]


def test_average_precision_is_the_mean_precision_at_the_positives():
    scores = np.array([[0.9, 0.1], [0.8, 0.9], [0.7, 0.2], [0.6, 0.3]])
    labels = np.array([[1, 0], [0, 0], [1, 0], [0, 1]], np.uint8)
    # class 0: positives at places 1 and 3 -> (1/1 + 2/3) / 2; class 1: at place 2 -> 1/2
    assert average_precision(scores, labels).tolist() == pytest.approx([100 * 5 / 6, 50])
    assert len(average_precision(scores, labels * [1, 0])) == 1
    # equal scores are one group, whatever their order in the list: half of four are positive
    assert average_precision(np.zeros((4, 1)), np.array([[1], [1], [0], [0]])) == 50


def test_intervals_follow_their_formulas():
    assert seed_half_width([70.0]) is None
    assert seed_half_width([70.0, 72.0]) == pytest.approx(12.706 * 2**0.5 / 2**0.5)
    assert seed_half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)
    labels = np.zeros(100, np.int64)
    place = np.where(np.arange(100) < 80, 1, 2)[None].astype(np.int32)
    judged = Evaluation(labels, np.ones(100, bool), place, place - 1, 2)
    assert judged.top5() is None
    assert judged.clip_interval([0]) == pytest.approx(1.96 * 100 * (0.8 * 0.2 / 100) ** 0.5)
