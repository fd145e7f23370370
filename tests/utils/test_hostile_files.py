"""Damaged and hostile files through what loads them: a clear error or the right result."""

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT
from hostile import CONTENT, flips, key_of_tuples, list_bomb, same, tuple_bomb
from PIL import Image

from datasets import archive as archive_module
from datasets.archive import FileStore, ImageArchive
from datasets.groups import read_groups
from training.checkpoints import Checkpoints
from training.stylegan2_run import SNAPSHOT_PREFIX, snapshots
from utils.errors import UserError
from utils.io import load_weights, save_torch
from utils.torch_files import check_pickle


def torch_zip(pickled, *, compressed=False, **members):
    """A ZIP file as torch.save writes it around a given pickle."""
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, 'w', kind) as archive:
        for name, data in {
            'data.pkl': pickled,
            'version': b'3\n',
            'byteorder': b'little',
            **{f'data/{k}': v for k, v in members.items()},
        }.items():
            archive.writestr(f'archive/{name}', data)
    return buffer.getvalue()


# --- damage ---------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_or_harmless(tmp_path):
    path = tmp_path / 'state.pt'
    save_torch(path, CONTENT)
    assert same(load_weights(path), CONTENT)
    data, refused = path.read_bytes(), 0
    for changed in flips(data, step=2):
        path.write_bytes(changed)
        try:
            assert same(load_weights(path), CONTENT)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(data) // 5  # the rest hits padding, dates and unused fields


def test_every_flip_in_the_numbers_is_found(tmp_path):
    path = tmp_path / 'state.pt'
    save_torch(path, CONTENT)
    data = path.read_bytes()
    start = data.index(CONTENT['weights']['a.weight'].numpy().tobytes())
    for i in range(start, start + 1200, 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :])
        with pytest.raises(UserError, match='checksum'):
            load_weights(path)


def test_cut_files_are_refused(tmp_path):
    path = tmp_path / 'state.pt'
    for options in ({}, {'_use_new_zipfile_serialization': False}):
        torch.save(CONTENT, path, **options)
        assert same(load_weights(path), CONTENT)
        data = path.read_bytes()
        for length in (0, 1, 3, 4, 30, *range(50, len(data), 97), len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(UserError, match='state.pt'):
                load_weights(path)


def test_flips_in_files_without_checksums_never_break_the_reader(tmp_path):
    path = tmp_path / 'old.pt'
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    for changed in flips(path.read_bytes(), step=3):
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            load_weights(path)


def test_published_files_must_have_the_hash_of_their_name(tmp_path):
    path = tmp_path / 'resnet18-5c106cde.pth'
    save_torch(path, CONTENT)
    with pytest.raises(UserError, match=r'resnet18-5c106cde\.pth is not the published file'):
        load_weights(path)
    path.rename(tmp_path / 'run-20240131.pth')
    assert same(load_weights(tmp_path / 'run-20240131.pth'), CONTENT)


@pytest.mark.parametrize('place', ['numbers', 'directory', 'header', 'empty'])
def test_trainings_fall_back_to_the_earlier_file(place, tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, CONTENT)
    newest = checkpoints.save(2, CONTENT)
    save_torch(tmp_path / f'{SNAPSHOT_PREFIX}00001.000.pt', CONTENT)
    data = newest.read_bytes()
    if place == 'directory':  # an unknown compression
        i = data.rindex(b'PK\x01\x02') + 11
    elif place == 'header':  # the name of a member as no UTF-8
        i = data.rindex(b'PK\x01\x02') + 46
        data = data[: i - 37] + b'\x08' + data[i - 36 :]
    else:
        i = data.index(CONTENT['weights']['a.weight'].numpy().tobytes()) + 100
    changed = b'' if place == 'empty' else data[:i] + bytes([data[i] ^ 0x88]) + data[i + 1 :]
    newest.write_bytes(changed)
    (tmp_path / f'{SNAPSHOT_PREFIX}00002.000.pt').write_bytes(changed)
    payload, path = checkpoints.latest()
    assert path.name == 'state_1.pt' and same(payload, CONTENT)
    payload, path = snapshots(tmp_path).latest()
    assert path.name == f'{SNAPSHOT_PREFIX}00001.000.pt' and same(payload, CONTENT)
    assert 'state_2.pt' in caplog.text


# --- a full disk, and a signal amid writing -----------------------------------------------------

_SAVING = """
import os, resource, signal, sys, time
import torch
from utils import cli
from utils.io import save_torch

def main():
    if sys.argv[1] == 'full':
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        save_torch('state.pt', {'w': torch.zeros(200_000)})
    payload = {str(i): torch.zeros(4000) for i in range(300)}
    while True:
        save_torch('state.pt', payload)

def stopped(delay):
    child = os.fork()
    if not child:
        cli.run(main)
    time.sleep(delay)
    os.kill(child, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

if sys.argv[1] == 'full':
    cli.run(main)
codes = {stopped(0.2 + 0.013 * i) for i in range(6)}
sys.exit(codes.pop() if len(codes) == 1 else str(codes))
"""


@pytest.mark.parametrize('kind,code', [('full', 1), ('stopped', 143)])
def test_interrupted_writing_is_one_line_and_leaves_nothing(kind, code, tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', _SAVING, kind],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == code, done.stderr
    want = (
        'error: the disk is full while writing state.pt; free some space and run the same '
        'command again\n'
        if kind == 'full'
        else ''
    )
    assert done.stderr == want
    assert not [f for f in os.listdir(tmp_path) if f != 'state.pt']


# --- files that would eat time or memory -------------------------------------------------------


@pytest.mark.parametrize(
    'make',
    [
        lambda: torch_zip(key_of_tuples()),
        lambda: torch_zip(b'\x80\x02' + b'\x8a\x01\x05' + b'r\xff\xff\xff\x1f.'),
        lambda: torch_zip(pickle.dumps({}, protocol=2), compressed=True, **{'0': bytes(2**20)}),
        lambda: key_of_tuples(),
        lambda: b'\x80\x02Nr\xff\xff\xff\x1f0N.',
    ],
)
def test_bombs_in_torch_files_are_refused_at_once(make, tmp_path):
    path = tmp_path / 'bomb.pt'
    path.write_bytes(make())
    with pytest.raises(UserError, match='bomb.pt'):
        load_weights(path)


def test_the_scan_follows_memo_and_marks():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        check_pickle(
            io.BytesIO(
                pickle.dumps(
                    [CONTENT['names'], (1, (2, 3)), {'a': {4, 5}}, b'x'], protocol=protocol
                )
            )
        )
        for wrap in (lambda t: t, lambda t: [t], lambda t: {'a': (1, t)}):
            with pytest.raises(pickle.UnpicklingError, match='tuples'):
                check_pickle(io.BytesIO(pickle.dumps(wrap(tuple_bomb()), protocol=protocol)))
    check_pickle(io.BytesIO(pickle.dumps(list_bomb())))  # refused where it would be printed


def test_tensors_may_not_claim_what_the_file_lacks(tmp_path):
    path = tmp_path / 'wide.pt'
    save_torch(path, {'w': torch.ones(1).expand(10**5, 10**5)})
    with pytest.raises(UserError, match='wide.pt'):
        load_weights(path)
    save_torch(path, {'w': torch.ones(1).expand(100, 100)})
    assert load_weights(path)['w'].sum() == 10**4
    for odd in (torch.eye(3).to_sparse(), torch.ones(3, device='meta')):
        torch.save({'w': odd}, path)
        with pytest.raises(UserError, match='wide.pt'):
            load_weights(path)


def test_a_second_directory_is_refused(tmp_path):
    """Whoever reads the ZIP sees the parts that were checked."""
    data = torch_zip(pickle.dumps({}, protocol=2))
    path = tmp_path / 'two.pt'
    path.write_bytes(data[:-2] + struct.pack('<H', 30) + bytes(30))
    with pytest.raises(UserError, match='two.pt'):
        load_weights(path)


# --- archives of pictures, and group tables ----------------------------------------------------


def png_zip(path, **options):
    """A ZIP with a picture and labels; options of ZipFile.writestr for the picture."""
    buffer = io.BytesIO()
    Image.new('RGB', (16, 16)).save(buffer, format='PNG')
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.png', buffer.getvalue(), **options)
        archive.writestr('dataset.json', '{"labels": [["a.png", 1]]}')
    return path.read_bytes()


def read_archive(path):
    return [ImageArchive(path, labels=True)[0][0].sum()]


@pytest.mark.parametrize('kind', ['stored', 'deflated', 'lzma', 'bzip2'])
def test_damaged_archives_name_themselves(kind, tmp_path):
    path = tmp_path / 'photographs.zip'
    compression = {
        'stored': zipfile.ZIP_STORED,
        'deflated': zipfile.ZIP_DEFLATED,
        'lzma': zipfile.ZIP_LZMA,
        'bzip2': zipfile.ZIP_BZIP2,
    }[kind]
    data = png_zip(path, compress_type=compression)
    assert read_archive(path) == [0]
    for changed in [*flips(data), *(data[:n] for n in range(0, len(data), 40))]:
        path.write_bytes(changed)
        try:
            read_archive(path)
        except UserError as error:
            assert 'photographs.zip' in str(error) and len(str(error)) < 2000


def test_encrypted_and_unknown_members(tmp_path):
    path = tmp_path / 'photographs.zip'
    data = png_zip(path)
    for where, value in ((8, 1), (10, 99)):  # flags and method, in the central directory
        for name in (b'a.png', b'dataset.json'):
            i = data.rindex(name) - 46 + where
            path.write_bytes(data[:i] + bytes([value]) + data[i + 1 :])
            with pytest.raises(UserError, match='photographs.zip'):
                read_archive(path)


def test_what_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, '_MAX_FILE', 2**20)
    path = tmp_path / 'photographs.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a.png', bytes(2**21))
        archive.writestr('dataset.json', b'{"labels": null}' + b' ' * 2**21)
    assert path.stat().st_size < 20_000
    store = FileStore(path)
    for read in (
        lambda: store.pixels('a.png'),
        lambda: store.size('a.png'),
        store.labels,
        lambda: ImageArchive(path),
    ):
        with pytest.raises(UserError, match='2 MiB, more than the 1 MiB'):
            read()


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'\x00\x01\x02' * 50,
        b'\xff\xfe\x00',
        b'id_code,centers',
        b'id_code,centers\n',
        b'id_code,centers\n"a,1\n',
        b'id_code,centers\na,inf\n',
        b'id_code,centers\na,nan\n',
        b'id_code,centers\na,1.5\n',
        b'id_code,centers\na,-1\n',
        b'id_code,centers\na,1e300\n',
        b'id_code,centers\na,0\n',
        b'id_code,centers\na,1,2\nb,1\n',
        b'id_code\na\n',
        b'\xe9d_code,centers\n',
        b'id_code,centers\na,' + b'9' * 400 + b'\n',
        b'PK\x03\x04',
    ],
)
def test_damaged_group_tables(data, tmp_path):
    path = tmp_path / 'groups.csv'
    path.write_bytes(data)
    with pytest.raises(UserError, match='groups.csv'):
        read_groups(path)


def test_group_tables_with_byte_order_marks_are_read(tmp_path):
    path = tmp_path / 'groups.csv'
    path.write_bytes(b'\xef\xbb\xbfid_code,centers\r\na,2\r\nb,1\r\nc,2\r\nd,0\r\n')
    assert [(g.number, g.members) for g in read_groups(path)] == [(1, ['b']), (2, ['a', 'c'])]
