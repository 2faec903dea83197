"""Clips -> features of the frozen encoder, batch by batch, each look encoded once.

    read (threads, shards) -> pack -> encoder -> fp16 features [L, C] -> cache -> batches

Attentive heads take all tokens of a clip, the others its pooled vector (L = 1). What is in the
cache is neither read nor encoded.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from data_pipeline.codec.decompose import DECOMPOSITION_VERSION
from training.distributed import Ranks, all_gather_json

from ..clip_views import Look, chosen_decoder
from ..feature_cache import FeatureCache
from .benchmarks import LabelledList
from .clips import open_clips
from .config import ProbeConfig
from .encoders import ProbeEncoder

FEATURES_VERSION = 2  # goes up whenever equal files and settings would give other features
MAX_LISTED = 50  # unreadable clips in a message, so that a wrong folder still fits a screen

# readable looks of a batch, and their features fp32 [L_i, C] on the device
FeatureBatch = tuple[list[Look], list[torch.Tensor]]


class UnreadableClips(ValueError):
    """Clips that cannot be evaluated, so that there is no accuracy."""


class ClipFeatures:
    """Features of one split.

    unreadable   {name: reason} so far
    read_from    where clips come from, in words
    encode_s     seconds inside of the encoder
    passes       looks encoded so far
    """

    def __init__(
        self,
        clips: LabelledList,
        config: ProbeConfig,
        encoder: ProbeEncoder,
        device: torch.device,
    ) -> None:
        self.clips = clips
        self.encode_s = 0.0
        self.passes = 0
        self._num_tokens = 0
        self._config = config
        self._encoder = encoder
        self._device = device
        self._pooled = config.heads.kind != "attentive"
        size = encoder.size or config.input.size
        self._reader = open_clips(
            clips,
            config=config.input,
            size=size,
            patch_size=encoder.patch_size,
            frames_per_token=encoder.frames_per_token,
        )
        self.unreadable = self._reader.unreadable
        self.read_from = self._reader.read_from
        key = {
            "encoder": encoder.sha256,
            "pooled": self._pooled,
            "size": size,
            "decoder": chosen_decoder(config.input),
            "input": config.input.identity(),
            # last bits depend on it: bf16 on CUDA, fp32 on a CPU
            "device": device.type,
            "versions": [FEATURES_VERSION, DECOMPOSITION_VERSION],
        }
        self._cache: FeatureCache[Look] = FeatureCache(
            config.cache_dir,
            key=key,
            identity=self._identity,
            memory_bytes=int(config.cache_gb * (1 << 30)),
        )

    def find_missing(self, rank: int, world_size: int) -> None:
        """Note files that are not there, of this rank's share, before anything is decoded."""
        self._reader.find_missing(range(rank, len(self.clips), world_size))

    def tokens_per_clip(self) -> float:
        """Mean number of tokens of a clip's crops together over all ranks, which all call this;
        encodes a clip where all features were stored."""
        config = self._config.input
        counts = all_gather_json([self._num_tokens, self.passes])
        if not any(passes for _, passes in counts):
            # Nothing was encoded on any rank, so the first clip that can be read represents all.
            for index in range(len(self.clips)):
                # exhausted, so that nothing of the generator closes the reader later
                (encoded,) = self._encoded([Look(index)])
                if encoded is not None:
                    break
            counts = [[self._num_tokens, self.passes]]
        num_tokens = sum(tokens for tokens, _ in counts)
        passes = sum(passes for _, passes in counts)
        tokens_per_pass = num_tokens / max(1, passes)  # a pass is one crop
        return tokens_per_pass * config.temporal_crops * config.spatial_crops

    def drawn_looks(self, indices: Iterable[int], epoch: int) -> list[Look]:
        """Training looks of an epoch (from 1): drawn versions where the clips have several, else
        version 0, of which nothing is random."""
        views = self._config.input.train_views
        if views == 1 or not self._reader.several_versions:
            version = 0
        elif views == 0:
            version = epoch  # a new draw in every epoch
        else:
            version = 1 + (epoch - 1) % views  # the stored versions in turn
        return [Look(int(index), version) for index in indices]

    def crops(self, indices: Iterable[int]) -> list[Look]:
        """All crops of each clip, one clip after the other."""
        times = self._config.input.temporal_crops
        squares = self._config.input.spatial_crops
        # middles of equal parts of a segment; squares reach both ends of the long side
        within = [(t + 0.5) / times for t in range(times)]
        across = [0.5]
        if squares > 1:
            across = [square / (squares - 1) for square in range(squares)]
        return [
            Look(int(index), within=segment_position, across=crop_position)
            for index in indices
            for segment_position in within
            for crop_position in across
        ]

    def batches(self, batches: list[list[Look]]) -> Iterator[FeatureBatch]:
        """Features of every batch of looks, without the looks that cannot be read."""
        missing = [look for batch in batches for look in batch if not self._cache.has(look)]
        absent = set(missing)
        # Encoded in the order of the batches, so that reading runs ahead over their borders.
        fresh = self._encoded(missing)
        for batch in batches:
            looks = []
            features = []
            for look in batch:
                if look in absent:
                    found = next(fresh)
                else:
                    found = self._cache.get(look, comes_again=self._comes_again(look))
                    if found is None:  # stored, but damaged
                        (found,) = self._encoded([look])
                if found is not None:
                    looks.append(look)
                    features.append(found.to(self._device).float())
            yield looks, features

    def _identity(self, look: Look) -> str:
        """Text that changes with what is seen: the clip's content, the crop, and the draw."""
        content = self._reader.identity(look.clip)
        seen = f"{content} {look.within} {look.across}"
        if look.version == 0:
            return seen
        config = self._config.input
        # what the numbers of a drawn version follow from (clip_views.py)
        drawn = f"{look.clip} {look.version} {config.seed} {config.augmentations}"
        return f"{seen} {drawn}"

    def _comes_again(self, look: Look) -> bool:
        """Whether a later epoch will look the same way."""
        return look.version == 0 or self._config.input.train_views > 0

    def _encoded(self, looks: list[Look]) -> Iterator[torch.Tensor | None]:
        """Features of every look in order; None for clips that cannot be read."""
        names = self.clips.names
        readable = [look for look in looks if names[look.clip] not in self.unreadable]
        waiting = deque(looks)
        for encoded, pieces in self._packs(readable):
            for look, piece in zip(encoded, pieces, strict=True):
                while waiting[0] != look:  # turned out to be unreadable
                    waiting.popleft()
                    yield None
                waiting.popleft()
                yield piece
        for _ in waiting:
            yield None

    def _packs(self, looks: list[Look]) -> Iterator[FeatureBatch]:
        """(looks, their features in fp16) of what can be read, a pack at a time; put into the
        cache. Raises ValueError for features that are not finite."""
        for found, batch in self._reader.packs(looks, self._config.heads.batch_size):
            started = time.perf_counter()
            encoded = self._encoder(batch.to(self._device))
            if self._pooled:
                pieces = encoded.pooled.half().cpu().split(1)
            else:
                tokens = encoded.tokens.half().cpu()
                pieces = tokens.split(encoded.lengths.tolist())
            # `.cpu()` has waited for the device, so these are seconds of the encoder.
            self.encode_s += time.perf_counter() - started
            self._num_tokens += int(encoded.lengths.sum())
            self.passes += len(found)
            # copies: a piece is a view, and one kept in memory would hold its whole pack
            features = [piece.clone() for piece in pieces]
            for look, piece in zip(found, features, strict=True):
                if not torch.isfinite(piece).all():
                    raise ValueError(
                        f"{self.clips.names[look.clip]}: the encoder's features are not finite, or "
                        "beyond what fp16 holds (65504): its weights are damaged, or not "
                        "normalised at their end"
                    )
                self._cache.put(look, piece, comes_again=self._comes_again(look))
            yield found, features


def crop_batches(
    features: ClipFeatures, indices: np.ndarray, batch_size: int, ranks: Ranks
) -> Iterator[FeatureBatch]:
    """Features of all crops of the clips `indices` that fall to this rank, batch_size clips at a
    time. The crops of a clip are in one batch."""
    mine = indices[ranks.rank :: ranks.world_size]
    starts = range(0, len(mine), batch_size)
    chunks = [mine[start : start + batch_size] for start in starts]
    return features.batches([features.crops(chunk) for chunk in chunks])


def refuse_unreadable(train: ClipFeatures, val: ClipFeatures, allow_partial: bool) -> None:
    """Let all ranks know what any of them could not read. Raises UnreadableClips for any such
    clip, or with allow_partial for a list of such clips alone. Called by all ranks."""
    # Exchanged before anything is raised: all ranks raise together, and none waits for another.
    for features in (train, val):
        for part in all_gather_json(features.unreadable):
            features.unreadable.update(part)
    unreadable = train.unreadable | val.unreadable
    if unreadable and not allow_partial:
        raise UnreadableClips(_refusal(unreadable))
    for features in (train, val):
        if all(name in features.unreadable for name in features.clips.names):
            raise UnreadableClips(f"no clip of {features.clips.split} can be read: repair the data")


def _refusal(unreadable: dict[str, str]) -> str:
    """Why there is no accuracy."""
    in_order = sorted(unreadable.items())
    clips = [f"{name}: {reason}" for name, reason in in_order]
    lines = [
        f"{len(clips)} clips cannot be evaluated, so there is no accuracy:",
        *clips[:MAX_LISTED],
    ]
    if len(clips) > MAX_LISTED:
        lines.append(f"and {len(clips) - MAX_LISTED} more")
    return "\n  ".join(lines) + "\nrepair or remove them, or accept the rest with --allow-partial"
