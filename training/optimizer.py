"""One AdamW over encoder and centres, its parameter groups by role,
and one global gradient norm.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `clip_norm` bounds the norm over encoder and all centres of all ranks together;
    0 switches it off.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    weight_decay_centers: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 5.0

    def __post_init__(self):
        if self.lr <= 0 or self.weight_decay < 0 or self.weight_decay_centers < 0:
            raise ValueError(
                f"--lr {self.lr} must be positive, --weight_decay {self.weight_decay} and "
                "--weight_decay_pfc "
                f"{self.weight_decay_centers} not negative"
            )


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether an encoder weight decays: matrices do, norms, biases and the pooling probe do not."""
    return parameter.ndim >= 2 and not name.endswith("probe")


def build_optimizer(
    encoder: nn.Module, heads: dict[str, tuple[nn.Module, float]], config: OptimizerConfig
):
    """AdamW with one group per role, each carrying `name` and `lr_scale`; heads:
    name -> (module, lr scale).
    """
    named = [
        (name, parameter)
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad
    ]
    groups = [
        {
            "name": "encoder, decayed",
            "params": [parameter for name, parameter in named if is_decayed(name, parameter)],
            "weight_decay": config.weight_decay,
            "lr_scale": 1.0,
        },
        {
            "name": "encoder, norms, biases, probe",
            "params": [parameter for name, parameter in named if not is_decayed(name, parameter)],
            "weight_decay": 0.0,
            "lr_scale": 1.0,
        },
    ]
    for name, (head, lr_scale) in heads.items():
        groups.append(
            {
                "name": f"centers of {name}",
                "params": list(head.parameters()),
                "weight_decay": config.weight_decay_centers,
                "lr_scale": lr_scale,
            }
        )
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, base_lr: float, factor: float) -> None:
    """Give every group base_lr * lr_scale * factor."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * group["lr_scale"] * factor


def global_grad_norm(encoder: nn.Module, heads: list[nn.Module]) -> torch.Tensor:
    """Norm of all gradients: the encoder's once (equal on all ranks) and every rank's centres.
    A scalar tensor.
    """
    replicated = _squared_norm(list(encoder.parameters()))
    sharded = _squared_norm([parameter for head in heads for parameter in head.parameters()])
    dist.all_reduce(sharded)
    return (replicated + sharded).sqrt()


def clip_gradients(parameters, norm: torch.Tensor, clip_norm: float) -> None:
    """Scale all gradients by min(1, clip_norm / norm), without waiting for the device."""
    if clip_norm <= 0:
        return
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


def _squared_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters[0].device)
    return torch.stack(torch._foreach_norm(grads)).square().sum()
