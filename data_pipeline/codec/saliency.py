"""How much news each patch carries: motion that the camera does not explain,
and residual that motion does not.

    motion_TP    mean over the patch of |v - v_camera|, v_camera = the frame's median vector
                 (option)
    residual_TP  mean over the patch of the luma residual
    saliency     (w_m * motion / p95(motion) + w_r * residual / p95(residual)) / (w_m + w_r), each
                 clipped to 1

The 95th percentiles are taken over the P-frame patches of the whole clip, with floors: a frame
where little happens does not compete as an equal with one where much does, and noise of a still
scene is not blown up to full scale.

Shape legend: T frames, h, w patch grid.
"""

from dataclasses import dataclass

import numpy as np

from .decompose import CodecClip, per_pixel

CAMERA_MODELS = ("none", "median")


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

    def __post_init__(self):
        if self.camera not in CAMERA_MODELS:
            raise ValueError(f"camera is {self.camera!r}; choose one of {', '.join(CAMERA_MODELS)}")


def compensate_camera(motion: np.ndarray, camera: str) -> np.ndarray:
    """Motion [T, y, x, 2] without the camera's: `median` takes away each frame's median vector."""
    if camera == "none":
        return motion
    return motion - np.median(motion, axis=(1, 2), keepdims=True)


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
    motion = _normalised(motion, p_frames, config.motion_floor)
    residual = _normalised(residual, p_frames, config.residual_floor)
    total = config.motion_weight + config.residual_weight
    saliency = (config.motion_weight * motion + config.residual_weight * residual) / total
    return (saliency * p_frames[:, None, None]).astype(np.float32)


def _patch_mean(field: np.ndarray, patch_size: int) -> np.ndarray:
    frames, height, width = field.shape
    grid = field.reshape(frames, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.mean(axis=(2, 4))


def _normalised(values: np.ndarray, p_frames: np.ndarray, floor: float) -> np.ndarray:
    scale = max(float(np.percentile(values[p_frames], 95)), floor)
    return np.clip(values / scale, 0.0, 1.0)


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
