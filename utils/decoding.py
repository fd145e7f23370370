"""Photographs as arrays, decoded as fast as it goes without changing a value."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image

from utils.images import as_rgb, open_image

# How finely cameras store colours. With others Pillow's decoder and simplejpeg's may round apart.
_COLOURS, _SUBSAMPLINGS = 'YCbCr', ('444', '422', '420')


class Decoded(NamedTuple):
    """pixels: RGB, perhaps at a smaller scale. size: width and height of the whole photograph."""

    pixels: UInt8[np.ndarray, 'H W 3']
    size: tuple[int, int]


def decode_rgb(read: Callable[[], bytes], name: str, at_least: int | None = None) -> Decoded:
    """The photograph in an image file, whose bytes `read` gives, as `utils.images.as_rgb` has it.

    Usual JPEGs are decoded by simplejpeg: the same libjpeg-turbo as Pillow's, the same values,
    without the detour over Pillow's four bytes a pixel (benchmarks/ingest.py). at_least: as for
    `as_rgb`. UserError that calls the picture by `name` when it cannot be decoded.
    """
    found: list[bytes] = []

    def opened() -> io.BytesIO:
        found.append(read())
        return io.BytesIO(found[0])

    with open_image(opened, name) as image:
        size = image.size
        pixels = _usual_jpeg(found[0], image, at_least)
        if pixels is None:
            pixels = np.array(as_rgb(image, at_least))
    return Decoded(pixels, size)


def _usual_jpeg(
    data: bytes, image: Image.Image, at_least: int | None
) -> UInt8[np.ndarray, 'H W 3'] | None:
    """What simplejpeg makes of it at the scale that Pillow would choose; None: left to Pillow."""
    if image.format != 'JPEG' or image.mode != 'RGB':
        return None
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return None
    if at_least is not None:
        image.draft(None, (at_least, at_least))
    try:
        _, _, colours, subsampling = simplejpeg.decode_jpeg_header(data)
        if colours != _COLOURS or subsampling not in _SUBSAMPLINGS:
            return None
        pixels = simplejpeg.decode_jpeg(data, min_height=image.height, min_width=image.width)
    except ValueError:  # damaged: Pillow says how, or makes something of it
        return None
    return pixels if pixels.shape[1::-1] == image.size else None
