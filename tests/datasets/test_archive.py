"""The reader and writer of StyleGAN2-ADA archives."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from datasets.archive import ArchiveWriter, FileStore, ImageArchive, encode_labels
from utils.errors import UserError
from utils.io import digest_files


def picture(seed, size=16):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    )


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format='PNG')
    return buffer.getvalue()


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.fixture(params=['zip', 'folder'])
def archive(request, tmp_path):
    path = tmp_path / ('a.zip' if request.param == 'zip' else 'a')
    with ArchiveWriter(path) as writer:
        for i in range(5):
            writer.add(picture(i), i % 3)
    return path


def test_round_trip(archive):
    data = ImageArchive(archive, labels=True)
    assert (len(data), data.resolution, data.label_dim) == (5, 16, 3)
    for i in range(5):
        img, label = data[i]
        assert img.dtype == torch.uint8 and torch.equal(img, as_tensor(picture(i)))
        assert label.tolist() == [float(j == i % 3) for j in range(3)]
    assert data.images([4, 0]).shape == (2, 3, 16, 16)
    assert torch.equal(data.images([4, 0])[1], data[0][0])
    with pytest.raises(IndexError):
        data[5]
    assert ImageArchive(archive)[0][1].shape == (0,)


def test_zip_layout(tmp_path):
    for name in ('a.zip', 'b.zip'):
        with ArchiveWriter(tmp_path / name) as writer:
            assert writer.add(picture(0), 4) == '00000/img00000000.png'
            assert writer.add(picture(1), 2) == '00000/img00000001.png'
    with zipfile.ZipFile(tmp_path / 'a.zip') as file:
        assert all(i.compress_type == zipfile.ZIP_STORED for i in file.infolist())
        assert json.loads(file.read('dataset.json')) == {
            'labels': [['00000/img00000000.png', 4], ['00000/img00000001.png', 2]]
        }
        image = file.read('00000/img00000000.png')
    assert len(image) > 16 * 16 * 3  # the PNG itself is not compressed either
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()


def test_labels_are_null_when_one_is_missing(tmp_path):
    with ArchiveWriter(tmp_path / 'a.zip') as writer:
        writer.add(picture(0), 1)
        writer.add(picture(1))
    with zipfile.ZipFile(tmp_path / 'a.zip') as file:
        assert json.loads(file.read('dataset.json')) == {'labels': None}
    with pytest.raises(UserError, match='no labels'):
        ImageArchive(tmp_path / 'a.zip', labels=True)


def test_the_digest_sees_other_pictures_of_the_same_names_and_sizes(tmp_path):
    for kind in ('zip', 'folder'):
        found = []
        for content in (0, 0, 1):
            path = tmp_path / f'{kind}{len(found)}' / ('a.zip' if kind == 'zip' else 'a')
            with ArchiveWriter(path) as writer:  # uncompressed: all files are equally large
                for i in range(3):
                    writer.add(picture(i + content))
            data = ImageArchive(path)
            found.append((data.digest(), ImageArchive(path, subset=2).digest()))
        assert found[0] == found[1] and found[0][0] != found[0][1]
        assert found[2][0] != found[0][0] and found[2][1] != found[0][1]
    names = ['00000/img00000000.png', '00000/img00000001.png']
    paths = [tmp_path / 'folder0/a' / n for n in names]
    assert digest_files(names, paths) == digest_files(names, paths)
    assert digest_files(names, paths) != digest_files(names, paths[::-1])


def test_mirror_subset_and_cache(archive):
    data = ImageArchive(archive, mirror=True, labels=True, cache=True)
    assert len(data) == 10
    assert torch.equal(data[7][0], data[2][0].flip(2)) and torch.equal(data[7][1], data[2][1])
    kept = data[2][0].clone()
    assert data[2][0] is data[2][0]  # the second read comes from memory
    assert torch.equal(data[2][0], kept)
    some = ImageArchive(archive, subset=3, seed=1, labels=True)
    assert len(some) == 3 and some.names == sorted(some.names)
    assert some.names == ImageArchive(archive, subset=3, seed=1).names
    assert {tuple(ImageArchive(archive, subset=3, seed=s).names) for s in range(5)} != {
        tuple(some.names)
    }
    full = ImageArchive(archive, labels=True)
    for i, name in enumerate(some.names):
        j = full.names.index(name)
        assert torch.equal(some[i][0], full[j][0]) and torch.equal(some[i][1], full[j][1])
    assert some.label_dim == 3  # one-hot over the classes of the whole archive
    assert len(ImageArchive(archive, subset=5)) == 5
    with pytest.raises(UserError, match='holds 5 images'):
        ImageArchive(archive, subset=6)


def test_workers_and_pickling(archive):
    data = ImageArchive(archive)
    first = data[0][0]  # opens the file before the workers fork
    loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=2)
    got = torch.cat([images for images, _ in loader])
    assert torch.equal(got, data.images(range(5)))
    assert torch.equal(pickle.loads(pickle.dumps(data))[0][0], first)


def test_foreign_layouts(tmp_path):
    """A folder tree with greyscale, palette and JPEG files, and label vectors."""
    root = tmp_path / 'tree'
    (root / 'b').mkdir(parents=True)
    picture(0).convert('L').save(root / 'b' / 'grey.png')
    picture(1).convert('P').save(root / 'a.png')
    picture(2).save(root / 'c.JPG', format='JPEG')
    (root / 'notes.txt').write_text('not an image')
    (root / 'dataset.json').write_text(
        json.dumps({'labels': [['b/grey.png', [0.5, 1]], ['a.png', [0, 2]], ['c.JPG', [3, 4]]]})
    )
    data = ImageArchive(root, labels=True)
    assert data.names == ['a.png', 'b/grey.png', 'c.JPG']
    assert [data[i][1].tolist() for i in range(3)] == [[0, 2], [0.5, 1], [3, 4]]
    grey = data[1][0]
    assert grey.shape == (3, 16, 16) and torch.equal(grey[0], grey[1])


def test_bad_files_are_listed_together(tmp_path):
    path = tmp_path / 'bad.zip'
    with zipfile.ZipFile(path, 'w') as file:
        for i in range(4):
            file.writestr(f'ok{i}.png', png(picture(i)))
        file.writestr('broken.png', b'nonsense')
        file.writestr('large.png', png(picture(0, 32)))
        file.writestr('odd.png', png(picture(0, 24)))
        file.writestr('wide.png', png(Image.new('RGB', (32, 16))))
        file.writestr('__MACOSX/._ok0.png', b'resource fork')
    with pytest.raises(UserError) as error:
        ImageArchive(path)
    text = str(error.value)
    assert text.startswith(f'{path}: 4 of 8 images')
    for words in (
        'broken.png: unreadable',
        'large.png: 32x32, the others are 16x16',
        'odd.png: 24x24, not a power of two',
        'wide.png: 32x16, not square',
        'dataset_tool.py',
    ):
        assert words in text


def test_truncated_pixel_data_is_reported_by_name(tmp_path):
    path = tmp_path / 'a.zip'
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('cut.png', png(picture(0, 64))[:3000])
    with pytest.raises(UserError, match='cut.png is not a readable image'):
        ImageArchive(path)[0]


@pytest.mark.parametrize(
    'content,words',
    [
        ('{', 'must read'),
        ('[1]', 'must read'),
        ('{"labels": [1, 2]}', 'must read'),
        ('{"labels": [["a.png", 1]]}', 'no label for 1 images'),
        ('{"labels": [["a.png", 1], ["b.png", [1.0]]]}', 'all class numbers'),
        ('{"labels": [["a.png", -1], ["b.png", 0]]}', 'all class numbers'),
        ('{"labels": [["a.png", "x"], ["b.png", "y"]]}', 'all class numbers'),
        ('{"labels": [["a.png", 0], ["b.png", 1000000000]]}', 'all class numbers'),
        ('{"labels": [["a.png", [NaN]], ["b.png", [1]]]}', 'all class numbers'),
        ('{"labels": ' + '[' * 100_000, 'must read'),
        ('{"labels": {"a": 1}}', 'must read'),
        ('{"labels": [[["a"], 1, 2]]}', 'must read'),
    ],
)
def test_bad_labels(tmp_path, content, words):
    for name in ('a.png', 'b.png'):
        picture(0).save(tmp_path / name)
    (tmp_path / 'dataset.json').write_text(content)
    with pytest.raises(UserError, match=words):
        ImageArchive(tmp_path, labels=True)


def test_label_encoding():
    assert encode_labels([2, 0]).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert encode_labels([[0.5], [2]]).tolist() == [[0.5], [2]]


def test_missing_empty_and_foreign_sources(tmp_path):
    with pytest.raises(UserError, match='no such folder or ZIP'):
        ImageArchive(tmp_path / 'none.zip')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no images'):
        ImageArchive(tmp_path / 'empty')
    (tmp_path / 'a.zip').write_bytes(b'not a zip')
    with pytest.raises(UserError, match='not a readable ZIP'):
        ImageArchive(tmp_path / 'a.zip')


@pytest.mark.parametrize('name', ['a.zip', 'a'])
def test_writer_leaves_nothing_behind_after_an_error(tmp_path, name):
    with pytest.raises(RuntimeError), ArchiveWriter(tmp_path / name) as writer:
        writer.add(picture(0))
        raise RuntimeError
    assert os.listdir(tmp_path) == []


_KILLED = """
import os, signal, sys
from PIL import Image
from datasets.archive import ArchiveWriter
with ArchiveWriter(sys.argv[1]) as writer:
    writer.add(Image.new('RGB', (16, 16)))
    if sys.argv[2] == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
    print('writing', flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize('name', ['a.zip', 'a'])
def test_photographs_a_killed_writer_left_are_removed(tmp_path, name):
    command = [sys.executable, '-c', _KILLED, str(tmp_path / name)]
    assert subprocess.run([*command, 'killed'], cwd=ROOT).returncode == -9
    assert len(os.listdir(tmp_path)) == 1
    other = subprocess.Popen(
        [*command, 'alive'], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b'writing\n'
    (live,) = os.listdir(tmp_path)  # the dead one's is gone; this one's must stay
    with ArchiveWriter(tmp_path / name) as writer:
        assert live in os.listdir(tmp_path)
        writer.add(picture(0))
    assert sorted(os.listdir(tmp_path)) == sorted([live, name])
    other.kill()
    other.communicate()


def test_writer_never_overwrites(archive, tmp_path):
    with pytest.raises(UserError, match='already exists'):
        ArchiveWriter(archive)
    (tmp_path / 'empty').mkdir()
    with ArchiveWriter(tmp_path / 'empty') as writer:
        writer.add(picture(0))
    assert FileStore(tmp_path / 'empty').names == ['00000/img00000000.png', 'dataset.json']
