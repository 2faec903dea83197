"""Four ways to look at a sample; pure functions from decoded pixels to patches with positions.

    codec    the stored patches with their true (t, h, w), a prefix of any length
    frame    F whole frames, one from each of F bins of the stored frames
    collage  the same frames stacked into one tall picture: t = 0, rows go on counting
    image    one picture, t = 0

Shape legend: K tokens of the item, P patch dim, M stored frames, F chosen frames, H, W picture, p
patch size.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from model_factory.packing import compute_patch_positions_with_interpolated_temporal, patchify

from ..counter_rng import counter_rng
from ..shards.schema import SampleInfo, strip_rows, tile_side

VIEWS = ("codec", "frame", "collage")
MEMBER_OF_VIEW = {
    "codec": "tiles.jpg",
    "frame": "frames.jpg",
    "collage": "frames.jpg",
    "image": "jpg",
}


@dataclass(frozen=True)
class ViewConfig:
    """How clips are looked at. The rest of the two ratios is collage;
    `max_tokens` bounds every item, `colour_jitter` is the strength of jitter_colours.
    """

    codec_ratio: float = 0.4
    frame_ratio: float = 0.4
    max_tokens: int = 2048
    max_frames: int = 8
    colour_jitter: float = 0.0

    def __post_init__(self):
        if not 0 <= self.colour_jitter < 1:
            raise ValueError(f"colour_jitter {self.colour_jitter} must lie in [0, 1)")
        if (
            min(self.codec_ratio, self.frame_ratio) < 0
            or self.codec_ratio + self.frame_ratio > 1 + 1e-9
        ):
            raise ValueError(
                f"--residual_ratio {self.codec_ratio} and --frame_sampling_ratio "
                f"{self.frame_ratio} must not be "
                "negative nor exceed 1 together (the rest is collage)"
            )
        if self.max_tokens < 1 or self.max_frames < 1:
            raise ValueError(
                f"--target_num {self.max_tokens} and --num_frames {self.max_frames} must be "
                "positive"
            )

    def choose(self, kind: str, seed: int, epoch: int, sample_id: int) -> str:
        """View of one sample in one epoch, by ratio; depends on nothing but its arguments."""
        if kind == "image":
            return "image"
        draw = counter_rng(seed, "view", epoch, sample_id).random()
        if draw < self.codec_ratio:
            return "codec"
        return "frame" if draw < self.codec_ratio + self.frame_ratio else "collage"

    def num_frames(self, grid: tuple[int, int], num_stored: int) -> int:
        """Whole frames that fit max_tokens and max_frames, at least one."""
        return max(1, min(self.max_frames, num_stored, self.max_tokens // (grid[0] * grid[1])))


@dataclass(frozen=True)
class View:
    """One item of a pack: patches float32 [K, P], positions int64 [K, 3], grid (t, h, w)
    with t*h*w = K.
    """

    patches: torch.Tensor
    positions: torch.Tensor
    grid: tuple[int, int, int]


def codec_view(
    mosaic: torch.Tensor, positions: np.ndarray, patch_size: int, max_tokens: int
) -> View:
    """Stored patches of a mosaic [3, h, w]; the first `max_tokens` of them.
    The grid of a sparse item is (1, 1, K).
    """
    count = min(len(positions), max_tokens)
    side = tile_side(patch_size)
    tiles = patchify(mosaic, side)[:count].unflatten(-1, (3, side, side))
    patches = tiles[:, :, :patch_size, :patch_size].flatten(1)
    return View(patches, torch.from_numpy(positions[:count].astype(np.int64)), (1, 1, count))


def frame_view(strip: torch.Tensor, info: SampleInfo, chosen: np.ndarray) -> View:
    """Whole frames `chosen` (indices of stored frames) of a strip [3, M*rows, W],
    at their true times.
    """
    frames = _frames(strip, info, chosen)
    times = torch.tensor([info.frame_times[i] for i in chosen])
    positions = compute_patch_positions_with_interpolated_temporal(times, *info.grid)
    return View(
        patchify(frames, info.patch_size).flatten(0, 1), positions, (len(chosen), *info.grid)
    )


def collage_view(strip: torch.Tensor, info: SampleInfo, chosen: np.ndarray) -> View:
    """The same frames as one picture of len(chosen) * H rows."""
    tall = _frames(strip, info, chosen).transpose(0, 1).flatten(1, 2)
    return image_view(tall, info.patch_size)


def image_view(picture: torch.Tensor, patch_size: int) -> View:
    """All patches of a picture [3, H, W]."""
    rows, columns = picture.shape[1] // patch_size, picture.shape[2] // patch_size
    positions = compute_patch_positions_with_interpolated_temporal(torch.zeros(1), rows, columns)
    return View(patchify(picture, patch_size), positions, (1, rows, columns))


def _frames(strip: torch.Tensor, info: SampleInfo, chosen: np.ndarray) -> torch.Tensor:
    rows = strip_rows(info.height)
    return strip.unflatten(1, (-1, rows))[:, torch.as_tensor(chosen), : info.height].transpose(0, 1)


def jitter_colours(view: View, strength: float, rng: np.random.Generator) -> View:
    """One random recolouring for the whole item: channels exchanged, each scaled by 1 +- strength
    and shifted by +- strength in units of the normalised pixels. Motion and shape stay as they are.
    """
    order = torch.from_numpy(rng.permutation(3))
    gain, shift = torch.from_numpy(rng.uniform(-strength, strength, (2, 3, 1)).astype(np.float32))
    channels = view.patches.unflatten(1, (3, -1))[:, order]
    return replace(view, patches=(channels * (1 + gain) + shift).flatten(1))


def choose_frames(num_stored: int, count: int, rng: np.random.Generator | None) -> np.ndarray:
    """One stored frame from each of `count` equal bins:
    a random one, or the middle one without a generator.
    """
    edges = np.linspace(0, num_stored, count + 1)
    inside = np.full(count, 0.5) if rng is None else rng.random(count)
    return np.minimum((edges[:-1] + inside * np.diff(edges)).astype(int), num_stored - 1)
