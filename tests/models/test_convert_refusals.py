"""Files that cannot or must not be converted."""

import os
import pickle
import subprocess

import pytest
import torch
from nvidia_layout import make_discriminator, make_generator, write_pickle
from pickled_calls import Call

from models.stylegan2.nvidia_pickle import convert, read_pickle
from utils.errors import UserError


def _other_architecture(kind):
    net = make_generator()
    if kind == 'resnet':
        net.synthesis.b8.skip = torch.nn.Linear(1, 1)
        net.synthesis.b8.skip.__class__ = type(net)
        net.synthesis.b8.skip.class_name = 'Conv2dLayer'
    elif kind == 'orig':
        del net.synthesis.b8.torgb
    elif kind == 'no noise':
        del net.synthesis.b16.conv0.noise_strength
    elif kind == 'filter':
        net.synthesis.b16.resample_filter = torch.ones(12, 12)
    elif kind == 'activation':
        net.synthesis.b16.conv0.activation = 'relu'
    elif kind == 'rate':
        net.mapping.fc1.bias_gain = 0.1
    elif kind == 'no blocks':
        del net.synthesis
        net.synthesis = type(net)('SynthesisNetwork')
    return net


@pytest.mark.parametrize(
    'net,words',
    [
        (lambda: make_generator(c_dim=5), 'class-conditional'),
        (lambda: make_generator(colours=1), '1 channel'),
        (lambda: make_generator(z_dim=20), 'w_dim'),
        (lambda: _other_architecture('resnet'), 'resnet'),
        (lambda: _other_architecture('orig'), 'torgb'),
        (lambda: _other_architecture('no noise'), 'noise_strength'),
        (lambda: _other_architecture('filter'), 'filter'),
        (lambda: _other_architecture('activation'), 'relu'),
        (lambda: _other_architecture('rate'), 'learning rate multiplier 0.1'),
        (lambda: _other_architecture('no blocks'), 'no StyleGAN2 blocks'),
    ],
)
def test_what_cannot_be_represented_is_refused(net, words, tmp_path):
    path = write_pickle(tmp_path / 'odd.pkl', {'G_ema': net()})
    with pytest.raises(UserError, match=words):
        convert(read_pickle(path))


@pytest.mark.parametrize(
    'change,words',
    [
        (lambda d: setattr(d, 'c_dim', 4), 'class-conditional'),
        (lambda d: setattr(d.b16, 'fromrgb', d.b32.fromrgb), 'skip'),
        (lambda d: delattr(d.b16, 'skip'), 'b16.skip.weight'),
        (
            lambda d: setattr(d.b32.fromrgb, 'weight', torch.nn.Parameter(torch.ones(6, 1, 1, 1))),
            '1 channel',
        ),
        (
            lambda d: setattr(d.b4.conv, 'weight', torch.nn.Parameter(torch.ones(12, 12, 3, 3))),
            'minibatch',
        ),
    ],
)
def test_other_discriminators_are_refused(change, words, tmp_path):
    net = make_discriminator()
    change(net)
    path = write_pickle(tmp_path / 'odd.pkl', {'G_ema': make_generator(), 'D': net})
    with pytest.raises(UserError, match=words):
        convert(read_pickle(path))


def _hostile(marker):
    command = f'echo hacked > {marker}'
    yield 'system', Call(os.system, command)
    yield 'eval', Call(eval, f'open({str(marker)!r}, "w").close()')
    yield 'exec', Call(exec, f'open({str(marker)!r}, "w").close()')
    yield 'popen', Call(subprocess.Popen, ['touch', str(marker)])
    yield 'getattr', Call(getattr, 'x', 'upper')
    yield 'torch.load', Call(torch.load, str(marker))
    yield 'nested', {'G_ema': {'a': [1, {'b': (Call(os.system, command),)}]}}
    yield (
        'in a storage',
        Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, command), protocol=2)),
    )
    yield 'module object', Call(__import__, 'os')


@pytest.mark.parametrize('index', range(9))
def test_hostile_pickles_are_refused(index, tmp_path):
    marker = tmp_path / 'marker'
    name, evil = list(_hostile(marker))[index]
    path = tmp_path / 'evil.pkl'
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps({'G_ema': evil}, protocol=protocol))
        with pytest.raises(UserError, match='refused'):
            read_pickle(path)
        assert not marker.exists(), name


def test_hostile_attribute_inside_a_network(tmp_path):
    marker = tmp_path / 'marker'
    net = make_generator()
    net.mapping.extra = Call(os.system, f'echo hacked > {marker}')
    path = write_pickle(tmp_path / 'evil.pkl', {'G_ema': net})
    with pytest.raises(UserError, match=r'refused: it asks for (posix|nt)\.system'):
        read_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    'layout',
    [
        (0, (1000,), (1,)),
        (2, (3,), (1,)),
        (0, (2, 2), (1, 3)),
        (-1, (2,), (1,)),
        (0, (1000,), (0,)),
        (0, (2,), (-1,)),
    ],
)
def test_tensor_beyond_its_data_is_refused(layout, tmp_path):
    storage = torch.zeros(4)._typed_storage()

    class Wide:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, *layout, False, {})

    path = tmp_path / 'wide.pkl'
    path.write_bytes(pickle.dumps({'G_ema': Wide()}))
    with pytest.raises(UserError, match='refused'):
        read_pickle(path)
