"""Photographs -> training archive: sources, transforms, the report, and the script."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_fov import photograph

from datasets.archive import ImageArchive
from datasets.prepare import transform_image
from datasets.table import read_table
from scripts import dataset_tool
from utils.errors import UserError
from utils.images import load_rgb


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    """A folder with three photographs of different shapes, one black frame and one broken file."""
    folder = tmp_path_factory.mktemp('originals') / 'photos'
    (folder / 'sub').mkdir(parents=True)
    photograph(200, 200, 150).save(folder / 'a.png')
    photograph(300, 170, 200, width=600, height=340).save(folder / 'sub' / 'b.jpg', quality=95)
    photograph(level=60, seed=2).save(folder / 'c.png')
    Image.new('RGB', (100, 100)).save(folder / 'dark.png')
    (folder / 'broken.png').write_bytes((folder / 'a.png').read_bytes()[:2000])
    return folder


@pytest.fixture
def photos(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / 'photos')


def run(*options):
    return dataset_tool.main([str(o) for o in options])


def test_fundus_mode(photos, tmp_path, capsys):
    dest = tmp_path / 'out.zip'
    assert run('--source', photos, '--dest', dest, '--transform', 'fundus', '--width', 64) == 0
    assert '3 images written' in capsys.readouterr().out
    data = ImageArchive(dest)
    assert len(data) == 3 and data.resolution == 64
    for i in range(3):  # every disc now fills the square and leaves the corners dark
        img = data[i][0].amax(0)
        assert img[32, 2:-2].min() > 10 and img[2:-2, 32].float().mean() > 30
        assert max(img[y, x] for y in (0, -1) for x in (0, -1)) < 10
    report = json.loads((tmp_path / 'out.zip.report.json').read_text())
    assert (report['images_kept'], report['images_read']) == (3, 5)
    reasons = {r['name']: r['reason'] for r in report['left_out']}
    assert reasons.keys() == {'dark.png', 'broken.png'}
    assert 'near-black' in reasons['dark.png'] and reasons['broken.png'].startswith('damaged')
    for kind in ('json', 'csv'):  # both name photographs
        assert (tmp_path / f'out.zip.report.{kind}').stat().st_mode & 0o077 == 0
    table = pd.read_csv(tmp_path / 'out.zip.report.csv', keep_default_na=False)
    kept = table[table.kept]
    assert list(kept.name) == ['a.png', 'c.png', 'sub/b.jpg']
    assert list(kept.archive_name) == data.names
    assert set(zipfile.ZipFile(dest).namelist()) == {*data.names, 'dataset.json'}


def test_identical_pictures_are_told(photos, tmp_path, capsys):
    shutil.copy(photos / 'a.png', photos / 'sub' / 'again.png')
    assert (
        run(
            '--source',
            photos,
            '--dest',
            tmp_path / 'out.zip',
            '--transform',
            'fundus',
            '--width',
            32,
        )
        == 0
    )
    table = pd.read_csv(tmp_path / 'out.zip.report.csv', keep_default_na=False)
    assert dict(zip(table.name, table.same_as))['sub/again.png'] == 'a.png'
    assert (table.same_as != '').sum() == 1 and table.kept.sum() == 4
    assert '1 times, as sub/again.png and a.png' in capsys.readouterr().err


def test_workers_do_not_change_the_result(photos, tmp_path):
    for workers in (1, 3):
        run(
            '--source',
            photos,
            '--dest',
            tmp_path / f'{workers}.zip',
            '--transform',
            'fundus',
            '--width',
            32,
            '--mask',
            '--workers',
            workers,
        )
    assert (tmp_path / '1.zip').read_bytes() == (tmp_path / '3.zip').read_bytes()


def test_pooled_sources_keep_labels_and_order(tmp_path):
    first = tmp_path / 'first'
    first.mkdir()
    for name in ('x.png', 'y.png'):
        photograph().save(first / name)
    (first / 'dataset.json').write_text(json.dumps({'labels': [['y.png', 1], ['x.png', 0]]}))
    run('--source', first, '--dest', tmp_path / 'second.zip', '--width', 32, '--height', 32)
    run(
        '--source',
        first,
        '--source',
        tmp_path / 'second.zip',
        '--dest',
        tmp_path / 'both',
        '--transform',
        'center-crop',
        '--width',
        16,
        '--height',
        16,
    )
    data = ImageArchive(tmp_path / 'both', labels=True)
    assert data.resolution == 16 and [int(data[i][1].argmax()) for i in range(4)] == [0, 1, 0, 1]


def test_csv_source(photos, tmp_path):
    table = tmp_path / 'labels.csv'
    table.write_text('id_code,diagnosis,split\nc,2,train\na,0,train\ndark,1,val\n')
    dest = tmp_path / 'out.zip'
    run('--source', table, '--image-dir', photos, '--dest', dest, '--split', 'train', '--width', 32)
    data = ImageArchive(dest, labels=True)
    assert [int(data[i][1].argmax()) for i in range(2)] == [2, 0]
    report = pd.read_csv(tmp_path / 'out.zip.report.csv')
    assert list(report.name) == ['c.png', 'a.png']
    with pytest.raises(UserError, match='no row .* it has train, val'):
        run(
            '--source',
            table,
            '--image_dir',
            photos,
            '--dest',
            tmp_path / 'x.zip',
            '--split',
            'test',
        )
    table.write_text('id_code,diagnosis\na,0\n')
    with pytest.raises(UserError, match='no split column'):
        run(
            '--source',
            table,
            '--image_dir',
            photos,
            '--dest',
            tmp_path / 'x.zip',
            '--split',
            'test',
        )


def test_csv_finds_the_images_beside_it(photos, tmp_path):
    photos.rename(tmp_path / 'images')
    (tmp_path / 'labels.csv').write_text('id_code\na\n')
    run('--source', tmp_path / 'labels.csv', '--dest', tmp_path / 'out.zip', '--width', 32)
    assert len(ImageArchive(tmp_path / 'out.zip')) == 1


def test_kept_names_replace_the_photographs(photos, tmp_path):
    (photos / 'labels.csv').write_text('id_code,diagnosis,patient_id\nc,2,p1\ndark,1,p2\na,0,p3\n')
    dest = tmp_path / 'cropped'
    run(
        '--source',
        photos / 'labels.csv',
        '--dest',
        dest,
        '--transform=fundus',
        '--width=32',
        '--keep_names',
    )
    table = read_table(dest / 'labels.csv', require_label=True)
    assert table.ids == ['c', 'a'] and table.patients == ['p1', 'p3']
    assert [p.name for p in table.paths] == ['c.png', 'a.png']
    assert load_rgb(table.paths[0]).size == (32, 32)
    with pytest.raises(UserError, match='makes a folder'):
        run('--source', photos, '--dest', tmp_path / 'x.zip', '--width=32', '--keep_names')
    shutil.copy(photos / 'a.png', photos / 'sub' / 'a.png')
    with pytest.raises(UserError, match='several images of one name.*\n.*a.png'):
        run('--source', photos, '--dest', tmp_path / 'x', '--width=32', '--keep_names')


@pytest.mark.parametrize(
    'ids',
    [['b.jpg', 'c.png', '1.2.840.0.jpg', '1.2.840.1.jpg'], ['b', 'c', '1.2.840.0', '1.2.840.1']],
)
def test_the_table_of_kept_names_finds_its_pictures(tmp_path: Path, ids: list[str]) -> None:
    """Photographs of any suffix become .png; the ids of their table are copied as they are."""
    (tmp_path / 'photos').mkdir()
    for i, name in enumerate(['b.jpg', 'c.png', '1.2.840.0.jpg', '1.2.840.1.jpg']):
        photograph(level=100 + 40 * i).save(tmp_path / 'photos' / name)
    table = tmp_path / 'labels.csv'
    pd.DataFrame({'image': ids, 'patient': list('pqrs')}).to_csv(table, index=False)
    flags = ['--width=32', '--keep_names', '--transform=fundus']
    run(
        '--source',
        table,
        '--image_dir',
        tmp_path / 'photos',
        '--dest',
        tmp_path / 'cropped',
        *flags,
    )
    cropped = read_table(tmp_path / 'cropped/labels.csv')
    assert cropped.ids == ids and cropped.patients == list('pqrs')
    assert [p.name for p in cropped.paths] == ['b.png', 'c.png', '1.2.840.0.png', '1.2.840.1.png']
    brightness = [np.asarray(load_rgb(p)).mean() for p in cropped.paths]
    assert brightness == sorted(brightness)
    # The folder is a source again.
    run('--source', tmp_path / 'cropped/labels.csv', '--dest', tmp_path / 'again', *flags)
    assert read_table(tmp_path / 'again/labels.csv').ids == ids


def test_partial_labels_become_null(photos, tmp_path):
    (photos / 'dataset.json').write_text(json.dumps({'labels': [['a.png', 1]]}))
    run('--source', photos, '--dest', tmp_path / 'out.zip', '--width', 32)
    assert json.loads(zipfile.ZipFile(tmp_path / 'out.zip').read('dataset.json')) == {
        'labels': None
    }


@pytest.mark.parametrize('flag', ['--max-images', '--max_images'])
def test_max_images_counts_what_is_kept(photos, tmp_path, flag):
    run(
        '--source',
        photos,
        '--dest',
        tmp_path / 'o.zip',
        '--transform',
        'fundus',
        '--width',
        32,
        flag,
        2,
        '--resize-filter',
        'box',
    )
    assert len(ImageArchive(tmp_path / 'o.zip')) == 2
    report = pd.read_csv(tmp_path / 'o.zip.report.csv')
    assert list(report.name) == ['a.png', 'broken.png', 'c.png']


def test_center_crop_takes_the_middle():
    image = Image.new('RGB', (96, 64), (255, 0, 0))
    image.paste((0, 255, 0), (16, 0, 80, 64))
    square = transform_image(image, transform='center-crop', width=32, height=32)
    assert square.size == (32, 32) and square.getextrema() == ((0, 0), (255, 255), (0, 0))


def test_center_crop_wide_pads_to_a_square():
    image = Image.new('RGB', (160, 160), (255, 255, 255))
    square = np.asarray(transform_image(image, transform='center-crop-wide', width=64, height=32))
    assert square.shape == (64, 64, 3)
    assert square[16:48].min() == 255 and square[:16].max() == 0 and square[48:].max() == 0


def test_resizing_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    for name in ('lanczos', 'box', 'bilinear', 'bicubic', 'hamming'):
        small = np.asarray(
            transform_image(Image.fromarray(stripes), width=32, height=32, resample=name)
        )
        assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() <= 3, name


def test_no_transform_keeps_pixels(tmp_path):
    source = tmp_path / 'in'
    source.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(source / 'a.png')
    run('--source', source, '--dest', tmp_path / 'out.zip')
    img = ImageArchive(tmp_path / 'out.zip')[0][0]
    assert torch.equal(img, torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize(
    'options,words',
    [
        (['--width', '48'], 'powers of two'),
        (['--width', '64', '--height', '32'], 'equal sizes'),
        (['--transform', 'center-crop-wide', '--width', '64'], '--height'),
        (['--mask'], '--transform fundus'),
        (['--split', 'train'], 'no CSV table'),
        (['--image_dir', '.'], 'CSV table'),
        ([], 'not squares of one power of two'),
    ],
)
def test_bad_options_leave_nothing_behind(photos, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        run('--source', photos, '--dest', tmp_path / 'out.zip', *options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['photos']


def test_paths_that_would_mix_sources_and_results(photos, tmp_path):
    for dest in (photos / 'out.zip', photos / 'sub' / 'out'):
        with pytest.raises(UserError, match='lies inside --source'):
            run('--source', photos, '--dest', dest, '--width', 32)
    with pytest.raises(UserError, match='given twice'):
        run('--source', photos, '--source', photos / 'sub' / '..', '--dest', tmp_path / 'o.zip')
    with pytest.raises(UserError, match='archives are ZIP files'):
        run('--source', photos, '--dest', tmp_path / 'out.tar', '--width', 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['photos']


def test_bad_sources(photos, tmp_path):
    with pytest.raises(UserError, match='no such folder'):
        run('--source', tmp_path / 'none', '--dest', tmp_path / 'o.zip')
    (tmp_path / 'o.zip').write_bytes(b'precious')
    with pytest.raises(UserError, match='already exists'):
        run('--source', photos, '--dest', tmp_path / 'o.zip', '--width', 32)
    assert (tmp_path / 'o.zip').read_bytes() == b'precious'
    for name in ('a.png', 'c.png', 'sub/b.jpg'):
        (photos / name).unlink()
    with pytest.raises(UserError, match='none of the 2 images'):
        run('--source', photos, '--dest', tmp_path / 'p.zip', '--transform', 'fundus')
