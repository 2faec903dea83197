"""Logging: one format, rank 0 on the console at INFO, other ranks from WARNING on; what all ranks
would say of one mistake is said once. Names that came with data are shown, never obeyed
(model_factory.command_line.plain_text)."""

import hashlib
import logging
import os
from datetime import timedelta

from model_factory.command_line.plain_text import PlainFormatter

ASKED = timedelta(seconds=5)  # that torchrun's store may take; its host is this one or a neighbour


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


def is_first_to_say(text: str) -> bool:
    """Whether no other rank of this start has said the same; True where nobody can tell.

    The ranks may have met already, or never will: torchrun's own store is asked, which outlives
    them, and a restart asks anew.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import torch.distributed as dist

    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    try:
        store = dist.TCPStore(
            host_name=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=ASKED,
        )
        return store.add(f"univit/said/{start}/{digest}", 1) == 1
    # torch's own errors of a store are RuntimeErrors
    except (KeyError, ValueError, RuntimeError):
        return True
