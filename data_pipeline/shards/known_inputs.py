"""What a shard's record says about its inputs, and whether a file on disk is still that input.

A record lists its inputs in order as [source, stamp, digest]: the stamp is found without reading
(inputs.input_stamp), the digest is the start of the sha256 of the bytes. Equal stamps are believed.
Where they differ, bytes decide: a data set that was copied without its modification times is the
same data set. Records of before that list tell their inputs by their samples and rejected inputs.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from model_factory.files import file_sha256

from .inputs import Input, input_stamp
from .writer import SHORT_DIGEST


@dataclass(frozen=True)
class KnownInput:
    """One input as a record states it. `stamp` is None in older records; `digest` is None where the
    bytes were never read. `rejected` is its entry in the record's list when it made no sample.
    """

    source: str
    stamp: list | None
    digest: str | None
    rejected: dict | None

    def is_now(self, item: Input) -> bool:
        """Whether an input with this source name still has the bytes that were packed."""
        stamp = input_stamp(item)
        if stamp == self.stamp:
            return True
        if item.is_remote or self.digest is None or stamp[0] is None:
            return False
        # by size and time too, so that a file that changes while we run is read again
        return _short_sha256(item.place, stamp=tuple(stamp)) == self.digest


def input_entry(source: str, stamp: list, digest: str | None) -> list:
    """What a record's `inputs` holds of one input."""
    return [source, stamp, digest]


def known_inputs(record: dict) -> list[KnownInput]:
    """The inputs of a shard in the order in which they were packed.

    Raises KeyError, TypeError or ValueError for what is no record of ours.
    """
    rejected = {entry["source"]: entry for entry in record["rejected"]}
    if "inputs" in record:
        return [
            KnownInput(source, stamp, digest, rejected.get(source))
            for source, stamp, digest in record["inputs"]
        ]
    # a key's last digits are the place among the inputs; rejected ones fill what is left, in order
    by_place = {int(sample["key"].split("_")[1]): sample for sample in record["samples"]}
    gaps = iter(record["rejected"])
    known = []
    for place in range(len(record["samples"]) + len(record["rejected"])):
        sample = by_place.get(place)
        if sample is None:
            entry = next(gaps, None)  # too few: a TypeError, as for anything else that is no record
            known.append(KnownInput(entry["source"], None, None, entry))
        else:
            digest = sample.get("source_sha256") or None
            known.append(KnownInput(sample["source"], None, digest, None))
    return known


def rejected_digest(item: Input, max_bytes: int) -> str | None:
    """Digest of an input that made no sample; None for what is remote, gone, or larger than an
    input may be.
    """
    path = Path(item.place)
    if item.is_remote or not path.is_file() or path.stat().st_size > max_bytes:
        return None
    try:
        return _short_sha256(item.place, stamp=tuple(input_stamp(item)))
    except OSError:  # no right to read it, or gone by now
        return None


@functools.lru_cache(maxsize=1 << 16)
def _short_sha256(place: str, stamp: tuple) -> str:
    """Digest of a file, computed once for each of its stamps: a changed file has another."""
    return file_sha256(Path(place))[:SHORT_DIGEST]
