"""The optimizer: lazy rows are AdamWs of their own, dense gradients take torch's."""

import pytest
import torch
from torch import nn

from model_factory.layers import AttentionPoolingHead
from training.losses.partial_fc import PartialFCConfig
from training.optimizer import (
    OptimizerConfig,
    RowAdamW,
    build_optimizer,
    clip_gradients,
    ensure_moments,
    set_learning_rate,
)

CONFIG = OptimizerConfig(lr=0.1, weight_decay=0.2, weight_decay_centers=0.3, clip_norm=1.0)


class Head(nn.Module):
    """Centres with the settings that the optimizer asks for."""

    def __init__(self, rows: int, sample_rate: float, sparse: bool = True):
        super().__init__()
        self.config = PartialFCConfig(sample_rate=sample_rate, sparse_gradient=sparse)
        self.centers = nn.Parameter(torch.randn(rows, 3, generator=torch.manual_seed(0)))


def sparse(rows: list[int], shape, seed: int) -> torch.Tensor:
    values = torch.randn(len(rows), shape[1], generator=torch.manual_seed(seed))
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape)


def optimizer_of(head: Head) -> RowAdamW:
    return build_optimizer(nn.Linear(2, 2), {"a": (head, 1.0)}, CONFIG)


def test_every_sampled_row_is_trained_by_an_adamw_of_its_own():
    head = Head(6, sample_rate=0.5)
    rows = [nn.Parameter(row.clone()) for row in head.centers.data]
    optimizer = optimizer_of(head)
    options = {"lr": CONFIG.lr, "weight_decay": CONFIG.weight_decay_centers}
    alone = [torch.optim.AdamW([row], **options) for row in rows]
    for step, chosen in enumerate([[0, 2, 5], [2], [0, 1, 2], [5], [], [0, 5]]):
        head.centers.grad = sparse(chosen, (6, 3), step).coalesce()
        values = dict(zip(chosen, head.centers.grad.values(), strict=True))
        for number in chosen:
            rows[number].grad = values[number].clone()
            alone[number].step()
        optimizer.step()
        assert torch.allclose(head.centers.data, torch.stack([r.data for r in rows]), atol=1e-6)
    assert torch.equal(head.centers[3:5], Head(6, 0.5).centers[3:5]), "never sampled"
    assert optimizer.state[head.centers]["step"].tolist() == [3, 1, 3, 0, 0, 3]


def test_first_moments_in_bfloat16_stay_close_to_those_in_float32():
    heads = [Head(50, sample_rate=0.5), Head(50, sample_rate=0.5)]
    configs = [OptimizerConfig(lr=0.01), OptimizerConfig(lr=0.01, centers_mean="bfloat16")]
    optimizers = [
        build_optimizer(nn.Linear(2, 2), {"a": (head, 1.0)}, config)
        for head, config in zip(heads, configs, strict=True)
    ]
    start = heads[0].centers.detach().clone()
    for step in range(60):
        rows = torch.randperm(50, generator=torch.manual_seed(step))[:25].sort().values.tolist()
        for head, optimizer in zip(heads, optimizers, strict=True):
            head.centers.grad = sparse(rows, (50, 3), step).coalesce()
            optimizer.step()
    moved = (heads[0].centers - start).norm()
    assert (heads[0].centers - heads[1].centers).norm() < 0.01 * moved
    assert optimizers[1].state[heads[1].centers]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("head", [Head(6, 1.0), Head(6, 0.5, sparse=False)])
def test_dense_gradients_take_torchs_adamw(head):
    copy = nn.Parameter(head.centers.data.clone())
    optimizer = optimizer_of(head)
    options = {"lr": CONFIG.lr, "weight_decay": CONFIG.weight_decay_centers}
    reference = torch.optim.AdamW([copy], **options)
    for step in range(4):
        grad = sparse([0, 2, 5], (6, 3), step).to_dense()
        head.centers.grad, copy.grad = grad, grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(head.centers, copy)


def test_micro_steps_with_other_samples_add_up():
    head, parts = Head(6, 0.5), ([0, 2], [2, 5])
    for step, rows in enumerate(parts):
        grad = sparse(rows, (6, 3), step)
        head.centers.grad = grad if head.centers.grad is None else head.centers.grad + grad
    want = sum(sparse(rows, (6, 3), step).to_dense() for step, rows in enumerate(parts))
    clip_gradients([head.centers], torch.tensor(1e-9), 0.5)
    assert head.centers.grad.is_coalesced()
    assert head.centers.grad.indices().tolist() == [[0, 2, 5]]
    assert torch.allclose(head.centers.grad.to_dense(), want)
    clip_gradients([head.centers], torch.tensor(10.0), 0.5)
    assert torch.allclose(head.centers.grad.to_dense(), want * 0.05)


def test_matrices_decay_and_norms_biases_and_the_pooling_probe_do_not():
    encoder = nn.ModuleDict(
        {
            "block": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "head": AttentionPoolingHead(4, hidden=8, num_heads=1, norm_eps=1e-6),
        }
    )
    groups = build_optimizer(encoder, {"a": (Head(6, 0.5), 1.0)}, CONFIG).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decays.pop(id(p)) for name, p in encoder.named_parameters()}
    plain = {name for name in found if name.endswith(("bias", "norm.weight", "probe"))}
    assert len(plain) == 9 and "head.probe" in plain
    assert found == {name: 0.0 if name in plain else CONFIG.weight_decay for name in found}
    assert list(decays.values()) == [CONFIG.weight_decay_centers]


def test_the_rate_of_a_head_is_scaled():
    heads = {"a": (Head(6, 0.5), 1.0), "b": (Head(6, 0.5), 0.25)}
    optimizer = build_optimizer(nn.Linear(2, 2), heads, CONFIG)
    set_learning_rate(optimizer, 2.0, 0.5)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates.pop("centers of b") == 0.25
    assert set(rates.values()) == {1.0} and len(rates) == 3


def test_state_can_be_laid_out_before_the_first_step():
    head = Head(6, 0.5)
    optimizer = optimizer_of(head)
    ensure_moments(optimizer)
    assert optimizer.state[head.centers]["step"].shape == (6,)
    set_learning_rate(optimizer, 1.0, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
