"""Run on real ranks by test_losses.py: compare PartialFC with golden
vectors and with a dense softmax.
"""

import sys
from collections import Counter

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from data_pipeline.random import counter_normal, counter_uniform
from training import distributed
from training.distributed import all_gather_rows, process_group
from training.losses import sharded_softmax
from training.losses.partial_fc import PartialFC, PartialFCConfig
from training.optimizer import global_grad_norm


def relative(got, want):
    return float(((got - want).norm() / want.norm()).detach())


def golden(ranks, path):
    tensors = load_file(path)
    for name in ("plain", "filtered"):
        case = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name)}
        margin, threshold = case["margin_filter"].tolist()
        config = PartialFCConfig(
            sample_rate=1.0, margin=margin, filter_threshold=threshold, label_reduction="sum"
        )
        head = PartialFC(*case["centers"].shape, config, ranks)
        head.load_centers(case["centers"])
        size = len(case["embeddings"]) // ranks.world_size
        mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
        rows = case["embeddings"][mine].clone().requires_grad_()
        loss = head(rows, case["labels"][mine], torch.ones(size), draw=0)
        loss.objective.backward()
        floored = loss.losses.clamp(max=-torch.log(torch.tensor(1e-30))).mean()
        shard = slice(head.class_start, head.class_end)
        assert relative(floored, case["loss"][0]) < 1e-4
        assert relative(head.centers.grad, case["grad_centers"][shard]) < 1e-4
        assert relative(rows.grad, case["grad_embeddings"][mine]) < 1e-4
        print("golden ok", flush=True)


def dense_loss(rows, centers, labels, weights, sampled, config):
    """The loss of partial_fc's docstring on full tensors in float64."""
    cosines = F.normalize(rows, dim=-1) @ F.normalize(centers, dim=-1).T
    total = 0.0
    for row in range(len(rows)):
        own = [label for label in labels[row].tolist() if label >= 0]
        row_loss = 0.0
        for label in own:
            terms = [config.scale * (cosines[row, label] - config.margin)]
            for other in sampled.nonzero().flatten().tolist():
                if other != label:
                    cosine = cosines[row, other]
                    terms.append(
                        config.scale * torch.where(cosine <= config.threshold, cosine, 0.0)
                    )
            row_loss = row_loss + torch.stack(terms).logsumexp(0) - terms[0]
        total = total + weights[row] * row_loss / len(own)
    return total / weights.sum()


def dense(ranks):
    sharded_softmax.CHUNK = 7
    size, step, num_classes, width = 12 // ranks.world_size, 5, 53, 16
    config = PartialFCConfig(sample_rate=0.3, scale=12.0, filter_threshold=0.4)
    head = PartialFC(num_classes, width, config, ranks, seed=4)
    generator = torch.Generator().manual_seed(1)
    all_rows = torch.randn(12, width, generator=generator)
    labels = torch.randint(0, num_classes, (12, 3), generator=generator)
    labels[2, 1:] = -1
    weights = torch.ones(12)
    weights[7] = 0
    mine = slice(ranks.rank * size, (ranks.rank + 1) * size)
    rows = all_rows[mine].clone().requires_grad_()
    loss = head(rows, labels[mine], weights[mine], step)
    loss.objective.backward()

    padded = F.pad(
        head.centers.detach(), (0, 0, 0, -(-num_classes // ranks.world_size) - len(head.centers))
    )
    centers = all_gather_rows(padded)[:num_classes].double().requires_grad_()
    reference_rows = all_rows.double().requires_grad_()
    sampled = counter_uniform(torch.arange(num_classes), 4, "negatives", step) < 0.3
    sampled[labels[weights > 0][labels[weights > 0] >= 0]] = True
    want = dense_loss(reference_rows, centers, labels, weights, sampled, config)
    want.backward()
    assert relative(loss.objective, want) < 1e-5
    assert relative(rows.grad, ranks.world_size * reference_rows.grad[mine]) < 1e-5
    assert head.centers.grad.is_sparse
    wanted = centers.grad[head.class_start : head.class_end]
    assert relative(head.centers.grad.to_dense(), wanted) < 1e-5
    check_norm(head, centers.grad)
    print("dense ok", flush=True)


def check_norm(head, whole):
    """The global norm is that of one long vector: an encoder's gradients, which every rank holds,
    and those of all centres [num_classes, D], of which this rank's head holds its rows."""
    encoder = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    parts = [parameter.grad.flatten() for parameter in encoder.parameters()]
    want = torch.cat([*parts, whole.flatten().float()]).norm()
    assert relative(global_grad_norm(encoder, [head]), want) < 1e-5


def uneven(ranks):
    """Ranks with other numbers of samples, and one with none, give what one rank with all gives;
    three collectives do it; keeping cosines or computing them again is the same."""
    counts, width, slots = [3, 0, 5, 1][: ranks.world_size], 16, 6
    generator = torch.manual_seed(0)
    rows = torch.randn(sum(counts), width, generator=generator)
    labels = torch.randint(0, 53, (sum(counts), 4), generator=generator)
    config = PartialFCConfig(sample_rate=0.3, scale=12.0, filter_threshold=0.4)
    head = PartialFC(53, width, config, ranks, seed=4)
    start = sum(counts[: ranks.rank])
    mine = slice(start, start + counts[ranks.rank])
    calls = Counter()

    def counted(name, original):
        def call(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    distributed._single = lambda name, original=distributed._single: counted(name, original(name))
    dist.all_reduce = counted("all_reduce", dist.all_reduce)
    grads = []
    for kept in (1 << 20, 0):
        sharded_softmax.KEPT = kept
        padded = torch.full((slots, 4), -1)
        padded[: counts[ranks.rank]] = labels[mine]
        weights = (torch.arange(slots) < counts[ranks.rank]).float()
        own = rows[mine].clone().requires_grad_()
        head.centers.grad = None
        loss = head(own, padded, weights, 3)
        loss.objective.backward()
        grads.append((loss.objective.item(), own.grad, head.centers.grad.to_dense()))
    assert calls == {"all_gather": 2, "all_reduce": 2, "reduce_scatter": 2}
    assert grads[0][0] == grads[1][0]
    assert all(torch.equal(*pair) for pair in zip(grads[0][1:], grads[1][1:], strict=True))

    wanted_rows = rows.double().requires_grad_()
    sampled = counter_uniform(torch.arange(53), 4, "negatives", 3) < 0.3
    sampled[labels.flatten()] = True
    centers = counter_normal(torch.arange(53), width, 4, "centers").double() * config.init_std
    want = dense_loss(wanted_rows, centers, labels, torch.ones(len(rows)), sampled, config)
    want.backward()
    assert relative(torch.tensor(grads[0][0]), want) < 1e-5
    if counts[ranks.rank]:
        assert relative(grads[0][1], ranks.world_size * wanted_rows.grad[mine]) < 1e-5
    print("uneven ok", flush=True)


def out_of_range(ranks):
    head = PartialFC(10, 8, PartialFCConfig(), ranks)
    labels = torch.tensor([[9], [10 if ranks.rank == 1 else 0]])
    try:
        head(torch.randn(2, 8), labels, torch.ones(2), 0)
    except ValueError as error:
        assert "a label is out of range" in str(error)
        print("range ok", flush=True)


def positives(ranks):
    """Loss and gradients stay finite, and right, when a shard owns no label of the batch, when all
    rows have one class, and when there are no negatives but what the batch brings."""
    for sample_rate in (1.0, 1e-6):
        for labels in (torch.zeros(4, 1, dtype=torch.int64), torch.arange(4)[:, None] % 2):
            config = PartialFCConfig(sample_rate=sample_rate, scale=12.0)
            head = PartialFC(20, 8, config, ranks, seed=4)  # rank 1 owns classes 10 to 19
            rows = torch.randn(4, 8, generator=torch.manual_seed(ranks.rank)).requires_grad_()
            loss = head(rows, labels, torch.ones(4), 0)
            loss.objective.backward()
            assert loss.objective.isfinite() and rows.grad.isfinite().all()
            assert head.centers.grad.to_dense().isfinite().all()
            chosen = labels.unique()
            if sample_rate < 1 and len(chosen) == 1:  # nothing to tell the class from
                assert loss.objective.abs() < 1e-5
            empty = head(torch.zeros(4, 8), torch.full((4, 1), -1), torch.zeros(4), 0)
            assert empty.objective == 0
    print("positives ok", flush=True)


if __name__ == "__main__":
    with process_group() as this_rank:
        CASES = {
            "golden": golden,
            "dense": dense,
            "range": out_of_range,
            "positives": positives,
            "uneven": uneven,
        }
        CASES[sys.argv[1]](this_rank, *sys.argv[2:])
