"""Host memory that packs are written into: fresh pages cost more than the copy into them.

A pack of 16 clips of 2048 tokens has 19 MB; memory just mapped is cleared page by page by the
system. So memory of packs that nobody holds any more is used again; on a CUDA machine torch's cache
of pinned memory does the same and makes copies to the device asynchronous.
"""

import weakref

import numpy as np
import torch


class PackBuffers:
    """Rows for packs. Safe by construction: a block is handed out again only after the last tensor
    that shows it is gone.
    """

    def __init__(self, device: torch.device):
        """device: where the rows are wanted; on a CPU beside a CUDA device they are pinned."""
        self._device = device
        self._pinned = device.type == "cpu" and torch.cuda.is_available()
        self._free: list[np.ndarray] = []

    def rows(self, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[count, width] of undefined content."""
        if self._pinned or self._device.type != "cpu":
            options = {"device": self._device, "pin_memory": self._pinned}
            return torch.empty(count, width, dtype=dtype, **options)
        size = count * width * dtype.itemsize
        fitting = [block for block in self._free if len(block) >= size]
        if fitting:
            block = min(fitting, key=len)
            # a block freed by another thread meanwhile is forgotten here, and its memory returned
            self._free = [other for other in self._free if other is not block]
        else:
            block = np.empty(size, np.uint8)
        lease = block[:size]
        weakref.finalize(lease, self._take_back, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(count, width)

    def _take_back(self, block: np.ndarray) -> None:
        self._free.append(block)
