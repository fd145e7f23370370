"""Opening pictures: known formats only, nothing runs, and damage is one line."""
import contextlib
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from anonymization.audit import _check_pictures
from datasets.archive import FileStore
from datasets.images_dataset import ImagesDataset
from utils.errors import UserError
from utils.images import check_image_files, load_rgb

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
    for read in (load_rgb, lambda p: FileStore(p.parent).image('x.png'),
                 lambda p: FileStore(tmp_path / 'x.zip').image('x.png'),
                 lambda p: FileStore(p.parent).size('x.png'),
                 lambda p: ImagesDataset(p.parent, 8)):
        with pytest.raises(UserError, match='of no known image format'):
            read(path)
    assert not _check_pictures([path]).passed
    assert check_image_files([path])[0][0] == path
    with Image.open(path) as image, contextlib.suppress(OSError):    # what the list keeps out
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


SAMPLES = {form: encoded(form) for form in ('PNG', 'JPEG', 'MPO', 'BMP', 'TIFF', 'PPM',
                                            'WEBP')}


@pytest.mark.parametrize('form', SAMPLES)
def test_usual_formats_are_read(form, tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(SAMPLES[form])
    assert sorted(load_rgb(path).size) == [32, 48]


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(sorted(SAMPLES)),
       cut=st.floats(0, 1),
       changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
                        max_size=8))
def test_damaged_pictures_are_read_or_refused_in_one_line(tmp_path_factory, form, cut, changes):
    data = bytearray(SAMPLES[form])
    for place, value in changes:
        data[int(place * min(len(data), 256))] = value    # headers are where decoders stumble
    path = tmp_path_factory.getbasetemp() / 'damaged.jpg'
    path.write_bytes(data[:max(1, int(cut * len(data)))])
    try:
        assert load_rgb(path).mode == 'RGB'
    except UserError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1
