"""Clips -> features of the frozen encoder, batch by batch, each look encoded once.

    read (threads, shards) -> pack -> encoder -> fp16 features [L, C] -> cache -> batches

Attentive heads take all tokens of a clip, the others its pooled vector (L = 1). What is in the
cache is neither read nor encoded.
"""

import time
from collections import deque
from collections.abc import Iterator

import torch

from data_pipeline.codec.decompose import DECOMPOSITION_VERSION
from training.distributed import all_gather_json

from ..feature_cache import FeatureCache
from .benchmarks import LabelledList
from .clips import Look, chosen_decoder
from .config import ProbeConfig
from .encoders import ProbeEncoder
from .loader import open_clips

FEATURES_VERSION = 2  # goes up whenever equal files and settings would give other features


class UnreadableClips(ValueError):
    """Clips that cannot be judged, so that there is no accuracy."""


class ClipFeatures:
    """Features of one split. `unreadable`: {name: reason} so far; `encode_s`: seconds inside of
    the encoder; `passes`: looks encoded so far."""

    def __init__(
        self, clips: LabelledList, config: ProbeConfig, encoder: ProbeEncoder, device: torch.device
    ):
        self.clips, self._config, self._encoder, self._device = clips, config, encoder, device
        size = encoder.size or config.input.size
        self._reader = open_clips(clips, config.input, size, encoder.patch_size)
        self.unreadable, self.about = self._reader.unreadable, self._reader.about
        self._pooled = config.heads.kind != "attentive"
        self.encode_s, self.passes, self._tokens = 0.0, 0, 0
        key = {"encoder": encoder.sha256, "pooled": self._pooled, "size": size}
        key |= {"decoder": chosen_decoder(config.input), "input": config.input.identity()}
        key |= {"device": device.type, "versions": [FEATURES_VERSION, DECOMPOSITION_VERSION]}
        room = int(config.cache_gb * (1 << 30))
        self._cache = FeatureCache(config.cache_dir, key, room, self._identity)

    def find_missing(self, rank: int, world_size: int) -> None:
        """Note files that are not there, of this rank's share, before anything is decoded."""
        self._reader.find_missing(range(rank, len(self.clips), world_size))

    def tokens_per_clip(self) -> float:
        """Mean number of tokens of a clip's crops together over all ranks, which all call this;
        encodes a clip where all was stored."""
        config = self._config.input
        seen = all_gather_json([self._tokens, self.passes])
        if not any(passes for _, passes in seen):
            for index in range(len(self.clips)):
                if next(self._encoded([Look(index)]))[1] is not None:
                    break
            seen = [[self._tokens, self.passes]]
        tokens, passes = (sum(values) for values in zip(*seen, strict=True))
        return tokens / max(1, passes) * config.temporal_crops * config.spatial_crops

    def plain_looks(self, indices) -> list[Look]:
        """The one look at each clip that chooses nothing by chance."""
        return [Look(int(i)) for i in indices]

    def drawn_looks(self, indices, epoch: int) -> list[Look]:
        """Training looks of an epoch (from 1): drawn versions where the clips have several."""
        views = self._config.input.train_views
        if views == 1 or not self._reader.several_versions:
            return self.plain_looks(indices)
        version = 1 + (epoch - 1) % views if views else epoch
        return [Look(int(i), version) for i in indices]

    def crops(self, indices) -> list[Look]:
        """All crops of each clip, one clip after the other."""
        times, squares = self._config.input.temporal_crops, self._config.input.spatial_crops
        within = [(t + 0.5) / times for t in range(times)]
        across = [0.5] if squares == 1 else [s / (squares - 1) for s in range(squares)]
        return [Look(int(i), 0, t, s) for i in indices for t in within for s in across]

    def _identity(self, look: Look) -> str:
        """Text that changes with what is seen: the clip's content, the place, and the draw."""
        place = f"{self._reader.identity(look.clip)} {look.within} {look.across}"
        config = self._config.input
        draw = f" {look.clip} {look.version} {config.seed} {config.augmentations}"
        return place + draw * (look.version > 0)

    def batches(self, batches: list[list[Look]]) -> Iterator[tuple[list[Look], list[torch.Tensor]]]:
        """(readable looks, their features fp32 [L_i, C] on the device) of every batch of looks."""
        wanted = [look for batch in batches for look in batch]
        missing = [look for look in wanted if not self._cache.has(look)]
        fresh, absent = self._encoded(missing), set(missing)
        for batch in batches:
            found = []
            for look in batch:
                features = next(fresh)[1] if look in absent else self._stored(look)
                if features is None and look not in absent:  # stored, but damaged
                    features = next(self._encoded([look]))[1]
                if features is not None:
                    found.append((look, features.to(self._device).float()))
            yield [look for look, _ in found], [features for _, features in found]

    def _stored(self, look: Look) -> torch.Tensor | None:
        return self._cache.get(look, self._comes_again(look))

    def _comes_again(self, look: Look) -> bool:
        """Whether a later epoch will look the same way."""
        return look.version == 0 or self._config.input.train_views > 0

    def _encoded(self, looks: list[Look]) -> Iterator[tuple[Look, torch.Tensor | None]]:
        """(look, features) of every look in order; None for clips that cannot be read."""
        names, order = self.clips.names, deque(looks)
        readable = [look for look in looks if names[look.clip] not in self.unreadable]
        for found, pieces in self._packs(readable):
            for look, piece in zip(found, pieces, strict=True):
                while order[0] != look:
                    yield order.popleft(), None
                yield order.popleft(), piece
        for look in order:
            yield look, None

    def _packs(self, looks: list[Look]) -> Iterator[tuple[list[Look], list[torch.Tensor]]]:
        """(looks, their features) of what can be read, a pack at a time, kept in the cache."""
        for found, batch in self._reader.packs(looks, self._config.heads.batch_size):
            started = time.perf_counter()
            encoded = self._encoder(batch.to(self._device))
            if self._pooled:
                pieces = encoded.pooled.half().cpu().split(1)
            else:
                pieces = encoded.tokens.half().cpu().split(encoded.lengths.tolist())
            self.encode_s += time.perf_counter() - started
            self._tokens += int(encoded.lengths.sum())
            self.passes += len(found)
            pieces = [piece.clone() for piece in pieces]
            for look, piece in zip(found, pieces, strict=True):
                self._check_finite(look, piece)
                self._cache.put(look, piece, self._comes_again(look))
            yield found, pieces

    def _check_finite(self, look: Look, features: torch.Tensor) -> None:
        if not torch.isfinite(features).all():
            raise ValueError(
                f"{self.clips.names[look.clip]}: the encoder's features are not finite, or beyond "
                "what fp16 holds (65504): its weights are damaged, or not normalised at their end"
            )


def refuse_unreadable(train: ClipFeatures, val: ClipFeatures, allow_partial: bool) -> None:
    """All ranks learn what any of them could not read, and raise UnreadableClips unless a part of
    the clips is good enough. Called by all ranks."""
    for features in (train, val):
        for part in all_gather_json(features.unreadable):
            features.unreadable.update(part)
    unreadable = train.unreadable | val.unreadable
    if unreadable and not allow_partial:
        raise UnreadableClips(refusal(unreadable))
    for features in (train, val):
        if all(name in features.unreadable for name in features.clips.names):
            raise UnreadableClips(f"no clip of {features.clips.split} can be read: repair the data")


def refusal(unreadable: dict[str, str], most: int = 50) -> str:
    """Why there is no accuracy."""
    lines = [f"{name}: {reason}" for name, reason in sorted(unreadable.items())]
    more = [f"and {len(lines) - most} more"] * (len(lines) > most)
    return "\n  ".join(
        [f"{len(lines)} clips cannot be judged, so there is no accuracy:", *lines[:most], *more]
    ) + ("\nrepair or remove them, or accept the rest with --allow-partial")
