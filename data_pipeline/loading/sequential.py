"""Given samples once, in order, under one view: for evaluation and feature extraction.

No filling, no labels, nothing random; a bad sample is an error and not replaced.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ..errors import CorruptShard
from ..shards.manifest import Manifest
from .choices import IMAGE, VIEWS, ViewConfig
from .dali_pipeline import DecodeFailed, PictureDecoder, undecodable
from .packing import PackedBatch, pack_views
from .samples import Request, SampleReader, wrong_size
from .table import SampleTable


def sequential_batches(
    manifest: Manifest,
    sample_ids: Iterable[int],
    batch_size: int,
    view: str,
    view_config: ViewConfig | None = None,
) -> Iterator[PackedBatch]:
    """Packs of `batch_size` samples, the last may be smaller; frames are taken from the middles.

    Raises CorruptShard with the names of samples that cannot be read or decoded.
    """
    table, config = SampleTable.of(manifest), view_config or ViewConfig()
    samples, ids = SampleReader(manifest, table), [int(i) for i in sample_ids]
    chunks = [ids[start : start + batch_size] for start in range(0, len(ids), batch_size)]
    pending: dict[int, list[Request]] = {}

    def fetch(number: int) -> list[np.ndarray]:
        if number >= len(chunks):
            raise StopIteration
        views = [IMAGE if table.is_image[i] else VIEWS.index(view) for i in chunks[number]]
        pairs = zip(chunks[number], views, strict=True)
        pending[number] = [samples.read(i, chosen, config) for i, chosen in pairs]
        return [request.encoded for request in pending[number]]

    try:
        pictures = PictureDecoder(fetch, batch_size)
        for number, chunk in enumerate(chunks):
            decoded = _decode(pictures, pending, samples)
            requests = pending.pop(number)
            pairs = zip(requests, decoded, strict=True)
            views = [samples.view(request, picture, None) for request, picture in pairs]
            labels = torch.zeros(len(views), 0, dtype=torch.int64)
            yield pack_views(
                views, torch.tensor(chunk), labels, torch.ones(len(views)), index=number
            )
    finally:
        samples.close()


def _decode(
    pictures: PictureDecoder, pending: dict[int, list[Request]], samples: SampleReader
) -> list[torch.Tensor]:
    """Pictures of the next batch, each of its right size."""
    try:
        decoded = next(pictures)
        requests = pending[min(pending)]
        reasons = [wrong_size(*pair) for pair in zip(requests, decoded, strict=True)]
        bad = {i: reason for i, reason in enumerate(reasons) if reason}
    except DecodeFailed as error:
        requests = [request for batch in pending.values() for request in batch]
        bad = undecodable([request.encoded for request in requests], torch.device("cpu"))
        if not bad:
            raise CorruptShard(f"decoding failed, every picture alone decodes: {error}") from error
    if bad:
        lines = [f"{samples.name(requests[i].sample_id)}: {reason}" for i, reason in bad.items()]
        remedy = "samples that cannot be used; to pack them again, remove their shards' .json and"
        remedy += " run the `pack` command of the folder again:"
        raise CorruptShard("\n".join([remedy, *lines]))
    return decoded
