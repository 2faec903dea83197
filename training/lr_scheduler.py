"""Learning-rate factor as a pure function of the step:
nothing is stored, nothing can drift on resume.

warm-up   (step + 1) / warmup_steps                        step < warmup_steps
decay     (1 - (step - warmup) / (total - warmup)) ** power
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleConfig:
    """`total_samples` over all heads decides the number of steps;
    `warmup_ratio` is a share of them.
    """

    total_samples: int = 60_000_000
    warmup_ratio: float = 0.1
    power: float = 1.0

    def __post_init__(self):
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
