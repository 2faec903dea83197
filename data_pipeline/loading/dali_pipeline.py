"""The only DALI module: encoded pictures in, normalised pixels out.

DALI decodes and normalises in its own threads, a few batches ahead; which bytes it gets is decided
by our plan through an `external_source` callback that is a pure function of the batch number. On a
machine without a GPU the same pipeline runs on the CPU.
"""

from collections.abc import Callable

import numpy as np
import torch

from model_factory.packing import CLIP_MEAN, CLIP_STD


class PictureDecoder:
    """Iterates over batches of normalised pictures:
    each a list of float32 [3, H, W] tensors of any sizes.

    fetch(i) returns the JPEG bytes of batch i as uint8 arrays, at most `max_batch` of them, or
    raises StopIteration. The tensors of a batch are views of DALI's buffers: use or copy them
    before asking for the next batch.
    """

    def __init__(
        self,
        fetch: Callable[[int], list[np.ndarray]],
        max_batch: int,
        num_threads: int = 2,
        prefetch: int = 2,
    ):
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(
            batch_size=max_batch,
            num_threads=num_threads,
            device_id=None,
            prefetch_queue_depth=prefetch,
        )
        def decode():
            encoded = fn.external_source(source=fetch, batch=True, dtype=types.UINT8, ndim=1)
            pictures = fn.decoders.image(
                encoded, device="cpu", output_type=types.RGB, adjust_orientation=False
            )
            return fn.crop_mirror_normalize(
                pictures,
                dtype=types.FLOAT,
                output_layout="CHW",
                mean=[255 * value for value in CLIP_MEAN],
                std=[255 * value for value in CLIP_STD],
            )

        self._pipeline = decode()
        self._pipeline.build()

    def __iter__(self) -> "PictureDecoder":
        return self

    def __next__(self) -> list[torch.Tensor]:
        (pictures,) = self._pipeline.run()
        return [torch.from_numpy(np.asarray(pictures.at(i))) for i in range(len(pictures))]
