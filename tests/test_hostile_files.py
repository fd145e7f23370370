"""Damaged and hostile files through what loads them: a clear error or the right result."""
import contextlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from nvidia_layout import make_generator, write_pickle
from PIL import Image

from classification.grader import build_grader
from classification.settings import Settings
from criteria.lpips_loss import LPIPSLoss
from datasets import archive as archive_module
from datasets.archive import FileStore, ImageArchive
from datasets.groups import read_groups
from evaluation.attacks.pairs import PairConfig, build_pair_net, load_pair_attack
from evaluation.fidelity import InceptionNetwork
from models.encoders import build_encoder, encoder_from_state, load_resnet34
from models.features.content import (
    content_checkpoint,
    content_network_from_state,
    load_content_network,
)
from models.features.style import load_style_network
from models.psp import PSP, load_psp, psp_checkpoint
from models.resnet import build_resnet
from models.stylegan2 import (
    Generator,
    discriminator_from_state,
    generator_from_state,
    load_generator,
)
from models.stylegan2.model import Discriminator
from models.stylegan2.nvidia_pickle import convert, read_pickle
from training.checkpoints import latest_checkpoint, save_checkpoint
from training.stylegan2_loop import SNAPSHOT_PREFIX, latest_snapshot
from utils.errors import UserError
from utils.io import load_weights, save_torch
from utils.torch_files import check_pickle

convert_script = load_script('convert_stylegan2_ada')
generate_script = load_script('generate')

CONTENT = {'weights': {'a.weight': torch.arange(300.).reshape(20, 15), 'a.bias': torch.ones(20),
                       'half': torch.ones(7, dtype=torch.float16)},
           'step': 5, 'best': 0.25, 'names': ['x', 'y'], 'betas': (0.9, 0.99), 'none': None}


def same(a, b):
    """Whether two nested containers hold the same values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def flips(data, *, step=1, seed=0):
    """Copies of `data` with one flipped bit, in every `step`-th byte."""
    draw = random.Random(seed)
    for i in range(0, len(data), step):
        changed = bytearray(data)
        changed[i] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def tuple_bomb(depth=60):
    """A tuple of 2^depth values in a few hundred bytes: hashing it never ends."""
    bomb = ()
    for _ in range(depth):
        bomb = (bomb, bomb)
    return bomb


def list_bomb(depth=60):
    """A list whose text would have 2^depth brackets."""
    bomb = []
    for _ in range(depth):
        bomb = [bomb, bomb]
    return bomb


class AsKey:
    """Pickles as a dict with `key`, without hashing it first."""

    def __init__(self, key):
        self.key = key

    def __reduce__(self):
        return dict, (), None, None, iter([(self.key, 1)])


def key_of_tuples():
    """The pickle of {bomb: 1} as torch's reader takes it: no names, protocol 2."""
    body = pickle.dumps(tuple_bomb(), protocol=2)
    assert body.startswith(b'\x80\x02') and body.endswith(b'.')
    return b'\x80\x02}' + body[2:-1] + b'K\x01s.'


def torch_zip(pickled, *, compressed=False, **members):
    """A ZIP file as torch.save writes it around a given pickle."""
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, 'w', kind) as archive:
        for name, data in {'data.pkl': pickled, 'version': b'3\n', 'byteorder': b'little',
                           **{f'data/{k}': v for k, v in members.items()}}.items():
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
    assert refused > len(data) // 5    # the rest hits padding, dates and unused fields


def test_every_flip_in_the_numbers_is_found(tmp_path):
    path = tmp_path / 'state.pt'
    save_torch(path, CONTENT)
    data = path.read_bytes()
    start = data.index(CONTENT['weights']['a.weight'].numpy().tobytes())
    for i in range(start, start + 1200, 7):
        path.write_bytes(data[:i] + bytes([data[i] ^ 4]) + data[i + 1:])
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
    save_checkpoint(tmp_path, 1, CONTENT)
    newest = save_checkpoint(tmp_path, 2, CONTENT)
    save_torch(tmp_path / f'{SNAPSHOT_PREFIX}00001.000.pt', CONTENT)
    data = newest.read_bytes()
    if place == 'directory':    # an unknown compression
        i = data.rindex(b'PK\x01\x02') + 11
    elif place == 'header':     # the name of a member as no UTF-8
        i = data.rindex(b'PK\x01\x02') + 46
        data = data[:i - 37] + b'\x08' + data[i - 36:]
    else:
        i = data.index(CONTENT['weights']['a.weight'].numpy().tobytes()) + 100
    changed = b'' if place == 'empty' else data[:i] + bytes([data[i] ^ 0x88]) + data[i + 1:]
    newest.write_bytes(changed)
    (tmp_path / f'{SNAPSHOT_PREFIX}00002.000.pt').write_bytes(changed)
    payload, path = latest_checkpoint(tmp_path)
    assert path.name == 'iteration_1.pt' and same(payload, CONTENT)
    path, payload = latest_snapshot(tmp_path)
    assert path.name == f'{SNAPSHOT_PREFIX}00001.000.pt' and same(payload, CONTENT)
    assert 'iteration_2.pt' in caplog.text


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
    done = subprocess.run([sys.executable, '-c', _SAVING, kind], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == code, done.stderr
    want = 'error: the disk is full while writing state.pt; free some space and run the same ' \
           'command again\n' if kind == 'full' else ''
    assert done.stderr == want
    assert not [f for f in os.listdir(tmp_path) if f != 'state.pt']


# --- files that would eat time or memory -------------------------------------------------------


@pytest.mark.parametrize('make', [
    lambda: torch_zip(key_of_tuples()),
    lambda: torch_zip(b'\x80\x02' + b'\x8a\x01\x05' + b'r\xff\xff\xff\x1f.'),
    lambda: torch_zip(pickle.dumps({}, protocol=2), compressed=True, **{'0': bytes(2 ** 20)}),
    lambda: key_of_tuples(),
    lambda: b'\x80\x02Nr\xff\xff\xff\x1f0N.'])
def test_bombs_in_torch_files_are_refused_at_once(make, tmp_path):
    path = tmp_path / 'bomb.pt'
    path.write_bytes(make())
    with pytest.raises(UserError, match='bomb.pt'):
        load_weights(path)


def test_the_scan_follows_memo_and_marks():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        check_pickle(io.BytesIO(pickle.dumps([CONTENT['names'], (1, (2, 3)), {'a': {4, 5}}, b'x'],
                                             protocol=protocol)))
        for wrap in (lambda t: t, lambda t: [t], lambda t: {'a': (1, t)}):
            with pytest.raises(pickle.UnpicklingError, match='tuples'):
                check_pickle(io.BytesIO(pickle.dumps(wrap(tuple_bomb()), protocol=protocol)))
    check_pickle(io.BytesIO(pickle.dumps(list_bomb())))    # refused where it would be printed


def test_tensors_may_not_claim_what_the_file_lacks(tmp_path):
    path = tmp_path / 'wide.pt'
    save_torch(path, {'w': torch.ones(1).expand(10 ** 5, 10 ** 5)})
    with pytest.raises(UserError, match='wide.pt'):
        load_weights(path)
    save_torch(path, {'w': torch.ones(1).expand(100, 100)})
    assert load_weights(path)['w'].sum() == 10 ** 4
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


# --- files of the right kind with wrong content ------------------------------------------------


def small_generator():
    torch.manual_seed(0)
    return Generator(32, style_dim=8, n_mlp=2, channels={4: 6, 8: 5, 16: 4, 32: 4})


def small_psp():
    torch.manual_seed(0)
    net = small_generator()
    encoder = build_encoder('LightEncoder', n_styles=net.n_latent, style_dim=8, input_size=32,
                            width=4)
    return psp_checkpoint(PSP(encoder, net, torch.zeros(8), 32), {'seed': 0})


def content_file():
    torch.manual_seed(0)
    return content_checkpoint(build_resnet('resnet18'), arch='resnet18', input_size=32,
                              small_stem=False)


WRONG = [None, [], 'text', 7, torch.zeros(3), {}, {1: torch.zeros(3)}, {'a': 'text'}, list_bomb()]


def refused_state(load, file, content, state, prefix=''):
    """`load(file)` must name the file for each wrong replacement of `content[state]`."""
    for wrong in [*WRONG, {**content[state], f'{prefix}more': torch.zeros(2)},
                  dict(list(content[state].items())[:-1])]:
        save_torch(file, {**content, state: wrong})
        with pytest.raises(UserError) as error:
            load(file)
        assert file.name in str(error.value) and len(str(error.value)) < 2000


def test_generator_files(tmp_path):
    net, file = small_generator(), tmp_path / 'generator.pt'
    good = {'g_ema': net.state_dict(), 'latent_avg': torch.ones(8)}
    save_torch(file, good)
    loaded, latent_avg = load_generator(file)
    assert same(loaded.state_dict(), net.state_dict()) and torch.equal(latent_avg, torch.ones(8))
    refused_state(load_generator, file, good, 'g_ema')
    for content in WRONG[1:]:
        save_torch(file, content)
        with pytest.raises(UserError, match='generator.pt'):
            load_generator(file)
    for wrong in ([1.0] * 8, 'text', torch.zeros(7), torch.full((8,), float('nan')),
                  torch.zeros(8, dtype=torch.long)):
        save_torch(file, {**good, 'latent_avg': wrong})
        for load in (load_generator, convert_script.read_port):
            with pytest.raises(UserError, match='generator.pt: latent_avg'):
                load(file)


def test_generators_of_absurd_size_take_no_memory():
    state = small_generator().state_dict()
    wide = torch.zeros(1, 10 ** 6, 1, 1, 1)
    # Layers of a million channels each: built, they would take terabytes.
    for changed in ({**state, 'convs.0.conv.weight': wide, 'convs.2.conv.weight': wide},
                    {**state, 'conv1.conv.modulation.weight': torch.zeros(6, 10 ** 6)},
                    {**state, **{f'style.{i}.weight': torch.zeros(()) for i in range(10 ** 5)}},
                    {**state, **{f'convs.{2 * i}.conv.weight': wide for i in range(2000)}}):
        with pytest.raises(UserError, match='no StyleGAN2 generator'):
            generator_from_state(changed)
    critic = Discriminator(32, channels={4: 6, 8: 5, 16: 4, 32: 4}).state_dict()
    for changed in ({**critic, 'convs.0.0.weight': torch.zeros(10 ** 6, 3, 1, 1),
                     'convs.1.skip.1.weight': torch.zeros(10 ** 6, 1, 1, 1)},
                    {**critic, **{f'convs.{i}.skip.1.weight': wide for i in range(2000)}}):
        with pytest.raises(UserError, match='no StyleGAN2 discriminator'):
            discriminator_from_state(changed)
    with pytest.raises(UserError, match='does not fit'):
        encoder_from_state({'stem.weight': torch.zeros(10 ** 6, 6, 1, 1)}, n_styles=8, style_dim=8)


def test_encoder_checkpoints(tmp_path):
    good, file = small_psp(), tmp_path / 'restyle.pt'
    assert good['opts']['device'] == 'cpu'    # the published classes do latent_avg.to(device)
    save_torch(file, good)
    assert same(load_psp(file).state_dict(), good['state_dict'])
    refused_state(load_psp, file, good, 'state_dict', 'decoder.')
    for part in ('encoder.', 'decoder.'):
        save_torch(file, {**good, 'state_dict': {
            k: v for k, v in good['state_dict'].items() if not k.startswith(part)}})
        with pytest.raises(UserError, match='restyle.pt'):
            load_psp(file)
    changes = [('opts', w) for w in ([1], 'text', 7, torch.zeros(3), list_bomb())]
    changes += [('opts', {'encoder_size': w})
                for w in ('32', -1, 0, 10 ** 9, 32.0, [32], list_bomb(), torch.tensor(32))]
    changes += [('latent_avg', w) for w in ('text', [0.0], torch.zeros(9), torch.zeros(5, 8),
                                            torch.full((8,), float('inf')), list_bomb())]
    for entry, wrong in changes:
        save_torch(file, {**good, entry: wrong})
        with pytest.raises(UserError, match='restyle.pt'):
            load_psp(file)
    for fits in (None, torch.ones(8), torch.ones(1, 8), torch.ones(8, 8)):
        save_torch(file, {**good, 'opts': None, 'latent_avg': fits})
        assert load_psp(file).latent_avg.shape == (8, 8)


def test_content_networks(tmp_path):
    good, file = content_file(), tmp_path / 'content.pt'
    save_torch(file, good)
    assert load_content_network(file).input_size == 32
    for entry, wrong in [('arch', w) for w in ('resnet99', None, 7, list_bomb())] + [
            ('input_size', w) for w in (0, -3, 10 ** 12, '32', None, 2.5, list_bomb())] + [
            ('small_stem', w) for w in ('no', None, list_bomb())] + [
            ('state_dict', w) for w in WRONG]:
        with pytest.raises(UserError, match='content.pt'):
            content_network_from_state({**good, entry: wrong}, source=file)
    with pytest.raises(UserError, match='content.pt'):
        content_network_from_state({k: v for k, v in good.items() if k != 'arch'}, source=file)


@pytest.mark.parametrize('load', [
    load_style_network, LPIPSLoss, load_resnet34, load_content_network, InceptionNetwork,
    lambda path: build_pair_net(PairConfig(k=2, image_size=32), imagenet_weights=path),
    lambda path: build_grader(Settings(arch='resnet18'), seed=0, imagenet_weights=path),
    lambda path: load_pair_attack(path, 'cpu'), load_generator, load_psp,
    convert_script.read_port], ids=str)
def test_every_weight_flag_refuses_other_files(load, tmp_path):
    file = tmp_path / 'other.pt'
    one = torch.zeros(3)
    files = [None, one, {1: one}, {'state_dict': [1]}, {'state_dict': {'a': one}}, list_bomb(),
             {'layer1.0.conv2.weight': one[0]}, {'features.0.weight': one}]
    for content in files:
        save_torch(file, content)
        with pytest.raises(UserError, match='other.pt'):
            load(file)
    for data in (b'', b'text', key_of_tuples()):
        file.write_bytes(data)
        with pytest.raises(UserError, match='other.pt'):
            load(file)


def test_what_was_checked_is_what_torch_fidelity_reads(tmp_path, monkeypatch):
    """A pickle that takes the place of the file after it was read never runs."""
    import torch_fidelity.feature_extractor_inceptionv3 as theirs
    file, marker = tmp_path / 'inception.pth', tmp_path / 'marker'
    save_torch(file, {'w': torch.zeros(2)})

    class Swapping:
        def __init__(self, *args, feature_extractor_weights_path):
            file.write_bytes(pickle.dumps(Runs(marker)))
            self.content = torch.load(feature_extractor_weights_path, weights_only=False)
    monkeypatch.setattr(theirs, 'FeatureExtractorInceptionV3', Swapping)
    assert same(InceptionNetwork(file).net.content, {'w': torch.zeros(2)})
    assert not marker.exists()


class Runs:
    """Unpickled, it leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_latents_for_pictures(tmp_path):
    net = small_generator()
    file = tmp_path / 'w.npy'
    np.save(file, np.zeros((2, net.n_latent, 8)))
    assert generate_script.read_latents(file, net).shape == (2, net.n_latent, 8)
    whole = file.read_bytes()
    header = b'\x93NUMPY\x01\x00' + struct.pack('<H', 118)
    claim = "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000, 8, 8)}"
    cases = [b'', whole[:40], whole[:200], b'\x93NUMPY\x02\x00\xff\xff\xff\xff' + bytes(50),
             header + claim.ljust(117).encode() + b'\n' + bytes(100), b'PK\x03\x04', b'text']
    for array in (np.array(['a', 'b']), np.zeros(3, [('x', 'f4')]), np.zeros(3, complex),
                  np.full((1, net.n_latent, 8), np.nan), np.zeros((2, 3))):
        np.save(file, array)
        cases.append(file.read_bytes())
    np.save(file, np.array([{}], object), allow_pickle=True)
    cases.append(file.read_bytes())
    for data in cases:
        file.write_bytes(data)
        with pytest.raises(UserError, match='--projected_w'):
            generate_script.read_latents(file, net)
    for name, array in (('v', np.zeros((1, 8, 8))), ('w', np.array(['a']))):
        np.savez(tmp_path / 'w.npz', **{name: array})
        with pytest.raises(UserError, match='--projected_w'):
            generate_script.read_latents(tmp_path / 'w.npz', net)


# --- NVIDIA's pickles --------------------------------------------------------------------------


def nvidia_pickle(tmp_path, change=lambda net: None):
    net = make_generator(channels={4: 6, 8: 5, 16: 4, 32: 4})
    change(net)
    return write_pickle(tmp_path / 'net.pkl', {'G_ema': net})


def test_pickles_with_bombs_are_refused_at_once(tmp_path):
    def put(where, name, value):
        return lambda net: setattr(where(net), name, value)
    changes = [put(lambda net: net, name, value()) for value in (tuple_bomb, list_bomb)
               for name in ('c_dim', 'class_name', 'activation')]
    changes += [put(lambda net: net.mapping.fc0, 'bias_gain', list_bomb()),
                lambda net: net._modules.update(loop=net),
                lambda net: net.__dict__.update(_parameters=list_bomb()),
                lambda net: net.__dict__.update(_buffers='text')]
    for change in changes:
        path = nvidia_pickle(tmp_path, change)
        with pytest.raises(UserError, match='net.pkl'):
            convert(read_pickle(path), source=path)
    for name in ('conv_clamp', 'group_size', 'some_setting'):    # what nothing needs is not read
        path = nvidia_pickle(tmp_path, put(lambda net: net, name, list_bomb()))
        assert 'g_ema' in convert(read_pickle(path), source=path)


@pytest.mark.parametrize('data', [
    b'\x80\x02Nr\xff\xff\xff\x1f0N.', b'\x80\x04\x8e' + b'\xff' * 8, b'\x80\x02}' + b'(' * 1000,
    b'Np2000000000\n.', b'\x80\x04\x95' + b'\xff' * 8 + b'N.'])
def test_a_few_bytes_take_no_memory(data, tmp_path):
    path = tmp_path / 'net.pkl'
    path.write_bytes(data)
    with pytest.raises(UserError, match='net.pkl was refused'):
        read_pickle(path)


def test_damaged_pickles_are_refused_or_read(tmp_path):
    path = nvidia_pickle(tmp_path)
    data = path.read_bytes()
    for changed in flips(data, step=max(1, len(data) // 100)):
        path.write_bytes(changed)
        try:
            assert 'g_ema' in convert(read_pickle(path), source=path)
        except UserError as error:
            assert 'net.pkl' in str(error) and len(str(error)) < 2000


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
    compression = {'stored': zipfile.ZIP_STORED, 'deflated': zipfile.ZIP_DEFLATED,
                   'lzma': zipfile.ZIP_LZMA, 'bzip2': zipfile.ZIP_BZIP2}[kind]
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
    for where, value in ((8, 1), (10, 99)):    # flags and method, in the central directory
        for name in (b'a.png', b'dataset.json'):
            i = data.rindex(name) - 46 + where
            path.write_bytes(data[:i] + bytes([value]) + data[i + 1:])
            with pytest.raises(UserError, match='photographs.zip'):
                read_archive(path)


def test_what_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, '_MAX_FILE', 2 ** 20)
    path = tmp_path / 'photographs.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('a.png', bytes(2 ** 21))
        archive.writestr('dataset.json', b'{"labels": null}' + b' ' * 2 ** 21)
    assert path.stat().st_size < 20_000
    store = FileStore(path)
    for read in (lambda: store.image('a.png'), lambda: store.size('a.png'), store.labels,
                 lambda: ImageArchive(path)):
        with pytest.raises(UserError, match='2 MiB, more than the 1 MiB'):
            read()


@pytest.mark.parametrize('data', [
    b'', b'\x00\x01\x02' * 50, b'\xff\xfe\x00', b'id_code,centers', b'id_code,centers\n',
    b'id_code,centers\n"a,1\n', b'id_code,centers\na,inf\n', b'id_code,centers\na,nan\n',
    b'id_code,centers\na,1.5\n', b'id_code,centers\na,-1\n', b'id_code,centers\na,1e300\n',
    b'id_code,centers\na,0\n', b'id_code,centers\na,1,2\nb,1\n', b'id_code\na\n',
    b'\xe9d_code,centers\n', b'id_code,centers\na,' + b'9' * 400 + b'\n', b'PK\x03\x04'])
def test_damaged_group_tables(data, tmp_path):
    path = tmp_path / 'groups.csv'
    path.write_bytes(data)
    with pytest.raises(UserError, match='groups.csv'):
        read_groups(path)


def test_group_tables_with_byte_order_marks_are_read(tmp_path):
    path = tmp_path / 'groups.csv'
    path.write_bytes(b'\xef\xbb\xbfid_code,centers\r\na,2\r\nb,1\r\nc,2\r\nd,0\r\n')
    assert [(g.number, g.members) for g in read_groups(path)] == [(1, ['b']), (2, ['a', 'c'])]
