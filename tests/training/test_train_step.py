"""One optimizer step by itself, on a tiny encoder: its gradient, and what counts as work."""

import logging
from dataclasses import replace

import pytest
import torch

from data_pipeline.loading.packing import PackedBatch, joined_inputs, pack_views
from data_pipeline.loading.views import View
from model_factory.registry import packing_config
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel
from training.config.schema import HeadConfig, TrainConfig
from training.data import DataCounts, _totals
from training.distributed import process_group
from training.losses.partial_fc import PartialFC, PartialFCConfig
from training.optimizer import OptimizerConfig, ScheduleConfig
from training.parallel import ParallelConfig, ParallelEncoder
from training.record.speed import StepClock
from training.train_step import TrainStep

WIDTH, CLASSES, TOKENS = 64, 40, 6
WEIGHTS = {"a": 1.0, "b": 0.25, "c": 2.0}
LOSS = PartialFCConfig(sample_rate=0.4, scale=8.0)


def batch(seed: int, room: int = TOKENS) -> PackedBatch:
    """Two items of four and two tokens, and filling up to `room`."""
    draw = torch.Generator().manual_seed(seed)
    views = []
    for length in (4, 2):
        pixels = torch.randint(0, 256, (length, 3, 2, 2), generator=draw, dtype=torch.uint8)
        places = torch.randint(0, 8, (length, 3), generator=draw)
        views.append(View((pixels,), places, (1, 1, length)))
    labels = torch.randint(0, CLASSES, (2, 1), generator=draw)
    ids = torch.tensor([2 * seed, 2 * seed + 1])
    return pack_views(views, ids, labels=labels, weights=torch.ones(2), token_budget=room)


class Given:
    """Hands out batches in their order, where a run has TrainingData; and is its empty ledger."""

    def __init__(self, batches: list[dict[str, PackedBatch]]):
        self._batches = iter(batches)

    def next_batches(self, loader, clock, wishes):
        return next(self._batches), DataCounts()

    def prefetch(self, loader, clock, wishes):
        pass

    def record(self, step, batches):
        pass


class Recorder(torch.optim.SGD):
    """Keeps the gradients of a step, and changes nothing."""

    def step(self, closure=None):
        self.seen = [p.grad.to_dense().clone() for g in self.param_groups for p in g["params"]]


class Step:
    """A TrainStep of one rank over heads, and what it is made of."""

    def __init__(self, ranks, names: str, accumulate: int = 1, room: int = 0):
        heads = tuple(HeadConfig(dataset=n, loss=LOSS, loss_weight=WEIGHTS[n]) for n in names)
        self.config = TrainConfig(
            heads=heads,
            grad_accum_steps=accumulate,
            parallel=ParallelConfig(forward_tokens=room),
            optimizer=OptimizerConfig(clip_norm=0.0),
            schedule=ScheduleConfig(total_samples=100),
        )
        torch.manual_seed(0)
        fields = dict(patch_size=2, hidden_size=WIDTH, num_attention_heads=2, num_hidden_layers=1)
        encoder = LlavaViTPackingModel(packing_config("hf_llava_vit_packing_tiny_ln", **fields))
        self.encoder = ParallelEncoder(encoder, self.config.parallel, ranks)
        self.heads = {n: PartialFC(CLASSES, WIDTH, LOSS, ranks, seed=1, name=n) for n in names}
        modules = [encoder, *self.heads.values()]
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = Recorder([{"params": self.parameters, "lr_scale": 1.0}], lr=0.1)
        self._ranks = ranks

    def run(self, step: int, batches: list[dict[str, PackedBatch]]):
        given, log = Given(batches), logging.getLogger("t")
        clock = StepClock(self._ranks.device)
        made = TrainStep(
            self.config, self.encoder, self.heads, self.optimizer, given, self._ranks, clock, log
        )
        return made.run(step, total_steps=10, loader=None, ledger=given, wishes=lambda: (0, 0))


@pytest.fixture(scope="module")
def alone():
    """A group of one."""
    with process_group() as ranks:
        yield ranks


def test_a_step_is_the_mean_over_micro_steps_of_the_weighted_sum_over_heads(alone):
    """Each micro step draws negatives of its own: number step * accumulation + micro."""
    step, batches = Step(alone, "ab", accumulate=3), []
    for micro in range(3):
        batches.append({"a": batch(2 * micro), "b": batch(2 * micro + 1)})
    result = step.run(4, batches)
    for parameter in step.parameters:
        parameter.grad = None
    reported = dict.fromkeys("ab", 0.0)
    for micro, heads in enumerate(batches):
        for name, pack in heads.items():
            pooled = step.encoder(**joined_inputs([pack]))
            loss = step.heads[name](pooled, pack.labels, pack.weights, 4 * 3 + micro)
            (WEIGHTS[name] * loss.objective / 3).backward()
            reported[name] += loss.reported.item() / 3
    wanted = [parameter.grad.to_dense() for parameter in step.parameters]
    for one, two in zip(step.optimizer.seen, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    norm = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    assert result.values["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    for name, loss in reported.items():
        assert result.values[f"loss/{name}"].item() == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("room", "sizes"), [(0, [6, 6, 6]), (12, [12, 6]), (18, [18])])
def test_heads_share_a_forward_pass_while_their_packs_fit(alone, room, sizes):
    step, seen = Step(alone, "abc", room=room), []
    step.encoder.module.patch_embed.register_forward_hook(
        lambda module, rows, out: seen.append(len(out))
    )
    step.run(0, [{"a": batch(0), "b": batch(1), "c": batch(2)}])
    assert seen == sizes


def test_gradients_travel_between_ranks_after_the_last_micro_step_alone(alone):
    encoder = Step(alone, "a").encoder
    for last in (False, True, False):
        with encoder.accumulation(last):
            assert encoder._forward.require_backward_grad_sync == last


def test_only_samples_and_their_tokens_count_as_work():
    """Of a pack of ten tokens, four of them filling, one sample is the padding of an epoch."""
    pack = batch(0, room=10)
    weights = torch.tensor([1.0, 0.0, 0.0])
    padded = replace(pack, weights=weights, labels=torch.tensor([[3], [5], [-1]]))
    assert len(pack.cu_seqlens) == 4
    assert _totals({"a": padded}) == [1, 6, 4**2 + 2**2, 10]
    assert _totals({"a": padded, "b": batch(1)}) == [3, 12, 2 * (4**2 + 2**2), 16]
