"""Networks from hostile files: wrong content, absurd sizes, bombs; a clear error for each."""

import os
import pickle
import struct

import numpy as np
import pytest
import torch
from conftest import load_script
from hostile import flips, key_of_tuples, list_bomb, same, tuple_bomb
from nvidia_layout import make_generator, write_pickle

from classification.grader import build_grader
from classification.settings import Settings
from criteria.lpips_loss import LPIPSLoss
from evaluation.attacks.pairs import PairConfig, build_pair_net, load_pair_attack
from evaluation.features import InceptionNetwork
from models.encoders import build_encoder, encoder_from_state, load_resnet34
from models.features.content import (
    content_checkpoint,
    content_network_from_state,
    load_content_network,
)
from models.features.pretrained import load_feature_network
from models.features.style import load_style_network
from models.psp import PSP, load_psp, psp_checkpoint
from models.resnet import build_resnet
from models.stylegan2 import (
    Discriminator,
    Generator,
    discriminator_from_state,
    generator_from_state,
    load_generator,
)
from models.stylegan2.nvidia_pickle import convert, read_pickle
from training.stylegan2_resume import read_start
from utils.errors import UserError
from utils.io import save_torch

convert_script = load_script('convert_stylegan2_ada')
generate_script = load_script('generate')


# --- files of the right kind with wrong content ------------------------------------------------


def small_generator():
    torch.manual_seed(0)
    return Generator(32, style_dim=8, n_mlp=2, channels={4: 6, 8: 5, 16: 4, 32: 4})


def small_psp():
    torch.manual_seed(0)
    net = small_generator()
    encoder = build_encoder(
        'LightEncoder', n_styles=net.n_latent, style_dim=8, input_size=32, width=4
    )
    return psp_checkpoint(PSP(encoder, net, torch.zeros(8), 32), {'seed': 0})


def content_file():
    torch.manual_seed(0)
    return content_checkpoint(
        build_resnet('resnet18'), arch='resnet18', input_size=32, small_stem=False
    )


WRONG = [None, [], 'text', 7, torch.zeros(3), {}, {1: torch.zeros(3)}, {'a': 'text'}, list_bomb()]


def refused_state(load, file, content, state, prefix=''):
    """`load(file)` must name the file for each wrong replacement of `content[state]`."""
    for wrong in [
        *WRONG,
        {**content[state], f'{prefix}more': torch.zeros(2)},
        dict(list(content[state].items())[:-1]),
    ]:
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
    for wrong in (
        [1.0] * 8,
        'text',
        torch.zeros(7),
        torch.full((8,), float('nan')),
        torch.zeros(8, dtype=torch.long),
    ):
        save_torch(file, {**good, 'latent_avg': wrong})
        for load in (load_generator, convert_script.read_port):
            with pytest.raises(UserError, match='generator.pt: latent_avg'):
                load(file)


def test_generators_of_absurd_size_take_no_memory():
    state = small_generator().state_dict()
    wide = torch.zeros(1, 10**6, 1, 1, 1)
    # Layers of a million channels each: built, they would take terabytes.
    for changed in (
        {**state, 'convs.0.conv.weight': wide, 'convs.2.conv.weight': wide},
        {**state, 'conv1.conv.modulation.weight': torch.zeros(6, 10**6)},
        {**state, **{f'style.{i}.weight': torch.zeros(()) for i in range(10**5)}},
        {**state, **{f'convs.{2 * i}.conv.weight': wide for i in range(2000)}},
    ):
        with pytest.raises(UserError, match='no StyleGAN2 generator'):
            generator_from_state(changed)
    critic = Discriminator(32, channels={4: 6, 8: 5, 16: 4, 32: 4}).state_dict()
    for changed in (
        {
            **critic,
            'convs.0.0.weight': torch.zeros(10**6, 3, 1, 1),
            'convs.1.skip.1.weight': torch.zeros(10**6, 1, 1, 1),
        },
        {**critic, **{f'convs.{i}.skip.1.weight': wide for i in range(2000)}},
    ):
        with pytest.raises(UserError, match='no StyleGAN2 discriminator'):
            discriminator_from_state(changed)
    with pytest.raises(UserError, match='does not fit'):
        encoder_from_state({'stem.weight': torch.zeros(10**6, 6, 1, 1)}, n_styles=8, style_dim=8)


def test_what_a_training_begins_from(tmp_path):
    net, file = small_generator(), tmp_path / 'generator.pt'
    good = {'g_ema': net.state_dict(), 'latent_avg': None}
    save_torch(file, good)
    assert same(read_start(file).weights, good)
    save_torch(file, {**good, 'config': [1]})
    with pytest.raises(UserError, match='config'):
        read_start(file)
    for name in ('g_ema', 'g', 'd'):
        for wrong in (None, [], 'text', torch.zeros(3), {1: torch.zeros(3)}):
            save_torch(file, {**good, name: wrong})
            with pytest.raises(UserError, match=f'generator.pt: {name} holds no '):
                read_start(file)


def test_encoder_checkpoints(tmp_path):
    good, file = small_psp(), tmp_path / 'restyle.pt'
    assert good['opts']['device'] == 'cpu'  # the published classes do latent_avg.to(device)
    save_torch(file, good)
    assert same(load_psp(file).state_dict(), good['state_dict'])
    refused_state(load_psp, file, good, 'state_dict', 'decoder.')
    for part in ('encoder.', 'decoder.'):
        save_torch(
            file,
            {
                **good,
                'state_dict': {
                    k: v for k, v in good['state_dict'].items() if not k.startswith(part)
                },
            },
        )
        with pytest.raises(UserError, match='restyle.pt'):
            load_psp(file)
    changes = [('opts', w) for w in ([1], 'text', 7, torch.zeros(3), list_bomb())]
    changes += [
        ('opts', {'encoder_size': w})
        for w in ('32', -1, 0, 10**9, 32.0, [32], list_bomb(), torch.tensor(32))
    ]
    changes += [
        ('latent_avg', w)
        for w in (
            'text',
            [0.0],
            torch.zeros(9),
            torch.zeros(5, 8),
            torch.full((8,), float('inf')),
            list_bomb(),
        )
    ]
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
    for entry, wrong in (
        [('arch', w) for w in ('resnet99', None, 7, list_bomb())]
        + [('input_size', w) for w in (0, -3, 10**12, '32', None, 2.5, list_bomb())]
        + [('small_stem', w) for w in ('no', None, list_bomb())]
        + [('state_dict', w) for w in WRONG]
    ):
        with pytest.raises(UserError, match='content.pt'):
            content_network_from_state({**good, entry: wrong}, source=file)
    with pytest.raises(UserError, match='content.pt'):
        content_network_from_state({k: v for k, v in good.items() if k != 'arch'}, source=file)


@pytest.mark.parametrize(
    'load',
    [
        load_style_network,
        LPIPSLoss,
        load_resnet34,
        load_content_network,
        InceptionNetwork,
        lambda path: build_pair_net(PairConfig(k=2, image_size=32), imagenet_weights=path),
        lambda path: build_grader(Settings(arch='resnet18'), seed=0, imagenet_weights=path),
        lambda path: load_pair_attack(path, 'cpu'),
        load_generator,
        load_psp,
        convert_script.read_port,
    ],
    ids=lambda load: load.__qualname__,
)
def test_every_weight_flag_refuses_other_files(load, tmp_path):
    file = tmp_path / 'other.pt'
    one = torch.zeros(3)
    files = [
        None,
        one,
        {1: one},
        {'state_dict': [1]},
        {'state_dict': {'a': one}},
        list_bomb(),
        {'layer1.0.conv2.weight': one[0]},
        {'features.0.weight': one},
    ]
    for content in files:
        save_torch(file, content)
        with pytest.raises(UserError, match='other.pt'):
            load(file)
    for data in (b'', b'text', key_of_tuples()):
        file.write_bytes(data)
        with pytest.raises(UserError, match='other.pt'):
            load(file)


def test_feature_networks_of_timm(tmp_path):
    file, itself = tmp_path / 'other.pt', {}
    itself['state_dict'] = itself
    for content in (
        *WRONG,
        itself,
        {'model': {'model': {'a': 1}}},
        {'conv1.weight': torch.zeros(3)},
        {'_conv_stem.weight': torch.zeros(1)},
    ):
        save_torch(file, content)
        with pytest.raises(UserError, match='other.pt'):
            load_feature_network(file, arch='resnet18')


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
    cases = [
        b'',
        whole[:40],
        whole[:200],
        b'\x93NUMPY\x02\x00\xff\xff\xff\xff' + bytes(50),
        header + claim.ljust(117).encode() + b'\n' + bytes(100),
        b'PK\x03\x04',
        b'text',
    ]
    for array in (
        np.array(['a', 'b']),
        np.zeros(3, [('x', 'f4')]),
        np.zeros(3, complex),
        np.full((1, net.n_latent, 8), np.nan),
        np.zeros((2, 3)),
    ):
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

    changes = [
        put(lambda net: net, name, value())
        for value in (tuple_bomb, list_bomb)
        for name in ('c_dim', 'class_name', 'activation')
    ]
    changes += [
        put(lambda net: net.mapping.fc0, 'bias_gain', list_bomb()),
        lambda net: net._modules.update(loop=net),
        lambda net: net.__dict__.update(_parameters=list_bomb()),
        lambda net: net.__dict__.update(_buffers='text'),
    ]
    for change in changes:
        path = nvidia_pickle(tmp_path, change)
        with pytest.raises(UserError, match='net.pkl'):
            convert(read_pickle(path), source=path)
    for name in ('conv_clamp', 'group_size', 'some_setting'):  # what nothing needs is not read
        path = nvidia_pickle(tmp_path, put(lambda net: net, name, list_bomb()))
        assert 'g_ema' in convert(read_pickle(path), source=path)


@pytest.mark.parametrize(
    'data',
    [
        b'\x80\x02Nr\xff\xff\xff\x1f0N.',
        b'\x80\x04\x8e' + b'\xff' * 8,
        b'\x80\x02}' + b'(' * 1000,
        b'Np2000000000\n.',
        b'\x80\x04\x95' + b'\xff' * 8 + b'N.',
    ],
)
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
