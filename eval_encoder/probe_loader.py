"""Labelled clips -> tokens of the frozen encoder, each clip once, on the rank that owns it.

Clip i belongs to rank i mod W. Packed shards are read where they exist, raw videos otherwise.
Tokens are kept in memory as fp16 while they fit the cache, so later epochs cost no encoding; beyond
it they are computed again each epoch.
"""

from collections.abc import Iterator

import torch

from data_pipeline.errors import RejectedInput
from data_pipeline.loading.choices import ViewConfig
from data_pipeline.loading.packing import PackedBatch, pack_views
from data_pipeline.loading.sequential import sequential_batches
from data_pipeline.shards.manifest import load_manifest
from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

from .probe_config import ProbeConfig
from .probe_datasets import LabelledList
from .probe_video import codec_patches_of_video, frames_of_video

VIEW_OF_FAMILY = {"llava_vit_sampling": "frame", "llava_vit_codec": "codec"}


class ClipTokens:
    """Tokens of one split's clips of one rank."""

    def __init__(
        self,
        clips: LabelledList,
        config: ProbeConfig,
        encoder: LlavaViTPackingModel,
        device,
        rank: int,
        world_size: int,
    ):
        self.labels = clips.labels
        self.unreadable: dict[str, str] = {}
        self._clips, self._config, self._encoder, self._device = clips, config, encoder, device
        self._cache: dict[int, torch.Tensor] = {}
        self._cache_bytes = int(config.cache_gb * (1 << 30))
        self._sample_ids = None
        if clips.shards is not None:
            self._manifest = load_manifest(clips.shards)
            self._check_stored()
            self._sample_ids = {name: i for i, name in enumerate(self._manifest.sources())}
        self.indices = list(range(rank, len(clips.names), world_size))
        if self._sample_ids is not None:
            absent = [i for i in self.indices if clips.names[i] not in self._sample_ids]
            self.unreadable.update({clips.names[i]: "not in the packed shards" for i in absent})
            self.indices = [i for i in self.indices if clips.names[i] in self._sample_ids]

    @property
    def num_readable(self) -> int:
        """Clips of this rank that have tokens; right after warm_up."""
        return sum(self._clips.names[i] not in self.unreadable for i in self.indices)

    def batches(
        self, order: list[int], batch_size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, torch.Tensor]]:
        """(tokens [S, C], cu_seqlens [N+1], longest, labels [N]) of the clips `order`,
        unreadable ones left out.
        """
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            fresh = dict(self._encode([i for i in chunk if i not in self._cache]))
            self._remember(fresh)
            known = {i: self._cache.get(i, fresh.get(i)) for i in chunk}
            known = {i: tokens for i, tokens in known.items() if tokens is not None}
            if not known:
                continue
            lengths = [len(tokens) for tokens in known.values()]
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            labels = torch.tensor([self.labels[i] for i in known])
            tokens = torch.cat(list(known.values())).to(self._device).float()
            yield tokens, bounds.to(self._device), max(lengths), labels.to(self._device)

    def _check_stored(self) -> None:
        """A budget beyond what is packed would silently be a smaller one."""
        config = self._config
        kept = max(s["num_patches"] for shard in self._manifest.shards for s in shard["samples"])
        frames = self._manifest.settings["num_full_frames"]
        if config.family == "llava_vit_codec" and config.num_tokens > kept:
            raise ValueError(
                f"--K_keep {config.num_tokens}: {self._clips.shards} keeps {kept} patches a clip; "
                f"pass --K_keep {kept} or pack with a larger --budget"
            )
        if config.family == "llava_vit_sampling" and config.num_frames > frames:
            raise ValueError(
                f"--num_frames {config.num_frames}: {self._clips.shards} stores {frames} frames "
                f"a clip; pass --num_frames {frames} or pack with more --full-frames"
            )

    def warm_up(self, batch_size: int) -> None:
        """Encode every clip once, keeping what fits; afterwards `unreadable` is complete."""
        for start in range(
            0, len(self.indices), 16 * batch_size
        ):  # long runs keep the decoder's pipeline busy
            self._remember(
                dict(self._encode(self.indices[start : start + 16 * batch_size], batch_size))
            )

    def _remember(self, fresh: dict[int, torch.Tensor]) -> None:
        for index, tokens in fresh.items():
            size = tokens.numel() * tokens.element_size()
            if size <= self._cache_bytes:
                self._cache[index] = tokens
                self._cache_bytes -= size

    @torch.inference_mode()
    def _encode(
        self, indices: list[int], batch_size: int = 32
    ) -> Iterator[tuple[int, torch.Tensor]]:
        for batch in self._packs(indices, batch_size):
            moved = batch.to(self._device)
            with torch.autocast(
                self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"
            ):
                tokens = self._encoder(**moved.model_inputs()).last_hidden_state
            pieces = tokens.half().cpu().split(batch.cu_seqlens.diff().tolist())
            yield from zip(
                batch.sample_ids.tolist(), (piece.clone() for piece in pieces), strict=True
            )

    def _packs(self, indices: list[int], batch_size: int) -> Iterator[PackedBatch]:
        """Packs whose sample_ids are list indices."""
        if not indices:
            return
        config, names = self._config, self._clips.names
        view = VIEW_OF_FAMILY[config.family]
        if self._sample_ids is not None:
            per_frame = self._frame_tokens()
            limit = config.num_tokens if view == "codec" else config.num_frames * per_frame
            by_sample = {self._sample_ids[names[i]]: i for i in indices}
            view_config = ViewConfig(max_tokens=limit, max_frames=config.num_frames)
            for batch in sequential_batches(
                self._manifest, by_sample, batch_size, view, view_config
            ):
                batch.sample_ids.copy_(torch.tensor([by_sample[int(i)] for i in batch.sample_ids]))
                yield batch
            return
        for start in range(0, len(indices), batch_size):
            yield from self._raw_pack(indices[start : start + batch_size], view)

    def _frame_tokens(self) -> int:
        """Most patches that one whole frame of the packed split has."""
        samples = (sample for shard in self._manifest.shards for sample in shard["samples"])
        return max(sample["grid"][0] * sample["grid"][1] for sample in samples)

    def _raw_pack(self, indices: list[int], view: str) -> Iterator[PackedBatch]:
        config, patch_size = self._config, self._encoder.config.patch_size
        common = (config.input_size, patch_size, config.target_frames)
        views, kept = [], []
        for index in indices:
            path = self._clips.folder / self._clips.names[index]
            try:
                if view == "codec":
                    views.append(
                        codec_patches_of_video(path, config.num_tokens, *common, config.gop)
                    )
                else:
                    views.append(frames_of_video(path, config.num_frames, *common, config.decoder))
                kept.append(index)
            except RejectedInput as rejection:
                self.unreadable[self._clips.names[index]] = rejection.reason
        if views:
            count = len(views)
            yield pack_views(
                views,
                torch.tensor(kept),
                torch.zeros(count, 0, dtype=torch.int64),
                torch.ones(count),
            )
