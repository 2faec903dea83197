"""Views of a decoded sample; pure functions from pixels to patches with positions.

    codec    the stored patches with their true (t, h, w), a prefix of any length
    frame    F whole frames, one from each of F bins of the stored frames
    tubes    the same frames, several of them in one token
    collage  the same frames stacked into one tall image: t = 0, rows go on counting
    image    one image, t = 0

Nothing is copied here unless pixels change (flip, shrinking, exchanged channels) or frames are
joined (tubes): a view holds strided windows into the decoded image, and packing writes them into
the rows of the pack.

Shape legend: K tokens of the item, P patch dim, M stored frames, F chosen frames, H, W image, p
patch size.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from model_factory.packing import (
    compute_patch_positions_with_interpolated_temporal,
    gain_and_offset,
)

from ..shards.schema import TILE_COLUMNS, SampleInfo, strip_rows, tile_side
from .choices import scaled_grid

NORMALISATION = gain_and_offset()


@dataclass(frozen=True)
class View:
    """One item of a pack.

    pieces     uint8 tensors [..., 3, p, p], of any strides, that hold K patches in order; of tubes
               of f frames [..., 3, f * p, p]
    positions  int64 [K, 3]: (t, h, w)
    grid       (t, h, w) with t*h*w = K
    colour     float32 [2, 3]: gain and offset of the channels that make a byte a model input
    is_sparse  whether the patches are a selection instead of whole frames
    """

    pieces: tuple[torch.Tensor, ...]
    positions: torch.Tensor
    grid: tuple[int, int, int]
    colour: torch.Tensor = NORMALISATION
    is_sparse: bool = False

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def patch_dim(self) -> int:
        """P."""
        return self.pieces[0].shape[-3:].numel()

    def write(self, rows: torch.Tensor) -> None:
        """Copy the patches into uint8 rows [K, P]."""
        start = 0
        for piece in self.pieces:
            count = piece.shape[:-3].numel()
            target = rows[start : start + count].view(piece.shape)
            target.copy_(piece)
            start += count


def codec_view(
    mosaic: torch.Tensor, positions: np.ndarray, patch_size: int, max_tokens: int
) -> View:
    """Stored patches of a mosaic uint8 [h, w, 3]; the first `max_tokens` of them.
    The grid of a sparse item is (1, 1, K).
    """
    # the order of stored patches is the contract: any prefix holds the best ones
    count = min(len(positions), max_tokens)
    tiles = _windows(mosaic, tile_side(patch_size))
    # a tile is a patch padded to whole JPEG blocks
    tiles = tiles[..., :patch_size, :patch_size]
    whole_rows, rest = divmod(count, TILE_COLUMNS)
    pieces = [tiles[:whole_rows]]
    if rest:
        pieces.append(tiles[whole_rows, :rest])
    return View(
        pieces=tuple(pieces),
        positions=torch.from_numpy(positions[:count].astype(np.int64)),
        grid=(1, 1, count),
        is_sparse=True,
    )


def frame_view(
    strip: torch.Tensor, info: SampleInfo, chosen: np.ndarray, scale: float = 1.0
) -> View:
    """Whole frames `chosen` (indices of stored frames) of a strip uint8 [M*rows, W, 3],
    at their true times.
    """
    stored = strip.unflatten(0, (-1, strip_rows(info.height)))
    frames = []
    for i in chosen:
        frame = stored[int(i), : info.height]  # a strip's rows are padded to whole JPEG blocks
        frames.append(shrink(frame, patch_size=info.patch_size, scale=scale))
    times = torch.tensor([info.frame_times[i] for i in chosen])
    return still_view(frames, patch_size=info.patch_size, times=times)


def still_view(frames: list[torch.Tensor], patch_size: int, times: torch.Tensor) -> View:
    """Whole images uint8 [H, W, 3] of one size at times [F], integers 0 to TIME_BASE - 1."""
    pieces = tuple(_windows(frame, patch_size) for frame in frames)
    rows, columns = pieces[0].shape[:2]
    key = tuple(times.flatten().tolist())  # which the cache of positions can hash
    positions = _grid_positions(key, rows=rows, columns=columns)
    return View(pieces, positions=positions, grid=(len(frames), rows, columns))


def collage_view(view: View) -> View:
    """The frames of a frame view as one image of F * H rows."""
    times, rows, columns = view.grid
    positions = _grid_positions((0,), rows=times * rows, columns=columns)
    return replace(view, positions=positions, grid=(1, times * rows, columns))


def tube_view(view: View, frames: int) -> View:
    """The frames of a frame view, `frames` successive ones to a token. An image, which is a view of
    one frame, is that often in its tokens.

    The patches of one place stand one below the other inside each channel, so that rows stay
    channel first and a mirrored or recoloured tube is one of mirrored or recoloured frames. Its
    time is the mean of its frames' times, halves rounded up.
    """
    if frames == 1:
        return view
    count, rows, columns = view.grid
    times = view.positions[:: rows * columns, 0]
    pieces = view.pieces
    if count == 1:
        times = times.repeat(frames)
        pieces = pieces * frames
    assert len(pieces) % frames == 0  # by choices.num_frames and the checks of configurations
    sums = times.view(-1, frames).sum(dim=1)
    means = (2 * sums + frames) // (2 * frames)
    starts = range(0, len(pieces), frames)
    return replace(
        view,
        pieces=tuple(torch.cat(pieces[start : start + frames], dim=-2) for start in starts),
        positions=_grid_positions(tuple(means.tolist()), rows=rows, columns=columns),
        grid=(len(means), rows, columns),
    )


def image_view(picture: torch.Tensor, patch_size: int, scale: float = 1.0) -> View:
    """All patches of an image uint8 [H, W, 3]."""
    small = shrink(picture, patch_size=patch_size, scale=scale)
    return still_view([small], patch_size=patch_size, times=torch.zeros(1))


def shrink(picture: torch.Tensor, patch_size: int, scale: float) -> torch.Tensor:
    """uint8 [H, W, 3] resized to `scale` of its patch grid, bilinear with antialiasing."""
    if scale == 1.0:
        return picture
    height, width = picture.shape[:2]
    rows, columns = scaled_grid(height // patch_size, columns=width // patch_size, scale=scale)
    size = (int(rows) * patch_size, int(columns) * patch_size)
    pixels = picture.movedim(-1, 0)[None]
    # only a CPU has a kernel for bytes
    source = pixels.float() if pixels.is_cuda else pixels
    small = F.interpolate(source, size, mode="bilinear", antialias=True)
    if pixels.is_cuda:
        small = small.round_().clamp_(0, 255).to(torch.uint8)
    return small[0].movedim(0, -1)


def flip(view: View, columns: int) -> View:
    """The item mirrored left to right; `columns` patches are a whole frame's width."""
    if not view.is_sparse:
        # pixels in each patch, and the columns of patches: positions stay as they are
        pieces = tuple(piece.flip(-1, -4) for piece in view.pieces)
        return replace(view, pieces=pieces)
    # sparse patches have no columns to exchange: each is mirrored, and its position moves
    positions = view.positions.clone()
    positions[:, 2] = columns - 1 - positions[:, 2]
    pieces = tuple(piece.flip(-1) for piece in view.pieces)
    return replace(view, pieces=pieces, positions=positions)


def jitter_colours(view: View, strength: float, draw: np.ndarray) -> View:
    """One random recolouring for the whole item from nine uniform numbers: channels exchanged, each
    scaled by 1 +- strength and shifted by +- strength in units of the normalised pixels. Motion and
    shape stay as they are.
    """
    # three numbers order the channels, three scale them, three shift them
    order = torch.from_numpy(np.argsort(draw[:3]))
    signed = strength * (2 * draw[3:9] - 1)  # -strength to strength
    gain, shift = torch.from_numpy(signed).float().view(2, 3)
    colour = view.colour[:, order] * (1 + gain)
    colour[1] += shift
    # pixels stay bytes: gain and shift enter the normalisation of the item
    pieces = tuple(piece[..., order.to(piece.device), :, :] for piece in view.pieces)
    return replace(view, pieces=pieces, colour=colour)


def choose_frames(num_stored: int, count: int, draw: np.ndarray | None) -> np.ndarray:
    """Indices of one stored frame from each of `count` equal bins: drawn by a uniform number each,
    or the middle ones without.
    """
    edges = np.linspace(0, num_stored, count + 1)
    inside = np.full(count, 0.5) if draw is None else draw[:count]
    widths = np.diff(edges)
    chosen = (edges[:-1] + inside * widths).astype(int)
    return np.minimum(chosen, num_stored - 1)  # rounding may reach the end of the last bin


# 0.5 microseconds where it is there, 37 where it is made. An entry has 24 bytes a token, so that
# these are 50 MB of items of 2048 tokens (ViewConfig.max_tokens); a set of many grids fills them.
@lru_cache(maxsize=1024)
def _grid_positions(times: tuple[int, ...], rows: int, columns: int) -> torch.Tensor:
    """int64 [K, 3] of whole frames; shared between views, so never written to."""
    return compute_patch_positions_with_interpolated_temporal(
        torch.tensor(times), height=rows, width=columns
    )


def _windows(picture: torch.Tensor, side: int) -> torch.Tensor:
    """Strided view of an image [H, W, 3] as squares [H / side, W / side, 3, side, side]."""
    height, width, channels = picture.shape
    squares = picture.view(height // side, side, width // side, side, channels)
    return squares.permute(0, 2, 4, 1, 3)
