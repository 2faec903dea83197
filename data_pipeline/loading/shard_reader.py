"""Manifest -> bytes: one positioned read per member, crc checked before anything looks at them.

No tar is parsed at training time and no index file is trusted: offsets come from the manifest,
which binds them. Cost: one pread and one crc32 (4 GB/s per core) per member.
"""

import os
import shlex
import time
import zlib
from collections import OrderedDict
from pathlib import Path

from ..errors import CorruptShard, DataPipelineError
from ..shards.manifest import Manifest, Member, how_to_repack

MAX_OPEN_FILES = 256  # of the 1024 that a process may have by default
ATTEMPTS = 3
PAUSE_S = 0.1  # before the second attempt, twice as long before the third


class ShardReader:
    """Reads members of one packed dataset; keeps the most recently used shards open. Use it as a
    context manager, or `close` it.
    """

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._files: OrderedDict[Path, int] = OrderedDict()
        self.reading: Path | None = None  # the file of the read under way, for whoever waits for it

    def read(self, sample_id: int, extension: str) -> bytes:
        """Bytes of one member.

        CorruptShard names file, sample and member when they are not what was written, or the file
        that cannot be read, which is tried ATTEMPTS times.
        """
        member = self._manifest.member(sample_id, extension)
        repack = how_to_repack(member.path.stem)
        self.reading = member.path
        try:
            data = self._pread(member, sample_id)
        finally:
            self.reading = None
        if len(data) != member.size:
            raise CorruptShard(
                f"{member.path} ends before byte {member.offset + member.size}, where sample "
                f"{sample_id} ends by the manifest: it was cut or replaced; {repack}"
            )
        if zlib.crc32(data) != member.crc32:
            raise CorruptShard(
                f"{member.path}: member .{extension} of sample {sample_id} at byte {member.offset} "
                "is damaged (crc32 differs): `python -m data_pipeline verify "
                f"{shlex.quote(str(member.path.parent))}` looks for more; {repack}"
            )
        return data

    def _pread(self, member: Member, sample_id: int) -> bytes:
        for attempt in range(ATTEMPTS):
            if attempt:  # even a pause of nothing gives the processor away
                time.sleep(PAUSE_S * attempt)
            try:
                return os.pread(self._descriptor(member.path), member.size, member.offset)
            except OSError as error:  # a network folder may forget a file for a moment
                reason = error.strerror
                # a descriptor of before may be stale, so the next attempt opens the file again
                self._forget(member.path)
        raise CorruptShard(
            f"{member.path}: {reason}, looking for sample {sample_id}: check the storage; "
            f"{how_to_repack(member.path.stem)}"
        )

    def first_and_last(self) -> list[str]:
        """Shards whose first or last member is not what the manifest binds, one line each: the
        cheap look at every shard before a run, two reads each.
        """
        problems = []
        starts = self._manifest.starts
        for i, shard in enumerate(self._manifest.shards):
            if i in self._manifest.absent or not shard["samples"]:
                continue
            first = int(starts[i])
            last = int(starts[i + 1]) - 1
            for sample in {first, last}:  # a set, since a shard may hold one sample
                try:
                    self.read(sample, "json")
                except DataPipelineError as error:
                    problems.append(str(error))
                    break
        return problems

    def _forget(self, path: Path) -> None:
        descriptor = self._files.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def _descriptor(self, path: Path) -> int:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        if len(self._files) >= MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def close(self) -> None:
        """Close all shards."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
