"""The only DALI module: encoded images in, decoded images out, on the CPU or the GPU.

DALI decodes in its own threads, a few batches ahead; which bytes it gets is decided by our plan
through an `external_source` callback that is a pure function of the batch number. Normalising is
left to the device that trains: pixels stay bytes until then, a quarter of the memory to move.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from ..errors import MissingLibrary


class DecodeFailed(Exception):
    """DALI could not decode some image; its pipeline is dead and does not report which."""


class PictureDecoder:
    """Iterates over batches of images: each a list of uint8 [H, W, 3] tensors of any sizes.

    fetch(i) returns the encoded images of batch i as uint8 arrays, at most `max_batch` of them,
    or raises StopIteration; i counts from `start`. The tensors of a batch are views of DALI's
    buffers: use or copy them before asking for the next batch. Raises DecodeFailed, after which
    only a new decoder goes on; what fetch raises passes through.
    """

    def __init__(
        self,
        fetch: Callable[[int], list[np.ndarray]],
        max_batch: int,
        num_threads: int = 2,
        prefetch: int = 2,
        start: int = 0,
        device: torch.device | None = None,
    ):
        self._device = device or torch.device("cpu")
        self._error: BaseException | None = None

        def source(iteration: int) -> list[np.ndarray]:
            try:
                return fetch(start + iteration)
            except StopIteration:
                raise
            except Exception as error:
                self._error = error  # DALI would hand on its text only
                raise

        self._pipeline = _decoding_pipeline(
            source,
            max_batch=max_batch,
            num_threads=num_threads,
            prefetch=prefetch,
            device=self._device,
        )

    def __iter__(self) -> "PictureDecoder":
        return self

    def __next__(self) -> list[torch.Tensor]:
        if self._device.type == "cuda":  # copies out of the last batch's buffers are still queued
            torch.cuda.current_stream(self._device).synchronize()
        try:
            (decoded,) = self._pipeline.run()
        except StopIteration:
            raise
        except Exception as error:
            if self._error is not None:
                raise self._error from None
            raise DecodeFailed(_cause(error)) from error
        images = [decoded[i] for i in range(len(decoded))]
        if self._device.type == "cpu":
            return [torch.from_numpy(np.asarray(image)) for image in images]
        return [torch.from_dlpack(image) for image in images]


def undecodable(pictures: Iterable[np.ndarray], device: torch.device) -> dict[int, str]:
    """Which of some encoded images DALI cannot decode, each tried alone: {index: reason}.
    0.6 ms an image of 224 px, and 2 ms for each bad one, after which the pipeline is made anew.
    """
    encoded = list(pictures)

    def fetch(i: int) -> list[np.ndarray]:
        if i >= len(encoded):
            raise StopIteration
        return [encoded[i]]

    reasons = {}
    decoder = None
    for i in range(len(encoded)):
        if decoder is None:
            # prefetch 1: with two under way a failure would not name its image
            decoder = PictureDecoder(
                fetch, max_batch=1, num_threads=1, prefetch=1, start=i, device=device
            )
        try:
            next(decoder)
        except DecodeFailed as error:
            reasons[i] = f"cannot be decoded ({error})"
            decoder = None
    return reasons


def require_dali() -> None:
    """MissingLibrary where DALI cannot be imported; commands ask before hours of other work."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise MissingLibrary(
            f"packed data is read through NVIDIA DALI, which is not there ({error}): "
            "pip install -e .[cpu], or .[gpu] on a machine with an NVIDIA GPU"
        ) from error


def _decoding_pipeline(
    source: Callable[[int], list[np.ndarray]],
    max_batch: int,
    num_threads: int,
    prefetch: int,
    device: torch.device,
) -> Any:
    require_dali()
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"
    constants: Any = types  # they are made at import, where no type checker sees them
    device_id: Any = (device.index or 0) if on_gpu else None

    @pipeline_def(
        batch_size=max_batch,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
    )
    def decode() -> Any:
        encoded = fn.external_source(source=source, batch=True, dtype=constants.UINT8, ndim=1)
        return fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=constants.RGB,
            # packed images are upright, and positions of patches are those of the stored pixels
            adjust_orientation=False,
        )

    pipeline = decode()
    pipeline.build()
    return pipeline


def _cause(error: Exception) -> str:
    """The line of DALI's message that holds the cause; the others are a stack of its frames."""
    stripped = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in stripped if line]
    first = lines[0] if lines else "no reason"
    # Error or error
    return next((line for line in lines if "rror" in line), first)
