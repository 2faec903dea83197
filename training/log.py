"""Logging: one format, rank 0 on the console at INFO, other ranks from WARNING on; a message that
all ranks have is logged by one. Names that came with data are made safe to show
(model_factory.command_line.plain_text)."""

import hashlib
import logging
import os
from datetime import timedelta

from model_factory.command_line.plain_text import PlainFormatter

# the store of torchrun runs on this host or a neighbour, and answers within milliseconds
STORE_TIMEOUT = timedelta(seconds=5)


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
    """Whether no other rank of this start has logged the same; True where no store can be asked.

    torchrun's own store is asked, since ranks may need this before they have a process group, or
    after it is gone. A restart asks anew.
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
            timeout=STORE_TIMEOUT,
        )
        return store.add(f"univit/said/{start}/{digest}", 1) == 1
    # torch's own errors of a store are RuntimeErrors
    except (KeyError, ValueError, RuntimeError):
        return True
