"""Conversations and their pictures and clips -> batches of an LmmForConditionalGeneration.

    Sample -> visuals read or their features taken from the store -> placeholders counted by the
    model's own rule -> ids and labels (lmm_conversation.py) -> padded batch

Everything is lazy: a list costs its text. A visual that cannot be read stops the training with the
sample's name; whether all are there is asked beforehand (lmm_samples.py). Cost: that of
lmm_visuals.

Shape legend: B samples, T tokens, N items (pictures and clips).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from model_factory.llava.towers import Grid, VisualInputs

from ..model.lmm import Visuals
from .conversation import IGNORE_INDEX, Sample, Visual, encode, read_samples, words
from .features import FeatureStore, StoredItem
from .visuals import VisualItem, VisualReader, read_visual

TokensFor = Callable[[Grid | None, int], int]


@dataclass(frozen=True)
class Example:
    """One sample, ready but for padding; a visual is read or stored."""

    input_ids: list[int]
    labels: list[int]
    visuals: list[VisualItem | StoredItem]


@dataclass(frozen=True)
class TextConfig:
    """version: conversation template; max_length: tokens of a sample after its visuals."""

    version: str
    image_token_id: int
    max_length: int


class ConversationDataset(torch.utils.data.Dataset):
    """A LLaVA list, one Example per sample."""

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer,
        text: TextConfig,
        reader: VisualReader,
        tokens_for: TokensFor,
        store: FeatureStore | None = None,
    ):
        """tokens_for(grid, patches): placeholders of an item."""
        self.samples, self.tokenizer, self.text = samples, tokenizer, text
        self.reader, self.tokens_for, self.store = reader, tokens_for, store

    @classmethod
    def from_file(cls, path: str | Path, *args, **kwargs) -> "ConversationDataset":
        """The samples of a list."""
        return cls(read_samples(path), *args, **kwargs)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        """Raises ValueError that names sample and file."""
        sample = self.samples[index]
        visuals = [self._visual(sample, visual) for visual in sample.visuals]
        counts = [visual_tokens(visual, self.tokens_for) for visual in visuals]
        text = self.text
        encoded = encode(
            sample, self.tokenizer, text.version, counts, text.image_token_id, text.max_length
        )
        return Example(encoded.input_ids, encoded.labels, visuals)

    @property
    def lengths(self) -> list[int]:
        """Words of every sample, negative for text-only ones, as ModalityLengthSampler takes."""
        return [words(s) if s.visuals else -words(s) for s in self.samples]

    @property
    def visuals(self) -> list[Visual]:
        """All different visuals, in order of their first use."""
        return list(dict.fromkeys(visual for sample in self.samples for visual in sample.visuals))

    def _visual(self, sample: Sample, visual: Visual) -> VisualItem | StoredItem:
        if self.store is not None:
            return self.store.get(visual)
        return read_visual(self.reader, visual, f"sample {sample.id!r}")


def visual_tokens(visual: VisualItem | StoredItem, tokens_for: TokensFor) -> int:
    """Placeholders of one visual; a clip given as pictures counts all of them."""
    if isinstance(visual, StoredItem):
        return tokens_for(visual.grid, visual.patches) * visual.count
    if visual.pictures is not None:
        frames, rows, columns = visual.grids[0]
        return tokens_for(visual.grids[0], frames * rows * columns) * len(visual.pictures)
    return tokens_for(visual.grids[0], len(visual.rows))


@dataclass(frozen=True)
class Collator:
    """Examples -> keyword arguments of LmmForConditionalGeneration.forward. `left` pads on the
    left, for generation."""

    pad_token_id: int
    left: bool = False
    store: FeatureStore | None = None

    def __call__(self, examples: Sequence[Example]) -> dict:
        """input_ids, attention_mask, labels int64 [B, T] and `visuals`."""
        batch = {
            "input_ids": self._padded([e.input_ids for e in examples], self.pad_token_id),
            "attention_mask": self._padded([[1] * len(e.input_ids) for e in examples], 0),
            "labels": self._padded([e.labels for e in examples], IGNORE_INDEX),
        }
        visuals = collate_visuals([example.visuals for example in examples], self.store)
        return batch if visuals is None else {**batch, "visuals": visuals}

    def _padded(self, rows: list[list[int]], value: int) -> torch.Tensor:
        side = "left" if self.left else "right"
        return pad_sequence(
            [torch.tensor(row) for row in rows],
            batch_first=True,
            padding_value=value,
            padding_side=side,
        )


def collate_visuals(
    visuals: Sequence[Sequence[VisualItem | StoredItem]], store: FeatureStore | None = None
) -> Visuals | None:
    """Items of all samples in order, None where there are none.

    Raises ValueError where pictures of different sizes meet in a tower that takes one size.
    """
    flat = [(row, visual) for row, group in enumerate(visuals) for visual in group]
    if not flat:
        return None
    items = [visual for _, visual in flat]
    if isinstance(items[0], StoredItem):
        samples = [row for row, item in flat for _ in range(item.count)]
        return Visuals(None, torch.tensor(samples), store.states(items))
    samples = torch.tensor([row for row, item in flat for _ in item.grids])
    if items[0].pictures is not None:
        sizes = sorted({tuple(item.pictures.shape[-2:]) for item in items})
        if len(sizes) > 1:
            raise ValueError(
                f"pictures and clips of {sizes} pixels meet in a tower that takes one size at a "
                "time: set --video_size to that of the pictures, and take an image processor that "
                "crops"
            )
        pixels = torch.cat([item.pictures for item in items])
        return Visuals(VisualInputs(pixel_values=pixels), samples)
    inputs = VisualInputs(
        rows=torch.cat([item.rows for item in items]),
        positions=torch.cat([item.positions for item in items]),
        lengths=torch.tensor([len(item.rows) for item in items]),
        grids=torch.tensor([item.grids[0] or (0, 0, 0) for item in items]),
    )
    return Visuals(inputs, samples)
