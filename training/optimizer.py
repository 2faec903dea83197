"""One AdamW over encoder and centres, its parameter groups by role, and one global gradient norm.

Centres of classes that were not sampled in a step have no gradient. Their rows then stay as they
are, moments and weight decay included, and every row counts its own steps, so that its bias
correction is exact: each row is trained by an AdamW of its own that runs when the class is sampled.
The cost of a step follows the sampled rows. Dense gradients take torch's AdamW.
"""

import mmap
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .losses.partial_fc import PartialFC
from .parallel import local

MEAN_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS_AT_ONCE = 8192  # of centres, to bound the memory of a lazy step


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. `clip_norm` bounds the norm over encoder and all centres of all ranks together;
    0 switches it off. `centers_mean` bfloat16 halves the memory of the first moments of sampled
    centres; they forget within some ten steps, so that its three digits do.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    weight_decay_centers: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 5.0
    centers_mean: str = "float32"

    def __post_init__(self):
        if not (0 <= min(self.betas) and max(self.betas) < 1 and self.eps > 0 <= self.clip_norm):
            raise ValueError(
                f"optimizer.betas {self.betas} must lie in [0, 1), eps {self.eps} be positive, "
                f"clip_norm {self.clip_norm} not negative"
            )
        if self.centers_mean not in MEAN_DTYPES:
            raise ValueError(
                f"optimizer.centers_mean {self.centers_mean!r}: choose one of "
                f"{', '.join(MEAN_DTYPES)}"
            )
        if self.lr <= 0 or self.weight_decay < 0 or self.weight_decay_centers < 0:
            raise ValueError(
                f"--lr {self.lr} must be positive, --weight_decay {self.weight_decay} and "
                "--weight_decay_pfc "
                f"{self.weight_decay_centers} not negative"
            )


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether an encoder weight decays: matrices do, norms, biases and the pooling probe do not."""
    return parameter.ndim >= 2 and not name.endswith("probe")


class RowAdamW(torch.optim.AdamW):
    """AdamW whose groups with `lazy` set take sparse gradients over the rows of a matrix."""

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every group; sparse gradients must be coalesced."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["lazy"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"]:
                if group["lazy"] and parameter.grad is not None:
                    self._step_rows(parameter, group)
        return loss

    def _step_rows(self, parameter: torch.Tensor, group: dict) -> None:
        state, (beta1, beta2) = self._state_of(parameter, group), group["betas"]
        rows, grads = parameter.grad.indices()[0], parameter.grad.values()
        for start in range(0, len(rows), ROWS_AT_ONCE):
            index, grad = rows[start : start + ROWS_AT_ONCE], grads[start : start + ROWS_AT_ONCE]
            steps = state["step"][index] + 1
            mean = state["exp_avg"][index].float().lerp_(grad, 1 - beta1)
            square = state["exp_avg_sq"][index].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            scale = (group["lr"] / (1 - beta1**steps))[:, None]
            denominator = (square / (1 - beta2**steps)[:, None]).sqrt_().add_(group["eps"])
            kept = parameter[index].mul_(1 - group["lr"] * group["weight_decay"])
            parameter[index] = kept.sub_(mean.div(denominator).mul_(scale))
            state["step"][index] = steps
            state["exp_avg"][index] = mean.to(state["exp_avg"].dtype)
            state["exp_avg_sq"][index] = square

    def _state_of(self, parameter: torch.Tensor, group: dict) -> dict:
        """State of a parameter; as AdamW starts it where it took no step yet."""
        state, lazy = self.state[parameter], group["lazy"]
        if not state:
            state["step"] = torch.zeros(len(parameter) if lazy else ())
            state["step"] = state["step"].to(parameter.device if lazy else "cpu")
            for moment, dtype in (("exp_avg", group["mean"]), ("exp_avg_sq", torch.float32)):
                zeros = _zeros_like(parameter, dtype) if lazy else torch.zeros_like(parameter)
                state[moment] = zeros
        return state


def _zeros_like(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory on a CPU only where they are written to: fresh pages of the system,
    small ones, where torch would write all of them and numpy ask for pages of 2 MB."""
    if parameter.is_cuda or not parameter.numel():
        return torch.zeros_like(parameter, dtype=dtype)
    pages = mmap.mmap(-1, parameter.numel() * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(parameter.shape)


def ensure_moments(optimizer: RowAdamW) -> None:
    """Give parameters that took no step yet the state that they would start with."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer._state_of(parameter, group)


def build_optimizer(
    encoder: nn.Module, heads: dict[str, tuple[PartialFC, float]], config: OptimizerConfig
) -> RowAdamW:
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
            "lazy": False,
            "mean": torch.float32,
        },
        {
            "name": "encoder, norms, biases, probe",
            "params": [parameter for name, parameter in named if not is_decayed(name, parameter)],
            "weight_decay": 0.0,
            "lr_scale": 1.0,
            "lazy": False,
            "mean": torch.float32,
        },
    ]
    for name, (head, lr_scale) in heads.items():
        groups.append(
            {
                "name": f"centers of {name}",
                "params": list(head.parameters()),
                "weight_decay": config.weight_decay_centers,
                "lr_scale": lr_scale,
                "lazy": head.config.is_sparse,
                "mean": MEAN_DTYPES[config.centers_mean],
            }
        )
    groups = [group for group in groups if group["params"]]
    return RowAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, base_lr: float, factor: float) -> None:
    """Give every group base_lr * lr_scale * factor."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * group["lr_scale"] * factor


def global_grad_norm(encoder: nn.Module, heads: list[nn.Module]) -> torch.Tensor:
    """Norm of all gradients: those that every rank holds counted once, those of centres and of
    sharded weights over all ranks. A scalar tensor, the same on every rank.
    """
    whole = [p for p in encoder.parameters() if not isinstance(p, DTensor)]
    parts = [p for p in encoder.parameters() if isinstance(p, DTensor)]
    parts += [parameter for head in heads for parameter in head.parameters()]
    sharded = _squared_norm(parts)
    dist.all_reduce(sharded)
    return (_squared_norm(whole).to(sharded.device) + sharded).sqrt()


def clip_gradients(parameters, norm: torch.Tensor, clip_norm: float) -> None:
    """Scale all gradients by min(1, clip_norm / norm), without waiting for the device."""
    if clip_norm <= 0:
        return
    factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(_gradients(parameters), factor)


def _gradients(parameters) -> list[torch.Tensor]:
    """This rank's part of the gradients that are there; of sparse ones, which are coalesced in
    place, the values."""
    grads = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            grads.append(parameter.grad.values())
        elif parameter.grad is not None:
            grads.append(local(parameter.grad))
    return grads


def _squared_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    grads = [grad for grad in _gradients(parameters) if grad.numel()]
    if not grads:
        return torch.zeros((), device=parameters[0].device if parameters else "cpu")
    return torch.stack(torch._foreach_norm(grads)).square().sum()
