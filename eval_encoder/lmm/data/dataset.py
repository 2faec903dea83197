"""Conversations and their images and clips -> batches of an LmmForConditionalGeneration.

    Sample -> visuals read or their features taken from the store -> placeholders counted by the
    model's own rule -> ids and labels (conversation.py) -> padded batch

Everything is lazy: a list costs its text. A visual that cannot be read stops the training with the
sample's name; whether all files exist is checked beforehand (conversation.stage_samples). Cost:
that of visuals.py.

Shape legend: B samples, T tokens, N items (images and clips).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from model_factory.llava.towers import Grid, VisualInputs

from ..model.lmm import Visuals
from .conversation import IGNORE_INDEX, Sample, Visual, encode, read_samples, words
from .features import FeatureStore, StoredItem
from .visuals import VisualItem, VisualReader, packed_inputs, read_visual

TokensFor = Callable[[Grid | None, int], int]


@dataclass(frozen=True)
class Example:
    """One sample, ready but for padding; a visual is read or stored."""

    input_ids: list[int]
    labels: list[int]
    visuals: Sequence[VisualItem | StoredItem]


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
        tokenizer: PreTrainedTokenizerBase,
        text: TextConfig,
        reader: VisualReader,
        tokens_for: TokensFor,
        store: FeatureStore | None = None,
    ) -> None:
        """tokens_for(grid, patches): placeholders of an item."""
        self.samples = samples
        self.tokenizer = tokenizer
        self.text = text
        self.reader = reader
        self.tokens_for = tokens_for
        self.store = store

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> "ConversationDataset":
        """The samples of a list; `options` are those of the class."""
        return cls(read_samples(path), **options)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example:
        """Raises ValueError that names sample and file."""
        sample = self.samples[index]
        visuals = [self._visual(sample, visual) for visual in sample.visuals]
        # visuals come first: their sizes decide how many placeholders the text has
        counts = [visual_tokens(visual, self.tokens_for) for visual in visuals]
        encoded = encode(
            sample,
            tokenizer=self.tokenizer,
            version=self.text.version,
            visual_tokens=counts,
            image_token_id=self.text.image_token_id,
            max_length=self.text.max_length,
        )
        return Example(encoded.input_ids, encoded.labels, visuals)

    @property
    def lengths(self) -> list[int]:
        """Words of every sample, negative for text-only ones, as ModalityLengthSampler takes."""
        return [words(s) if s.visuals else -words(s) for s in self.samples]

    @property
    def visuals(self) -> list[Visual]:
        """All different visuals, in order of their first use."""
        visuals = [visual for sample in self.samples for visual in sample.visuals]
        return list(dict.fromkeys(visuals))

    def _visual(self, sample: Sample, visual: Visual) -> VisualItem | StoredItem:
        if self.store is not None:
            return self.store.get(visual)
        return read_visual(self.reader, visual=visual, name=f"sample {sample.id!r}")


def visual_tokens(visual: VisualItem | StoredItem, tokens_for: TokensFor) -> int:
    """Placeholders of one visual; a clip given as images counts all of them."""
    # the model's own rule counts, so that placeholders and tokens cannot disagree
    if isinstance(visual, StoredItem):
        return tokens_for(visual.grid, visual.patches) * visual.count
    grid = visual.grids[0]
    if visual.pictures is not None and grid is not None:
        frames, rows, columns = grid
        return tokens_for(grid, frames * rows * columns) * len(visual.pictures)
    return tokens_for(grid, len(cast(torch.Tensor, visual.rows)))


@dataclass(frozen=True)
class Collator:
    """Examples -> keyword arguments of LmmForConditionalGeneration.forward. `left` pads on the
    left, for generation."""

    pad_token_id: int
    left: bool = False
    store: FeatureStore | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """input_ids, attention_mask, labels int64 [B, T] and `visuals`."""
        batch: dict[str, Any] = {
            "input_ids": self._padded([e.input_ids for e in examples], self.pad_token_id),
            "attention_mask": self._padded([[1] * len(e.input_ids) for e in examples], 0),
            "labels": self._padded([e.labels for e in examples], IGNORE_INDEX),
        }
        visuals = collate_visuals([example.visuals for example in examples], self.store)
        if visuals is not None:
            batch["visuals"] = visuals
        return batch

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

    Raises ValueError where images of different sizes meet in a tower that takes one size.
    """
    items: list[VisualItem] = []
    stored: list[StoredItem] = []
    samples: list[int] = []  # of every image or clip, the row of the batch
    for row, group in enumerate(visuals):
        for visual in group:
            if isinstance(visual, StoredItem):
                stored.append(visual)
                # for a tower of images, every frame of a clip is an item
                samples += [row] * visual.count
            else:
                items.append(visual)
                samples += [row] * len(visual.grids)
    if not samples:
        return None
    # with a store all visuals are stored ones (ConversationDataset._visual)
    if store is not None and stored:
        states = store.states(stored)
        return Visuals(inputs=None, samples=torch.tensor(samples), states=states)
    images = [item.pictures for item in items if item.pictures is not None]
    # a tower takes packs or images, so either all items have images or none has
    if not images:
        return Visuals(inputs=packed_inputs(items), samples=torch.tensor(samples))
    different = {tuple(image.shape[-2:]) for image in images}
    sizes = sorted(different)
    if len(sizes) > 1:
        raise ValueError(
            f"pictures and clips of {sizes} pixels meet in a tower that takes one size at a "
            "time: set --video_size to that of the pictures, and take an image processor that "
            "crops"
        )
    inputs = VisualInputs(pixel_values=torch.cat(images))
    return Visuals(inputs=inputs, samples=torch.tensor(samples))
