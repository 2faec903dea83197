"""Saliency of each patch: motion that the camera does not explain, and residual that motion
compensation leaves.

    motion       |v - v_camera| of a cell
    residual     mean |luma residual| of a cell
    value        (w_m * motion / p95(motion) + w_r * residual / p95(residual)) / (w_m + w_r)
    saliency     by `score`, times 1 + centre_prior * exp(-d^2 / (2 sigma^2)) where asked

    peak         the largest value among the cells of the patch, of 4 pixels or a little more
    mean         the value of the patch as a whole
    clipped      the same, each of the two parts clipped to 1 before; the rule of version 3
    bits         an estimate of the bits that the residual costs, without motion: sum over the
                 coefficients c of its 8 x 8 DCT of log2(1 + |c| / q)

The 95th percentiles are the scale and not a ceiling: a budget takes the best few percent of the
patches, and clipped there all are equal. Cells smaller than the patch tell a small object from a
weak change all over it. The percentiles are taken over the P-frames of the whole clip, with
floors: a frame where little happens does not compete as an equal with one where much does, and
noise of a still scene is not scaled up. `normalise="frame"` takes them per frame. How the scores
compare: docs/evidence.md.

v_camera is one parametric field per frame, fitted robustly:

    median       one translation                      v = t
    similarity   translation, rotation, zoom          v = [a -b; b a] x + t
    affine       any linear field                     v = [a b; c d] x + t

x are cell centres on [-1, 1]. The fit is iteratively reweighted least squares with Cauchy weights
1 / (1 + (r / c) ** 2), c twice the median residual of the round before, started from the median
vector: cells that follow another motion lose their weight. All cells take part, still ones too, so
a single moving object before a still camera is not mistaken for the camera. Cost at 224 px and
64 frames: 2 ms for the median, 25 ms for the others.

Shape legend: T frames, h, w patch grid, P cells of a frame, k parameters of the camera model.
"""

from dataclasses import dataclass

import numpy as np

from .decompose import MOTION_CELL, CodecClip, per_pixel
from .framing import check_choice

CAMERA_MODELS = ("none", "median", "similarity", "affine")
ROUNDS = 8  # of reweighting; a choice, not tuned
RIDGE = 1e-9  # keeps the normal equations solvable where few cells cannot separate all parameters
SMALLEST_SCALE = 0.05  # pixels: a fifth of the quarter pixels in which vectors come
NORMALISATIONS = ("clip", "frame")
STILL_CHANGE = 3.0  # luma steps: noise and recompression of a still scene stay below
STILL_SHARE = 0.002  # of all cells of P-frames; more of them changed is news
CENTRE_WIDTH = 0.35  # sigma of the centre prior in shares of the shorter side; a choice
PERCENTILE = 95  # taken for the scale: a few outliers do not flatten the rest
SCORES = ("peak", "mean", "clipped", "bits")
# Pixels of a cell. Of 2, 4, 8 and 16 this one shows most of the small events of brief_events
# (docs/evidence.md); smaller ones follow noise.
SMALLEST_CELL = 4
DCT_BLOCK = 8  # as in H.264's High profile and JPEG
# Quantiser step of the canonical stream's quality, CRF 18: 2 ** ((18 - 4) / 6), ITU-T H.264 8.5.9
QUANTISER = 5.0


@dataclass(frozen=True)
class SaliencyConfig:
    """Score, weights and floors of the formulas above; `motion_floor` in pixels per frame,
    `residual_floor` in luma steps. Residual energy alone is `motion_weight` 0.
    """

    score: str = "peak"
    camera: str = "median"
    motion_weight: float = 1.0
    residual_weight: float = 1.0
    motion_floor: float = 0.25
    residual_floor: float = 1.0
    normalise: str = "clip"
    centre_prior: float = 0.0

    def __post_init__(self) -> None:
        check_choice("score", self.score, choices=SCORES)
        check_choice("camera", self.camera, choices=CAMERA_MODELS)
        check_choice("normalise", self.normalise, choices=NORMALISATIONS)
        weights = (self.motion_weight, self.residual_weight)
        numbers = np.array([*weights, self.centre_prior])
        is_wrong = not np.isfinite(numbers).all() or (numbers < 0).any()
        if is_wrong or sum(weights) == 0:
            raise ValueError(
                f"weights {weights} and centre_prior {self.centre_prior} must be finite and not "
                "negative, and one weight must be positive"
            )


def patch_saliency(
    clip: CodecClip,
    patch_size: int,
    config: SaliencyConfig | None = None,
) -> np.ndarray:
    """Saliency float32 [T, h, w], 0 or more; zero on I-frames, which are selected whole anyway."""
    config = config or SaliencyConfig()
    p_frames = ~clip.is_i_frame
    count, height, width = clip.residual.shape
    if not p_frames.any():
        return np.zeros((count, height // patch_size, width // patch_size), np.float32)
    if config.score == "bits":
        saliency = residual_bits(clip.residual, patch_size)
    else:
        saliency = _motion_and_residual(clip, patch_size=patch_size, config=config)
    if config.centre_prior:
        _, rows, columns = saliency.shape
        prior = _centre_prior(rows, columns, strength=config.centre_prior)
        saliency = saliency * prior
    if config.score == "clipped":
        saliency = np.minimum(saliency, 1.0)
    return (saliency * p_frames[:, None, None]).astype(np.float32)


def _motion_and_residual(clip: CodecClip, patch_size: int, config: SaliencyConfig) -> np.ndarray:
    """The weighted sum [T, h, w] of motion and residual, each on its scale."""
    _, height, width = clip.residual.shape
    compensated = compensated_motion(clip, config.camera)
    speed = np.linalg.norm(compensated, axis=-1)
    # by way of pixels: a patch of 14 does not consist of whole motion cells of 8
    speed_of_pixels = per_pixel(speed, height=height, width=width)
    block = cell_side(patch_size) if config.score == "peak" else patch_size
    fields = [
        (block_mean(speed_of_pixels, block), config.motion_weight, config.motion_floor),
        (block_mean(clip.residual, block), config.residual_weight, config.residual_floor),
    ]
    inside = clip.whole_patches(block)
    total = np.zeros(1, np.float32)
    for values, weight, floor in fields:
        scaled = values / _scale(
            values,
            p_frames=~clip.is_i_frame,
            inside=inside,
            floor=floor,
            per_frame=config.normalise == "frame",
        )
        if config.score == "clipped":
            scaled = np.minimum(scaled, 1.0)
        total = total + weight * scaled
    value = total / (config.motion_weight + config.residual_weight)
    return block_max(value, patch_size // block)


def cell_side(patch_size: int) -> int:
    """Pixels of the cells in which a patch is scored: the smallest whole part of its side that is
    no smaller than SMALLEST_CELL."""
    parts = (side for side in range(SMALLEST_CELL, patch_size) if patch_size % side == 0)
    return next(parts, patch_size)


def residual_bits(residual: np.ndarray, patch_size: int) -> np.ndarray:
    """Estimated bits float32 [T, h, w] of residuals [T, H, W]: those of each patch's share of the
    8 x 8 blocks. Beyond the last whole block the residual counts as zero."""
    count, height, width = residual.shape
    pad = [(0, 0), (0, -height % DCT_BLOCK), (0, -width % DCT_BLOCK)]
    padded = np.pad(residual, pad).astype(np.float32)
    rows = padded.shape[1] // DCT_BLOCK
    columns = padded.shape[2] // DCT_BLOCK
    grid = padded.reshape(count, rows, DCT_BLOCK, columns, DCT_BLOCK)
    transform = _dct_matrix(DCT_BLOCK)
    # over the columns of each block, then over its rows
    coefficients = np.einsum("trycx,kx->tryck", grid, transform, optimize=True)
    coefficients = np.einsum("tryck,ly->trlck", coefficients, transform, optimize=True)
    bits = np.log2(1 + np.abs(coefficients) / QUANTISER).sum(axis=(2, 4))
    # by way of pixels, each of which has its share: a patch of 14 is no whole number of blocks
    shares = bits / DCT_BLOCK**2
    pixels = np.repeat(np.repeat(shares, DCT_BLOCK, axis=1), DCT_BLOCK, axis=2)
    return block_mean(pixels[:, :height, :width], patch_size) * patch_size**2


def _dct_matrix(size: int) -> np.ndarray:
    """Orthonormal DCT-II float32 [frequencies, samples]."""
    frequency = np.arange(size)[:, None]
    sample = np.arange(size)[None, :] + 0.5
    matrix = np.sqrt(2 / size) * np.cos(np.pi / size * frequency * sample)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def is_static(clip: CodecClip) -> bool:
    """Whether next to nothing changes from frame to frame, noise and recompression aside.

    Measured by plain differences, since an encoder finds vectors in noise too.
    """
    change = clip.change
    if clip.content is not None:
        rows, columns = clip.content.cells(MOTION_CELL)
        change = change[:, rows, columns]
    changed = change[~clip.is_i_frame] > STILL_CHANGE
    return changed.size > 0 and float(changed.mean()) < STILL_SHARE


def compensated_motion(clip: CodecClip, camera: str) -> np.ndarray:
    """Motion without the camera's, which the cells of padding do not take part in; theirs is 0."""
    if clip.content is None:
        return compensate_camera(clip.motion, camera)
    rows, columns = clip.content.cells(MOTION_CELL)
    own = compensate_camera(clip.motion[:, rows, columns], camera)
    compensated = np.zeros(clip.motion.shape, own.dtype)
    compensated[:, rows, columns] = own
    return compensated


def compensate_camera(motion: np.ndarray, camera: str) -> np.ndarray:
    """Motion float [T, y, x, 2] without the camera's; raises ValueError for an unknown model."""
    return motion if camera == "none" else motion - camera_motion(motion, camera)


def camera_motion(motion: np.ndarray, camera: str) -> np.ndarray:
    """The camera's part of motion [T, y, x, 2]: the same shape, or [T, 1, 1, 2] for `median`."""
    check_choice("camera", camera, choices=CAMERA_MODELS[1:])
    median = np.median(motion, axis=(1, 2), keepdims=True)
    if camera == "median":
        return median
    frames, rows, columns, _ = motion.shape
    design = _design(rows=rows, columns=columns, camera=camera)  # [P, 2, k]
    vectors = motion.reshape(frames, rows * columns, 2)
    fitted = np.broadcast_to(median.reshape(frames, 1, 2), vectors.shape)
    for _ in range(ROUNDS):
        residual = np.linalg.norm(vectors - fitted, axis=-1)  # [T, P]
        typical = np.median(residual, axis=1, keepdims=True)
        scale = np.maximum(2 * typical, SMALLEST_SCALE)
        weights = 1 / (1 + (residual / scale) ** 2)
        normal = np.einsum("tp,pak,pal->tkl", weights, design, design, optimize=True)
        target = np.einsum("tp,pak,tpa->tk", weights, design, vectors, optimize=True)
        normal += RIDGE * np.eye(normal.shape[-1])
        # as a column: NumPy 2 takes a stack of vectors for one matrix
        solved = np.linalg.solve(normal, target[..., None])
        parameters = solved[..., 0]
        fitted = np.einsum("pak,tk->tpa", design, parameters)
    return fitted.reshape(motion.shape)


def _design(rows: int, columns: int, camera: str) -> np.ndarray:
    """[P, 2, k]: how each parameter moves each cell along x and along y."""
    grid_y, grid_x = np.meshgrid(
        np.linspace(-1, 1, rows),
        np.linspace(-1, 1, columns),
        indexing="ij",
    )
    x = grid_x.ravel()
    y = grid_y.ravel()
    one = np.ones_like(x)
    zero = np.zeros_like(x)
    if camera == "similarity":
        axes = ([x, -y, one, zero], [y, x, zero, one])
    else:
        axes = (
            [x, y, one, zero, zero, zero],
            [zero, zero, zero, x, y, one],
        )
    return np.stack([np.stack(axis, -1) for axis in axes], axis=1)


def block_mean(field: np.ndarray, side: int) -> np.ndarray:
    """Means of |field| float32 [T, h, w] over the blocks of a field [T, H, W]."""
    count, height, width = field.shape
    rows = height // side
    columns = width // side
    # along the rows of pixels first, which lie together in memory
    grid = np.abs(field).reshape(count, height, columns, side)
    sums = grid.sum(axis=3, dtype=np.float32)
    sums = sums.reshape(count, rows, side, columns).sum(axis=2)
    return sums / side**2


def block_max(field: np.ndarray, side: int) -> np.ndarray:
    """Maxima [T, h, w] over the blocks of a field [T, H, W]."""
    count, height, width = field.shape
    grid = field.reshape(count, height // side, side, width // side, side)
    return grid.max(axis=(2, 4))


def _scale(
    values: np.ndarray,
    p_frames: np.ndarray,
    inside: np.ndarray,
    floor: float,
    per_frame: bool,
) -> np.ndarray | float:
    """The 95th percentile of values [T, h, w] over the blocks `inside` [h, w] of P-frames, or the
    floor, if that is more; per frame [T, 1, 1]."""
    if per_frame:
        percentiles = np.percentile(values[:, inside], PERCENTILE, axis=1)
        return np.maximum(percentiles, floor)[:, None, None]
    # a Python number, by which float32 values stay float32
    return max(float(np.percentile(values[p_frames][:, inside], PERCENTILE)), floor)


def _centre_prior(height: int, width: int, strength: float) -> np.ndarray:
    """Factor of every patch [h, w]: 1 + strength in the middle, 1 far from it."""
    y = np.arange(height)[:, None] - (height - 1) / 2
    x = np.arange(width)[None, :] - (width - 1) / 2
    sigma = CENTRE_WIDTH * min(height, width)
    square_distance = x**2 + y**2
    return 1 + strength * np.exp(-square_distance / (2 * sigma**2))


def motion_summary(clip: CodecClip, grid: int) -> np.ndarray:
    """Coarse codec view float16 [T, grid, grid, 3]: mean vector (x, y) in pixels and mean residual
    of each cell.

    It goes into the shard, so that clips can be described, clustered and drawn without decoding
    them again.
    """
    _, height, width = clip.residual.shape
    motion = per_pixel(clip.motion, height=height, width=width)
    residual = np.abs(clip.residual)[..., None].astype(np.float32)
    channels = np.concatenate([motion, residual], axis=-1)
    rows = np.linspace(0, height, grid + 1).astype(int)
    columns = np.linspace(0, width, grid + 1).astype(int)
    sums = np.add.reduceat(channels, rows[:-1], axis=1)
    sums = np.add.reduceat(sums, columns[:-1], axis=2)
    areas = np.diff(rows)[:, None] * np.diff(columns)
    return (sums / areas[..., None]).astype(np.float16)
