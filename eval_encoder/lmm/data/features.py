"""What a frozen tower says of every picture, stored once: later epochs never run it.

    of a visual   int16 [1 + tokens, states * D + 3]: the hidden states that the projector reads,
                  side by side, as the bits of fp16, and the (t, h, w) position of each patch of a
                  pack; the first row holds grid, patches and number of items

Kept by probe_cache.FeatureCache under a key of tower, layers and reading; so another tower, another
size or another file is never answered by old features. Worth it where the tower is frozen and
pictures are not augmented, as in stage 1. Cost on disk: tokens * states * D * 2 bytes a picture,
1.2 MB for CLIP-L/14-336.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data_pipeline.codec.decompose import DECOMPOSITION_VERSION
from model_factory.llava.crossget import CrossGetTower
from model_factory.llava.towers import Grid, PackedTower, TowerStates, VisualInputs
from model_factory.llava.vit_split import ViTSplit

from ...feature_cache import FeatureCache, weights_sha256
from ..model.lmm import LmmForConditionalGeneration
from .conversation import Visual
from .visuals import VisualItem, VisualReader, read_visual

POSITIONS, HEAD = 3, 5  # numbers
FEATURES_VERSION = 1  # goes up whenever equal files and settings would give other features


@dataclass(frozen=True)
class StoredItem:
    """Features of one visual: rows int16 [count * tokens, states * D + 3], `count` items (pictures
    of a clip, else one) of the same `grid` with `patches` patches each."""

    rows: torch.Tensor
    grid: Grid | None
    patches: int
    count: int


class FeatureStore:
    """Features of a model's tower below a folder."""

    def __init__(
        self, folder: Path, model: LmmForConditionalGeneration, reader: VisualReader
    ) -> None:
        """Raises ValueError where the tower learns, or where it gives more than its patches."""
        if isinstance(model.tower, CrossGetTower):
            raise ValueError(
                "--feature_cache cannot hold reduced tokens: leave it out with CrossGET"
            )
        tower = model.tower
        if any(p.requires_grad for p in tower.parameters()):
            raise ValueError("--feature_cache is for a frozen tower, this one learns: leave it out")
        self._tower, self._layers, self._reader = tower, model.needed_layers, reader
        self._copies_blocks = isinstance(model.projector, ViTSplit)
        key = {
            "tower": weights_sha256(str(tower.model.config), tower.state_dict()),
            "layers": self._layers,
            "reading": [asdict(reader.config), reader.processor.to_dict()],
            "versions": [FEATURES_VERSION, DECOMPOSITION_VERSION],
        }
        self._cache = FeatureCache(folder, key, memory_bytes=0, identity=self._identity)

    def get(self, visual: Visual) -> StoredItem:
        """Features of a visual: stored, or computed and stored where the entry is damaged or gone.

        Raises ValueError where they cannot be computed: in a process that loads data for a tower on
        a GPU, which such a process cannot use.
        """
        stored = self._cache.get(visual, comes_again=False)
        if stored is None:
            device = next(self._tower.parameters()).device
            if device.type != "cpu" and torch.utils.data.get_worker_info() is not None:
                raise ValueError(
                    f"the stored features of {visual.path} were lost while the stage ran: start it "
                    "again; it computes them and goes on from its last checkpoint"
                )
            stored = self._make(visual)
        frames, rows, columns, patches, count = stored[0, :HEAD].tolist()
        grid = (frames, rows, columns) if rows else None
        return StoredItem(stored[1:], grid, patches, count)

    def fill(self, visuals: Iterable[Visual]) -> int:
        """Compute and store what is not there; returns how many were computed."""
        computed = 0
        for visual in visuals:
            if not self._cache.has(visual):
                self._make(visual)
                computed += 1
        return computed

    @torch.no_grad()
    def _make(self, visual: Visual) -> torch.Tensor:
        """Compute and store an entry, and return it: int16 [1 + tokens, states * D + 3]."""
        device = next(self._tower.parameters()).device
        item = read_visual(self._reader, visual, "feature cache")
        is_training = self._tower.training  # as the Trainer sets it, also for what is frozen
        self._tower.eval()
        states = self._tower(_inputs(item).to(device), self._layers)
        self._tower.train(is_training)
        self._check_call(states)
        kept = [states.states[layer].flatten(0, -2) for layer in self._layers]
        kept = [part.half().cpu().view(torch.int16) for part in kept]
        kept.append(self._positions(item, len(kept[0])).to(torch.int16))
        rows = torch.cat(kept, dim=1)
        head = torch.zeros(1, rows.shape[1], dtype=torch.int16)
        numbers = (*(item.grids[0] or (0, 0, 0)), states.lengths[0], len(states.lengths))
        head[0, :HEAD] = torch.tensor(numbers)
        entry = torch.cat([head, rows])
        self._cache.put(visual, entry, comes_again=False)
        return entry

    def states(self, items: list[StoredItem]) -> TowerStates:
        """As the tower would have given them, in fp32."""
        rows = torch.cat([item.rows for item in items])
        lengths = [item.patches for item in items for _ in range(item.count)]
        grids = [item.grid for item in items for _ in range(item.count)]
        width = (rows.shape[1] - POSITIONS) // len(self._layers)
        *parts, positions = rows.split([width] * len(self._layers) + [POSITIONS], dim=1)
        extra = len(items[0].rows) // items[0].count - items[0].patches
        parts = [part.contiguous().view(torch.float16).float() for part in parts]
        if not isinstance(self._tower, PackedTower):  # pictures of one size
            parts = [part.unflatten(0, (len(lengths), -1)) for part in parts]
        states = dict(zip(self._layers, parts, strict=True))
        return TowerStates(states, lengths, grids, extra, positions=positions.long())

    def _check_call(self, states: TowerStates) -> None:
        """Copied blocks must be callable again from what is stored."""
        args, kwargs = states.call or ((), {})
        tensors = any(
            isinstance(value, torch.Tensor | tuple) for value in (*args, *kwargs.values())
        )
        if self._copies_blocks and tensors and not isinstance(self._tower, PackedTower):
            raise ValueError(
                "--feature_cache with vitsplit: the blocks of this tower are called with positions "
                "that are not stored; leave the cache out"
            )

    def _positions(self, item: VisualItem, tokens: int) -> torch.Tensor:
        if item.positions is None:
            return torch.zeros(tokens, POSITIONS)
        return item.positions

    def _identity(self, visual: Visual) -> str:
        return f"{visual.kind} {visual.path} {self._reader.identity(visual)}"


def _inputs(item: VisualItem) -> VisualInputs:
    if item.pictures is not None:
        return VisualInputs(pixel_values=item.pictures)
    return VisualInputs(
        rows=item.rows,
        positions=item.positions,
        lengths=torch.tensor([len(item.rows)]),
        grids=torch.tensor([item.grids[0] or (0, 0, 0)]),
    )
