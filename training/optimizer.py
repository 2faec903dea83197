"""Learning-rate schedule, one AdamW over encoder and centres, and one global gradient norm.

    factor(step) = (step + 1) / warmup_steps                               step < warmup_steps
                   (1 - (step - warmup) / (total - warmup)) ** power       after that

The factor is a pure function of the step: nothing is stored, so a resume cannot drift.

Centres of classes that were not sampled in a step have no gradient. Their rows then stay as they
are, moments and weight decay included, and every row counts its own steps, so that its bias
correction is exact: each row is trained by an AdamW of its own that runs when the class is sampled.
The cost of a step follows the sampled rows. Dense gradients take torch's AdamW.
"""

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .losses.partial_fc import PartialFC
from .parallel import local

MEAN_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rows of centres that one round of a lazy step updates. A step has several temporaries of as many
# rows, 34 MB each at width 1024; without a bound they would grow with the sampled classes.
ROWS_AT_ONCE = 8192
NORM_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW.

    `clip_norm` bounds the norm over encoder and all centres of all ranks together; 0 switches it
    off. `centers_mean` bfloat16 halves the memory of the first moments of sampled centres and is
    enough for them: beta1 = 0.9 forgets within about ten steps, and rounding noise averages out.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    weight_decay_centers: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 5.0
    centers_mean: str = "float32"

    def __post_init__(self) -> None:
        betas_fit = all(0 <= beta < 1 for beta in self.betas)
        if not betas_fit or self.eps <= 0 or self.clip_norm < 0:
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
                f"--weight_decay_pfc {self.weight_decay_centers} not negative"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of a run and course of its learning rate.

    `total_samples` over all heads decides the number of steps; `warmup_ratio` is a share of them.
    """

    total_samples: int = 60_000_000
    warmup_ratio: float = 0.1
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.total_samples < 1 or not 0 <= self.warmup_ratio < 1:
            raise ValueError(
                f"--num_sampled_data {self.total_samples} must be positive, --warmup_ratio "
                f"{self.warmup_ratio} in [0, 1)"
            )

    def total_steps(self, samples_per_step: float) -> int:
        """Optimizer steps of the run, at least one."""
        return max(1, int(self.total_samples // samples_per_step))


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Factor on the base learning rate at optimizer step `step`, counted from 0."""
    warmup_steps = int(total_steps * config.warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    remaining = 1 - (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, remaining) ** config.power


def set_learning_rate(optimizer: torch.optim.Optimizer, base_lr: float, factor: float) -> None:
    """Give every group base_lr * lr_scale * factor."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * group["lr_scale"] * factor


class RowAdamW(torch.optim.AdamW):
    """AdamW whose groups with `lazy` set take sparse gradients over the rows of a matrix."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One step of every group; sparse gradients must be coalesced."""
        groups = self.param_groups
        # torch's AdamW refuses sparse gradients, so it is shown the other groups alone
        self.param_groups = [group for group in groups if not group["lazy"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"]:
                if group["lazy"] and parameter.grad is not None:
                    self._step_rows(parameter, gradient=parameter.grad, group=group)
        return loss

    def _step_rows(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict) -> None:
        """One step of AdamW on the rows that the gradient has, each with its own step count."""
        state = self._state_of(parameter, group)
        beta1, beta2 = group["betas"]
        rows = gradient.indices()[0]
        grads = gradient.values()
        for start in range(0, len(rows), ROWS_AT_ONCE):
            index = rows[start : start + ROWS_AT_ONCE]
            grad = grads[start : start + ROWS_AT_ONCE]
            # indexing copies: the in-place steps below work on the copies, stored at the end
            steps = state["step"][index] + 1
            mean = state["exp_avg"][index].float().lerp_(grad, 1 - beta1)
            square = state["exp_avg_sq"][index].mul_(beta2)
            square.addcmul_(grad, grad, value=1 - beta2)

            # bias corrections by each row's own number of steps
            scale = (group["lr"] / (1 - beta1**steps))[:, None]
            corrected = square / (1 - beta2**steps)[:, None]
            denominator = corrected.sqrt_().add_(group["eps"])
            # decoupled weight decay, before the update, as in torch's AdamW
            decayed = parameter[index].mul_(1 - group["lr"] * group["weight_decay"])
            parameter[index] = decayed.sub_(mean.div(denominator).mul_(scale))

            state["step"][index] = steps
            state["exp_avg"][index] = mean.to(state["exp_avg"].dtype)
            state["exp_avg_sq"][index] = square

    def _state_of(self, parameter: torch.Tensor, group: dict) -> dict[str, torch.Tensor]:
        """State of a parameter; as AdamW starts it where it took no step yet."""
        state = self.state[parameter]
        if state:
            return state
        if group["lazy"]:
            state["step"] = torch.zeros(len(parameter), device=parameter.device)
            state["exp_avg"] = _zeros_like(parameter, group["mean"])
            state["exp_avg_sq"] = _zeros_like(parameter, torch.float32)
        else:
            state["step"] = torch.zeros(())  # on the CPU, where torch's AdamW has it
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def _zeros_like(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory on a CPU only where they are written to.

    torch.zeros would write every page. np.zeros may get huge pages, so that touching one row takes
    2 MB. An anonymous mapping gives pages of 4 KB, which are allocated when first written.
    """
    if parameter.is_cuda or not parameter.numel():
        return torch.zeros_like(parameter, dtype=dtype)
    pages = mmap.mmap(-1, parameter.numel() * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(parameter.shape)


def ensure_moments(optimizer: RowAdamW) -> None:
    """Give parameters that took no step yet the state that they would start with, so that a
    checkpoint has the same tensors at every step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer._state_of(parameter, group)


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether an encoder weight decays: matrices do, norms, biases and the pooling probe do not."""
    return parameter.ndim >= 2 and not name.endswith("probe")


def build_optimizer(
    encoder: nn.Module, heads: dict[str, tuple[PartialFC, float]], config: OptimizerConfig
) -> RowAdamW:
    """AdamW with one group per role, each carrying `name` and `lr_scale`; heads:
    name -> (module, lr scale).
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            role = decayed if is_decayed(name, parameter) else others
            role.append(parameter)
    # of the encoder's groups: one learning rate, dense gradients, first moments in fp32
    common = {"lr_scale": 1.0, "lazy": False, "mean": torch.float32}
    groups: list[dict[str, Any]] = [
        {
            **common,
            "name": "encoder, decayed",
            "params": decayed,
            "weight_decay": config.weight_decay,
        },
        {
            **common,
            "name": "encoder, norms, biases, probe",
            "params": others,
            "weight_decay": 0.0,
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
    # a frozen encoder leaves its two groups empty
    filled = [group for group in groups if group["params"]]
    return RowAdamW(filled, lr=config.lr, betas=config.betas, eps=config.eps)


def global_grad_norm(encoder: nn.Module, heads: list[nn.Module]) -> torch.Tensor:
    """Norm of all gradients, a scalar tensor that is the same on every rank.

    Gradients that every rank holds (DDP) count once; those of centres and of sharded weights are
    summed over the ranks. Called by all ranks.
    """
    whole: list[nn.Parameter] = []
    parts: list[nn.Parameter] = []
    for parameter in encoder.parameters():
        role = parts if isinstance(parameter, DTensor) else whole
        role.append(parameter)
    for head in heads:
        parts += head.parameters()
    # one scalar for all sharded parts, so one collective however many tensors there are
    sharded = _squared_norm(parts)
    dist.all_reduce(sharded)
    return (_squared_norm(whole).to(sharded.device) + sharded).sqrt()


def clip_gradients(
    parameters: Iterable[nn.Parameter], norm: torch.Tensor, clip_norm: float
) -> None:
    """Scale all gradients by min(1, clip_norm / norm), without waiting for the device."""
    if clip_norm <= 0:
        return
    factor = (clip_norm / (norm + NORM_EPS)).clamp(max=1.0)
    torch._foreach_mul_(_gradients(parameters), factor)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """This rank's part of the gradients that exist; of sparse ones, which are coalesced in place,
    the values."""
    grads = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            grads.append(parameter.grad.values())
        else:
            grads.append(local(parameter.grad))
    return grads


def _squared_norm(parameters: list[nn.Parameter]) -> torch.Tensor:
    # a rank beyond the last class, or beyond the last row of a sharded weight, holds nothing
    grads = [grad for grad in _gradients(parameters) if grad.numel()]
    if not grads:
        # on the parameters' device, since other ranks' sums meet it in a collective
        return torch.zeros((), device=parameters[0].device if parameters else "cpu")
    return torch.stack(torch._foreach_norm(grads)).square().sum()
