"""What of the motion is the camera's: one parametric field per frame, fitted robustly, taken away.

    median       one translation                      v = t
    similarity   translation, rotation, zoom          v = [a -b; b a] x + t
    affine       any linear field                     v = [a b; c d] x + t

x are cell centres on [-1, 1]. The fit is iteratively reweighted least squares with Cauchy weights
1 / (1 + (r / c) ** 2), c twice the median residual of the round before, started from the median
vector: cells that follow another motion lose their say. All cells take part, still ones too, so a
single moving thing before a still camera is not mistaken for the camera. Cost at 224 px and
64 frames: 2 ms for the median, 25 ms for the others.

Shape legend: T frames, P cells of a frame, k parameters of the model.
"""

import numpy as np

CAMERA_MODELS = ("none", "median", "similarity", "affine")
ROUNDS = 8
RIDGE = 1e-9
SMALLEST_SCALE = 0.05  # pixels; vectors come in quarter pixels


def compensate_camera(motion: np.ndarray, camera: str) -> np.ndarray:
    """Motion float [T, y, x, 2] without the camera's; raises ValueError for an unknown model."""
    if camera == "none":
        return motion
    return motion - camera_motion(motion, camera)


def camera_motion(motion: np.ndarray, camera: str) -> np.ndarray:
    """The camera's part of motion [T, y, x, 2]: the same shape, or [T, 1, 1, 2] for `median`."""
    if camera not in CAMERA_MODELS or camera == "none":
        raise ValueError(f"camera is {camera!r}; choose one of {', '.join(CAMERA_MODELS[1:])}")
    median = np.median(motion, axis=(1, 2), keepdims=True)
    if camera == "median":
        return median
    frames, rows, columns, _ = motion.shape
    design = _design(rows, columns, camera)  # [P, 2, k]
    vectors = motion.reshape(frames, rows * columns, 2)
    fitted = np.broadcast_to(median.reshape(frames, 1, 2), vectors.shape)
    for _ in range(ROUNDS):
        residual = np.linalg.norm(vectors - fitted, axis=-1)  # [T, P]
        scale = np.maximum(2 * np.median(residual, axis=1, keepdims=True), SMALLEST_SCALE)
        weights = 1 / (1 + (residual / scale) ** 2)
        normal = np.einsum("tp,pak,pal->tkl", weights, design, design, optimize=True)
        target = np.einsum("tp,pak,tpa->tk", weights, design, vectors, optimize=True)
        normal += RIDGE * np.eye(normal.shape[-1])  # few cells cannot tell all parameters apart
        parameters = np.linalg.solve(normal, target[..., None])[..., 0]
        fitted = np.einsum("pak,tk->tpa", design, parameters)
    return fitted.reshape(motion.shape)


def _design(rows: int, columns: int, camera: str) -> np.ndarray:
    """[P, 2, k]: how each parameter moves each cell along x and along y."""
    y, x = np.meshgrid(np.linspace(-1, 1, rows), np.linspace(-1, 1, columns), indexing="ij")
    x, y = x.ravel(), y.ravel()
    one, zero = np.ones_like(x), np.zeros_like(x)
    if camera == "similarity":
        along_x, along_y = [x, -y, one, zero], [y, x, zero, one]
    else:
        along_x, along_y = [x, y, one, zero, zero, zero], [zero, zero, zero, x, y, one]
    return np.stack([np.stack(along_x, -1), np.stack(along_y, -1)], axis=1)
