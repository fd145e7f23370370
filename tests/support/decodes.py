"""Counts decodings of pictures, whichever library does them."""

import pytest
import simplejpeg
from PIL import ImageFile


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(width, height) of every picture that is decoded from now on, in a list that grows."""
    sizes: list[tuple[int, int]] = []
    load, decode = ImageFile.ImageFile.load, simplejpeg.decode_jpeg

    def counted_load(self):
        if self.tile:
            sizes.append(self.size)
        return load(self)

    def counted_decode(*args, **options):
        pixels = decode(*args, **options)
        sizes.append(pixels.shape[1::-1])
        return pixels

    monkeypatch.setattr(ImageFile.ImageFile, 'load', counted_load)
    monkeypatch.setattr(simplejpeg, 'decode_jpeg', counted_decode)
    return sizes
