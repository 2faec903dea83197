"""How much news each patch of each frame carries: motion the camera does not explain,
and residual that motion does not.

    motion_TP    mean over the patch of |v - v_camera| (codec/camera.py)
    residual_TP  mean over the patch of the luma residual
    saliency     (w_m * motion / p95(motion) + w_r * residual / p95(residual)) / (w_m + w_r), each
                 clipped to 1, times 1 + centre_prior * exp(-d^2 / (2 sigma^2)) where asked

The 95th percentiles are taken over the P-frame patches of the whole clip, with floors: a frame
where little happens does not compete as an equal with one where much does, and noise of a still
scene is not blown up to full scale. `normalise="frame"` takes them per frame, as the published rule
does.

Shape legend: T frames, h, w patch grid.
"""

from dataclasses import dataclass

import numpy as np

from .camera import CAMERA_MODELS, compensate_camera
from .decompose import CodecClip, per_pixel

NORMALISATIONS = ("clip", "frame")
STILL_CHANGE = 3.0  # luma steps: what noise and recompression of a still scene stay below
STILL_SHARE = 0.002  # of all cells of P-frames; more of them changed is news
CENTRE_WIDTH = 0.35  # sigma of the centre prior in shares of the shorter side


@dataclass(frozen=True)
class SaliencyConfig:
    """Weights and floors of the formula above; `motion_floor` in pixels per frame,
    `residual_floor` in luma steps.
    """

    camera: str = "median"
    motion_weight: float = 1.0
    residual_weight: float = 1.0
    motion_floor: float = 0.25
    residual_floor: float = 1.0
    normalise: str = "clip"
    centre_prior: float = 0.0

    def __post_init__(self):
        for name, known in (("camera", CAMERA_MODELS), ("normalise", NORMALISATIONS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")
        weights = (self.motion_weight, self.residual_weight)
        finite = np.isfinite([*weights, self.centre_prior]).all()
        if not finite or min(weights) < 0 or sum(weights) <= 0 or self.centre_prior < 0:
            raise ValueError(
                f"weights {weights} and centre_prior {self.centre_prior} must be finite and not "
                "negative, and one weight must be positive"
            )


def patch_saliency(
    clip: CodecClip, patch_size: int, config: SaliencyConfig | None = None
) -> np.ndarray:
    """Saliency float32 [T, h, w] in 0..1; zero on I-frames, which are kept whole anyway."""
    config = config or SaliencyConfig()
    speed = np.linalg.norm(compensate_camera(clip.motion, config.camera), axis=-1)
    motion = _patch_mean(per_pixel(speed, *clip.residual.shape[1:]), patch_size)
    residual = _patch_mean(clip.residual.astype(np.float32), patch_size)
    p_frames = ~clip.is_i_frame
    if not p_frames.any():
        return np.zeros_like(motion)
    per_frame = config.normalise == "frame"
    motion = _normalised(motion, p_frames, config.motion_floor, per_frame)
    residual = _normalised(residual, p_frames, config.residual_floor, per_frame)
    total = config.motion_weight + config.residual_weight
    saliency = (config.motion_weight * motion + config.residual_weight * residual) / total
    if config.centre_prior:
        saliency = np.minimum(saliency * _centre(*saliency.shape[1:], config.centre_prior), 1.0)
    return (saliency * p_frames[:, None, None]).astype(np.float32)


def is_static(clip: CodecClip) -> bool:
    """Whether next to nothing changes from frame to frame, noise and recompression aside.

    Told by plain differences, since an encoder finds vectors in noise too.
    """
    changed = clip.change[~clip.is_i_frame] > STILL_CHANGE
    return changed.size > 0 and float(changed.mean()) < STILL_SHARE


def _patch_mean(field: np.ndarray, patch_size: int) -> np.ndarray:
    frames, height, width = field.shape
    grid = field.reshape(frames, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.mean(axis=(2, 4))


def _normalised(values: np.ndarray, p_frames: np.ndarray, floor: float, per_frame: bool):
    if per_frame:
        scale = np.maximum(np.percentile(values, 95, axis=(1, 2), keepdims=True), floor)
    else:
        scale = max(float(np.percentile(values[p_frames], 95)), floor)
    return np.clip(values / scale, 0.0, 1.0)


def _centre(height: int, width: int, strength: float) -> np.ndarray:
    """Factor of every patch [h, w]: 1 + strength in the middle, 1 far from it."""
    y = np.arange(height)[:, None] - (height - 1) / 2
    x = np.arange(width)[None, :] - (width - 1) / 2
    sigma = CENTRE_WIDTH * min(height, width)
    return 1 + strength * np.exp(-(x**2 + y**2) / (2 * sigma**2))


def motion_summary(clip: CodecClip, grid: int) -> np.ndarray:
    """Coarse codec view float16 [T, grid, grid, 3]:
    mean vector (x, y) in pixels and mean residual of each cell.

    It goes into the shard, so that clips can be described, clustered and drawn without decoding
    them again.
    """
    motion = per_pixel(clip.motion, *clip.residual.shape[1:])
    channels = np.concatenate([motion, clip.residual[..., None].astype(np.float32)], axis=-1)
    rows = np.linspace(0, channels.shape[1], grid + 1).astype(int)[:-1]
    columns = np.linspace(0, channels.shape[2], grid + 1).astype(int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(channels, rows, axis=1), columns, axis=2)
    areas = (
        np.diff(np.append(rows, channels.shape[1]))[:, None]
        * np.diff(np.append(columns, channels.shape[2]))[None]
    )
    return (sums / areas[..., None]).astype(np.float16)
