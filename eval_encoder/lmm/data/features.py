"""Cache of hidden states of a frozen vision tower, one entry per image or clip.

    entry   int16 [1 + tokens, states * D + 3]: the hidden states that the projector reads, side by
            side, as the bits of fp16, and the (t, h, w) position of each patch of a pack; the first
            row holds grid, patches and number of items

Stored by eval_encoder/feature_cache.py under a key of tower, layers and reading; so another tower,
size or file is never answered by old features, and later epochs never run the tower. Worth it where
the tower is frozen and images are not augmented, as in stage 1. Cost on disk: tokens * states * D *
2 bytes an image, 1.2 MB for CLIP-L/14-336.
"""

from collections.abc import Iterable, Sequence
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
from .visuals import VisualReader, packed_inputs, read_visual

POSITIONS = 3  # columns: t, h, w
HEAD = 5  # numbers of the first row: grid, patches, items
FEATURES_VERSION = 1  # goes up whenever equal files and settings would give other features


@dataclass(frozen=True)
class StoredItem:
    """Features of one visual: rows int16 [count * tokens, states * D + 3], `count` items (images
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
        tower = model.tower
        if isinstance(tower, CrossGetTower):
            raise ValueError(
                "--feature_cache cannot hold reduced tokens: leave it out with CrossGET"
            )
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError("--feature_cache is for a frozen tower, this one learns: leave it out")
        self._tower = tower
        self._layers = model.needed_layers
        self._reader = reader
        self._copies_blocks = isinstance(model.projector, ViTSplit)
        key = {
            "tower": weights_sha256(str(tower.model.config), tower.state_dict()),
            "layers": self._layers,
            "reading": [asdict(reader.config), reader.processor.to_dict()],
            "versions": [FEATURES_VERSION, DECOMPOSITION_VERSION],
        }
        self._cache: FeatureCache[Visual] = FeatureCache(folder, key, identity=self._identity)

    def get(self, visual: Visual) -> StoredItem:
        """Features of a visual: stored, or computed and stored where the entry is damaged or gone.

        Raises ValueError where they cannot be computed: in a process that loads data for a tower on
        a GPU, which such a process cannot use.
        """
        entry = self._cache.get(visual)
        if entry is None:
            device = next(self._tower.parameters()).device
            if device.type != "cpu" and torch.utils.data.get_worker_info() is not None:
                raise ValueError(
                    f"the stored features of {visual.path} were lost while the stage ran: start it "
                    "again; it computes them and goes on from its last checkpoint"
                )
            entry = self._make(visual)
        frames, rows, columns, patches, count = entry[0, :HEAD].tolist()
        grid = (frames, rows, columns) if rows else None
        return StoredItem(rows=entry[1:], grid=grid, patches=patches, count=count)

    def fill(self, visuals: Iterable[Visual]) -> int:
        """Compute and store what is absent; returns how many were computed."""
        absent = [visual for visual in visuals if not self._cache.has(visual)]
        for visual in absent:
            self._make(visual)
        return len(absent)

    @torch.no_grad()
    def _make(self, visual: Visual) -> torch.Tensor:
        """Compute and store an entry, and return it: int16 [1 + tokens, states * D + 3]."""
        item = read_visual(self._reader, visual=visual, name="feature cache")
        if item.pictures is None:
            inputs = packed_inputs([item])
        else:
            inputs = VisualInputs(pixel_values=item.pictures)
        is_training = self._tower.training  # as the Trainer sets it, also for what is frozen
        # without dropout: every epoch reads the same entry
        self._tower.eval()
        device = next(self._tower.parameters()).device
        states = self._tower(inputs.to(device), self._layers)
        self._tower.train(is_training)
        self._check_call(states)
        # the bits of fp16 as int16, so that one tensor holds states and positions
        columns = [
            states.states[layer].flatten(0, -2).half().cpu().view(torch.int16)
            for layer in self._layers
        ]
        positions = item.positions
        if positions is None:
            positions = torch.zeros(len(columns[0]), POSITIONS)
        columns.append(positions.to(torch.int16))
        rows = torch.cat(columns, dim=1)
        head = torch.zeros(1, rows.shape[1], dtype=torch.int16)
        grid = item.grids[0] or (0, 0, 0)
        patches = states.lengths[0]
        count = len(states.lengths)
        head[0, :HEAD] = torch.tensor([*grid, patches, count])
        entry = torch.cat([head, rows])
        self._cache.put(visual, entry)
        return entry

    def states(self, items: Sequence[StoredItem]) -> TowerStates:
        """States as the tower would have given them, in fp32."""
        rows = torch.cat([item.rows for item in items])
        lengths: list[int] = []
        grids: list[Grid | None] = []
        for item in items:
            lengths += [item.patches] * item.count
            grids += [item.grid] * item.count
        width = (rows.shape[1] - POSITIONS) // len(self._layers)
        widths = [width] * len(self._layers) + [POSITIONS]
        *columns, positions = rows.split(widths, dim=1)
        # class and register tokens of every image
        first = items[0]
        tokens_per_image = len(first.rows) // first.count
        num_extra = tokens_per_image - first.patches
        by_layer = {}
        for layer, bits in zip(self._layers, columns, strict=True):
            states = bits.contiguous().view(torch.float16).float()
            if not isinstance(self._tower, PackedTower):  # images of one size
                states = states.unflatten(0, (len(lengths), -1))
            by_layer[layer] = states
        return TowerStates(by_layer, lengths, grids, num_extra, positions=positions.long())

    def _check_call(self, states: TowerStates) -> None:
        """Copied blocks must be callable again from what is stored."""
        args, kwargs = states.call or ((), {})
        has_tensors = any(
            isinstance(value, torch.Tensor | tuple) for value in (*args, *kwargs.values())
        )
        if self._copies_blocks and has_tensors and not isinstance(self._tower, PackedTower):
            raise ValueError(
                "--feature_cache with vitsplit: the blocks of this tower are called with positions "
                "that are not stored; leave the cache out"
            )

    def _identity(self, visual: Visual) -> str:
        return f"{visual.kind} {visual.path} {self._reader.identity(visual)}"
