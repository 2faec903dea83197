"""Host memory that packs are written into: fresh pages cost more than the copy into them.

A pack of 16 clips of 2048 tokens has 19 MB; memory just mapped is cleared page by page by the
system. So memory of packs that nobody holds any more is used again; on a CUDA machine torch's cache
of pinned memory does the same and makes copies to the device asynchronous.
"""

import weakref

import numpy as np
import torch


class PackBuffers:
    """Rows for packs, for several threads. A block is handed out again only after the last tensor
    that shows it is gone.
    """

    def __init__(self, device: torch.device):
        """device: where the rows are wanted; on a CPU beside a CUDA device they are pinned."""
        self._device = device
        self._pinned = device.type == "cpu" and torch.cuda.is_available()
        self._free: dict[int, list[np.ndarray]] = {}  # bytes -> blocks of that size

    def rows(self, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[count, width] of undefined content."""
        if self._pinned or self._device.type != "cpu":
            options = {"device": self._device, "pin_memory": self._pinned}
            return torch.empty(count, width, dtype=dtype, **options)
        size = count * width * dtype.itemsize
        free = self._free.setdefault(size, [])
        try:
            block = free.pop()  # one step for the interpreter, so no two threads get one block
        except IndexError:
            block = np.empty(size, np.uint8)
        lease = block[:]
        # no lock: a finalizer may run inside any allocation, also in the thread that would hold it
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(count, width)
