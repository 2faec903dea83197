"""The trainer: configuration, loop, cluster-discrimination loss, checkpoints and metrics."""
