"""One reader for every source: the same pixels however they come, decoded once, bad ones named."""

import zipfile

import numpy as np
import pytest
from decodes import count_decodes
from PIL import Image
from scipy.ndimage import gaussian_filter

from datasets.pictures import Pictures, load_pictures
from datasets.table import read_table
from utils.errors import UserError
from utils.images import load_rgb, resize


@pytest.fixture
def photographs(tmp_path):
    """Folder of smooth pictures 0.png ... 5.png, labels.csv beside them."""
    rng = np.random.default_rng(0)
    for i in range(6):
        noise = gaussian_filter(rng.standard_normal((60, 90, 3)), (4, 4, 0))
        u8 = np.clip(128 + 900 * noise, 0, 255).astype(np.uint8)
        (tmp_path / 'images').mkdir(exist_ok=True)
        Image.fromarray(u8).save(tmp_path / f'images/{i}.png')
    names = '\n'.join(map(str, range(6)))
    (tmp_path / 'labels.csv').write_text(f'image\n{names}\n')
    return tmp_path


def test_all_sources_give_the_same(photographs):
    folder, table = photographs / 'images', read_table(photographs / 'labels.csv')
    with zipfile.ZipFile(photographs / 'all.zip', 'w') as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    want = np.stack([np.asarray(resize(load_rgb(p), 16)).transpose(2, 0, 1) for p in table.paths])
    for source in (folder, photographs / 'all.zip', photographs / 'labels.csv', table, table.paths):
        data = Pictures(source, 16)
        assert np.array_equal(np.stack([data[i] for i in range(6)]), want)
        assert np.array_equal(load_pictures(source, 16, threads=2), want)
        assert len(set(data.names)) == 6 and len(data.digest()) == 16
    pairs = load_pictures([table.paths[:2], table.paths[2:4]], 16)
    assert np.array_equal(pairs[1], np.rint(want[2:4].mean(0)))
    assert load_pictures([], 16).shape == (0, 3, 16, 16)


def test_the_digest_sees_contents(photographs):
    for side, source in enumerate((photographs / 'images', read_table(photographs / 'labels.csv'))):
        data = Pictures(source, 16)
        before = data.digest()
        Image.new('RGB', (8 + side, 8)).save(photographs / 'images/3.png')
        assert data.digest() != before


@pytest.mark.parametrize(('side', 'scaled'), [(64, True), (255, False)])
def test_large_jpegs_are_decoded_at_a_smaller_scale(tmp_path, monkeypatch, side, scaled):
    """At least twice the wanted side, then resized; smaller files are read whole, exactly."""
    rng = np.random.default_rng(1)
    fine = gaussian_filter(rng.standard_normal((600, 800, 3)), (2, 2, 0))
    u8 = np.clip(128 + 250 * fine, 0, 255).astype(np.uint8)
    Image.fromarray(u8).save(tmp_path / 'x.jpg', quality=90)
    whole = np.asarray(resize(load_rgb(tmp_path / 'x.jpg'), side), dtype=int)
    sizes = count_decodes(monkeypatch)
    got = load_pictures([tmp_path / 'x.jpg'], side)[0].transpose(1, 2, 0).astype(int)
    assert min(sizes[0]) >= 2 * side or not scaled
    assert (sizes[0] < (800, 600)) == scaled
    assert np.abs(got - whole).max() <= (6 if scaled else 0)
    assert np.abs(got - whole).mean() <= (0.6 if scaled else 0)


def test_all_bad_pictures_are_named(photographs):
    for i in (1, 4):
        (photographs / f'images/{i}.png').write_bytes(b'no picture')
    table = read_table(photographs / 'labels.csv')
    for source in (photographs / 'images', table, table.paths):
        with pytest.raises(UserError, match='(?s)2 of 6 images cannot be read.*1.png.*4.png'):
            Pictures(source, 16)
