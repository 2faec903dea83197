"""Other colours for a drawn version of a clip: the published list, each part switchable.

    brightness   brightness and contrast, together with probability 0.8
    saturation   with probability 0.8
    hue          with probability 0.8
    channels     red and blue exchanged, with probability 0.1

Probabilities are as published; how strong is not, so factors lie within 1 +- 0.4 and hues move by
at most 0.1 of the circle. One draw holds for all frames. No flip and no moved crop: published
training has none. Cost: about a millisecond per 224 px frame.
"""

import numpy as np
from PIL import Image, ImageEnhance

STRENGTH, HUE_TURN = 0.4, 0.1
LIKELY, RARE = 0.8, 0.1


def recolour(frames: np.ndarray, draw: np.random.Generator, parts: tuple[str, ...]) -> np.ndarray:
    """uint8 [T, H, W, 3] -> the same shape. Every part takes its numbers from `draw` whether it is
    switched on or not, so parts do not change each other."""
    chance, factor = draw.random(4), draw.uniform(1 - STRENGTH, 1 + STRENGTH, 3)
    turn = draw.uniform(-HUE_TURN, HUE_TURN)
    sheet = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    if "brightness" in parts and chance[0] < LIKELY:
        sheet = ImageEnhance.Brightness(sheet).enhance(factor[0])
        sheet = ImageEnhance.Contrast(sheet).enhance(factor[1])
    if "saturation" in parts and chance[1] < LIKELY:
        sheet = ImageEnhance.Color(sheet).enhance(factor[2])
    if "hue" in parts and chance[2] < LIKELY:
        hue, saturation, value = sheet.convert("HSV").split()
        hue = hue.point([int(round(level + 255 * turn)) % 256 for level in range(256)])
        sheet = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    pixels = np.asarray(sheet).reshape(frames.shape)
    if "channels" in parts and chance[3] < RARE:
        pixels = pixels[..., ::-1]
    return pixels.copy()
