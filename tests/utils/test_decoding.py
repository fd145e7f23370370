"""Arrays of photographs: the values that Pillow gives, by simplejpeg where files are usual."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from utils.decoding import decode_rgb
from utils.errors import UserError
from utils.images import as_rgb, open_image


def photograph(mode='RGB', size=(233, 131)):
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind='JPEG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(photograph(), exif=exif)


USUAL = {
    '444': encoded(photograph(), subsampling=0),
    '422': encoded(photograph(), subsampling=1),
    '420': encoded(photograph(), subsampling=2, quality=90),
    'progressive': encoded(photograph(), progressive=True),
    'even': encoded(photograph(size=(256, 192))),
}
OTHERS = {
    'grey': encoded(photograph('L')),
    'cmyk': encoded(photograph('CMYK')),
    'rotated': rotated(),
    'rgb': encoded(photograph(), keep_rgb=True),
    'png': encoded(photograph(), 'PNG'),
    'mpo': encoded(photograph(), 'MPO', save_all=True, append_images=[photograph('L')]),
}


@pytest.mark.parametrize('at_least', [None, 100, 64, 20, 1])
@pytest.mark.parametrize('kind', [*USUAL, *OTHERS])
def test_the_values_are_those_of_pillow(kind, at_least, monkeypatch):
    data, calls, decode = {**USUAL, **OTHERS}[kind], [], simplejpeg.decode_jpeg
    monkeypatch.setattr(
        simplejpeg, 'decode_jpeg', lambda *a, **o: calls.append(1) or decode(*a, **o)
    )
    found = decode_rgb(lambda: data, 'x', at_least)
    with open_image(lambda: io.BytesIO(data), 'x') as image:
        size = image.size
        expected = np.asarray(as_rgb(image, at_least))
    assert found.size == size
    np.testing.assert_array_equal(found.pixels, expected)
    assert len(calls) == (kind in USUAL)


@pytest.mark.parametrize('kept', [len(USUAL['420']) // 2, 40, 0])
def test_damaged_files_are_refused_as_pillow_refuses_them(kept):
    data = USUAL['420'][:kept]
    with pytest.raises(UserError, match='^eye.jpg is not a readable image') as ours:
        decode_rgb(lambda: data, 'eye.jpg')
    with pytest.raises(UserError) as theirs, open_image(lambda: io.BytesIO(data), 'eye.jpg') as i:
        as_rgb(i)
    assert str(ours.value) == str(theirs.value)


def test_a_file_that_cannot_be_opened_is_named():
    def read():
        raise PermissionError(13, 'Permission denied')

    with pytest.raises(UserError, match='^eye.jpg is not a readable.*Permission denied'):
        decode_rgb(read, 'eye.jpg')
