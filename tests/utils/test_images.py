"""Opening pictures: known formats only, nothing runs, and damage is one line."""

import contextlib
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from anonymization.audit.files import Fault
from anonymization.audit.png import decode
from datasets.archive import FileStore
from datasets.digests import read_digests
from datasets.pictures import Pictures
from utils.errors import UserError
from utils.images import load_rgb, png_names

PROGRAM = """%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(ran) (w) file closefile
showpage
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """(PostScript named .png, the file that exists once an interpreter was started)."""
    ran, gs = tmp_path / 'ran', tmp_path / 'bin/gs'
    gs.parent.mkdir()
    gs.write_text(f'#!/bin/sh\ntouch {ran}\n')
    gs.chmod(0o755)
    monkeypatch.setenv('PATH', str(gs.parent), prepend=':')
    monkeypatch.setattr(EpsImagePlugin, 'gs_binary', None)
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/x.png').write_text(PROGRAM)
    return tmp_path / 'in/x.png', ran


def test_a_program_named_as_a_picture_does_not_run(program, tmp_path):
    path, ran = program
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
        archive.write(path, 'x.png')
    for read in (
        load_rgb,
        lambda p: FileStore(p.parent).pixels('x.png'),
        lambda p: FileStore(tmp_path / 'x.zip').pixels('x.png'),
        lambda p: FileStore(p.parent).size('x.png'),
        lambda p: Pictures(p.parent, 8),
        lambda p: read_digests([p]),
    ):
        with pytest.raises(UserError, match='of no known image format'):
            read(path)
    with pytest.raises(Fault, match='is not a PNG'):
        decode(path.read_bytes(), None)
    with Image.open(path) as image, contextlib.suppress(OSError):  # what the list keeps out
        assert not ran.exists()
        image.load()
    assert ran.exists()


def encoded(form):
    ramp = np.arange(48 * 32 * 3).reshape(32, 48, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, 'a description'
    out = io.BytesIO()
    options = {} if form in ('BMP', 'PPM') else {'exif': exif}
    if form == 'MPO':
        options.update(save_all=True, append_images=[Image.fromarray(ramp[::-1])])
    Image.fromarray(ramp).save(out, form, **options)
    return out.getvalue()


SAMPLES = {form: encoded(form) for form in ('PNG', 'JPEG', 'MPO', 'BMP', 'TIFF', 'PPM', 'WEBP')}


@pytest.mark.parametrize('form', SAMPLES)
def test_usual_formats_are_read(form, tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(SAMPLES[form])
    assert sorted(load_rgb(path).size) == [32, 48]


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(SAMPLES)),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_damaged_pictures_are_read_or_refused_in_one_line(tmp_path_factory, form, cut, changes):
    data = bytearray(SAMPLES[form])
    for place, value in changes:
        data[int(place * min(len(data), 256))] = value  # headers are where decoders stumble
    path = tmp_path_factory.getbasetemp() / 'damaged.jpg'
    path.write_bytes(data[: max(1, int(cut * len(data)))])
    try:
        assert load_rgb(path).mode == 'RGB'
    except UserError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


def saved(tmp_path, image, **options):
    image.save(tmp_path / 'a.png', **options)
    return np.asarray(load_rgb(tmp_path / 'a.png'))


@pytest.mark.parametrize(
    'values,want',
    [
        ([0, 257, 128, 65535], [0, 1, 0, 255]),  # 16 bits: divided by 257 and rounded
        ([129, 385, 386, 32896], [1, 1, 2, 128]),
        ([0, 1, 200, 255], [0, 1, 200, 255]),  # 8 bits in a 16-bit file: as they are
        ([0, 0, 0, 256], [0, 0, 0, 1]),
    ],
)
def test_16_bits_become_8(values, want, tmp_path):
    grey = Image.fromarray(np.array(values, np.uint16).reshape(2, 2))
    assert grey.mode == 'I;16'
    pixels = saved(tmp_path, grey)
    assert pixels.shape == (2, 2, 3)
    for channel in range(3):
        assert pixels[..., channel].ravel().tolist() == want


@pytest.mark.parametrize(
    'mode,colour,want',
    [
        ('RGBA', (200, 100, 50, 255), (200, 100, 50)),
        ('RGBA', (200, 100, 50, 0), (0, 0, 0)),
        ('RGBA', (200, 100, 50, 51), (40, 20, 10)),
        ('LA', (200, 102), (80, 80, 80)),
    ],
)
def test_what_is_transparent_lies_over_black(mode, colour, want, tmp_path):
    pixels = saved(tmp_path, Image.new(mode, (3, 2), colour))
    assert pixels.shape == (2, 3, 3) and np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [
        list(want)
    ]


def test_a_transparent_palette_colour_is_black(tmp_path):
    image = Image.new('P', (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert saved(tmp_path, image).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert saved(tmp_path, image, transparency=1).tolist() == [[[10, 20, 30], [0, 0, 0]]]


@pytest.mark.parametrize(
    'orientation,turn',
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, np.rot90),
    ],
)
def test_pictures_stand_upright(orientation, turn, tmp_path):
    """The tag says how the camera was held; the pixels are turned, not the tag kept."""
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(saved(tmp_path, Image.fromarray(pixels), exif=exif), turn(pixels))


def test_names_of_pictures_do_not_collide():
    names = ['a/b.png', 'a__b.png', 'x.png', 'x.jpg', '1.2.840.1', '1.2.840.2', 'X.tif', 'y.png']
    found = png_names(names)
    assert len({n.lower() for n in found}) == len(names)
    assert found[4:6] == ['1.2.840.1.png', '1.2.840.2.png'] and found[7] == 'y.png'
    assert found[2:4] == ['x.png.png', 'x.jpg.png']
