"""Logging: one format, rank 0 on the console at INFO, other ranks from WARNING on. Names that came
with data are shown, never obeyed (model_factory.plain_text)."""

import logging

from model_factory.plain_text import PlainFormatter


def setup_logging(rank: int = 0) -> logging.Logger:
    """Configure and return the project's logger."""
    logger = logging.getLogger("univit")
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter(f"%(asctime)s [rank {rank}] %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    return logger
