"""NVIDIA pickles and PyTorch ports -> this project's weight files, checked by numbers."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, ROOT
from nvidia_layout import (
    CHANNELS,
    W_DIM,
    judge,
    make_content,
    make_discriminator,
    make_generator,
    map_latents,
    namespace_checkpoint,
    synthesise,
    write_pickle,
)
from pickled_calls import Call

from models.stylegan2 import (
    Discriminator,
    Generator,
    discriminator_from_state,
    generator_from_state,
    truncate,
)
from models.stylegan2.checkpoint import load_discriminator, load_generator
from models.stylegan2.nvidia_pickle import (
    convert,
    discriminator_map,
    generator_map,
    read_pickle,
    tensors,
)
from scripts import convert_stylegan2_ada as script
from utils.errors import UserError
from utils.io import load_weights, save_torch


@pytest.fixture(scope='module')
def content():
    return make_content()


@pytest.fixture(scope='module')
def pickle_path(content, tmp_path_factory):
    return write_pickle(tmp_path_factory.mktemp('pickle') / 'snapshot.pkl', content)


@pytest.fixture(scope='module')
def weights(pickle_path):
    return convert(read_pickle(pickle_path))


def truth(net):
    return {k: v.detach() for k, v in net.state_dict().items()}


def latents(n=3, seed=0):
    return torch.randn(n, W_DIM, generator=torch.Generator().manual_seed(seed))


def test_key_maps_are_the_published_ones():
    want = json.loads((GOLDEN / 'nv_to_rosinality_map_512.json').read_text())
    assert sorted(map(list, generator_map(512, 8))) == sorted(want['g'])
    assert sorted(map(list, discriminator_map(512))) == sorted(want['d'])


def test_pickle_tensors_arrive_bit_for_bit(content, pickle_path):
    read = read_pickle(pickle_path)
    for name in ('G', 'D', 'G_ema'):
        found, want = tensors(read[name]), truth(content[name])
        assert found.keys() == want.keys()
        assert all(torch.equal(found[k], want[k]) for k in want)
    assert read['training_set_kwargs'] == {
        'class_name': 'ImageFolderDataset',
        'xflip': False,
        'seen': {1, 2},
        'order': {'a': 1.5},
    }


@torch.no_grad()
@pytest.mark.parametrize('name', ['g_ema', 'g'])
def test_generator_matches_a_plain_forward_pass(content, weights, name):
    source = truth(content['G_ema' if name == 'g_ema' else 'G'])
    net = generator_from_state(weights[name])
    assert (net.size, net.n_mlp, net.style_dim, net.channels) == (32, 3, W_DIM, CHANNELS)
    z = latents()
    w = map_latents(source, z)
    assert (net.mapping(z) - w).abs().max() < 1e-4
    # Another latent per layer shows which layer each latent drives.
    ws = map_latents(source, latents(3 * net.n_latent, seed=1)).view(3, net.n_latent, W_DIM)
    want = synthesise(source, ws)
    assert want.abs().max() > 1
    assert (net.synthesis(ws) - want).abs().max() < 1e-4


@torch.no_grad()
def test_truncation_goes_to_the_stored_mean(content, weights):
    source = truth(content['G_ema'])
    assert torch.equal(weights['latent_avg'], source['mapping.w_avg'])
    net = generator_from_state(weights['g_ema'])
    z = latents()
    w = truncate(map_latents(source, z), source['mapping.w_avg'], 0.5)
    got = net(z, truncation=0.5, truncation_latent=weights['latent_avg'])
    assert (got - synthesise(source, net.broadcast(w))).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize('n', [8, 4, 2])
def test_discriminator_matches_a_plain_forward_pass(content, weights, n):
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    want = judge(truth(content['D']), x)
    assert want.std() > 0.01
    assert (discriminator_from_state(weights['d'])(x) - want).abs().max() < 1e-4


def _mistakes_g():
    yield 'up-sampling weights flipped', 'convs.0.conv.weight', lambda t: t.flip([3, 4])
    yield 'plain weights flipped', 'convs.1.conv.weight', lambda t: t.flip([3, 4])
    yield 'kernel transposed in space', 'convs.3.conv.weight', lambda t: t.transpose(3, 4)
    yield 'in and out swapped', 'convs.1.conv.weight', lambda t: t.transpose(1, 2)
    yield 'affine transposed', 'conv1.conv.modulation.weight', lambda t: t.T
    yield 'affine bias without its one', 'convs.2.conv.modulation.bias', lambda t: t - 1
    yield 'blur kernel unscaled', 'convs.2.conv.blur.kernel', lambda t: t / 4
    yield 'rgb kernel unscaled', 'to_rgbs.1.upsample.kernel', lambda t: t / 4
    yield 'constant transposed', 'input.input', lambda t: t.transpose(2, 3)
    yield 'noise transposed', 'noises.noise_4', lambda t: t.transpose(2, 3)
    yield 'noise strength negated', 'convs.3.noise.weight', lambda t: -t
    yield 'rgb bias lost', 'to_rgbs.0.bias', lambda t: t * 0
    yield 'activation bias lost', 'convs.4.activate.bias', lambda t: t * 0


@torch.no_grad()
@pytest.mark.parametrize(
    'mistake,key,change', list(_mistakes_g()), ids=[m[0] for m in _mistakes_g()]
)
def test_generator_mistakes_would_be_seen(content, weights, mistake, key, change):
    source = truth(content['G_ema'])
    wrong = dict(weights['g_ema'])
    wrong[key] = change(wrong[key]).contiguous()
    assert wrong[key].shape == weights['g_ema'][key].shape, mistake
    net = generator_from_state(wrong)
    ws = net.broadcast(map_latents(source, latents()))
    assert (net.synthesis(ws) - synthesise(source, ws)).abs().max() > 1e-2, mistake


@torch.no_grad()
@pytest.mark.parametrize(
    'key,change',
    [
        ('convs.1.conv1.0.weight', lambda t: t.flip([2, 3])),
        ('convs.1.conv2.1.weight', lambda t: t.flip([2, 3])),
        ('convs.2.conv1.0.weight', lambda t: t.transpose(0, 1)),
        ('convs.2.conv2.0.kernel', lambda t: t * 4),
        ('convs.3.skip.0.kernel', lambda t: t * 4),
        ('final_linear.0.weight', lambda t: t.view(-1, 12, 4, 4).transpose(2, 3).flatten(1)),
        ('final_conv.0.weight', lambda t: t.roll(1, 1)),
        ('final_conv.1.bias', lambda t: t * 0),
    ],
)
def test_discriminator_mistakes_would_be_seen(content, weights, key, change):
    wrong = {**weights['d'], key: change(weights['d'][key]).contiguous()}
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    got = discriminator_from_state(wrong)(x)
    assert (got - judge(truth(content['D']), x)).abs().max() > 1e-2


def test_older_numpy_names_and_protocols(content, tmp_path):
    path = write_pickle(tmp_path / 'old.pkl', content, protocol=3)
    data = path.read_bytes()
    assert b'numpy._core.multiarray\n' in data or b'numpy.core.multiarray\n' in data
    for name in (b'numpy.core.multiarray\n', b'numpy._core.multiarray\n'):
        path.write_bytes(data.replace(b'numpy._core.multiarray\n', name))
        layer = read_pickle(path)['G_ema'].state['_modules']['synthesis'].state['_modules']['b4']
        gain = layer.state['_modules']['conv1'].state['act_gain']
        assert type(gain) is float and gain == pytest.approx(2**0.5)


@torch.no_grad()
@pytest.mark.parametrize('n_mlp', [2, 8])
def test_mapping_depth_and_standard_channels(n_mlp, tmp_path):
    net = make_generator(n_mlp=n_mlp, channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 4})
    path = write_pickle(tmp_path / 'g.pkl', {'G_ema': net})
    weights = convert(read_pickle(path))
    assert sorted(weights) == ['g_ema', 'latent_avg']
    ours = generator_from_state(weights['g_ema'])
    assert (ours.size, ours.n_mlp) == (64, n_mlp)
    z = latents()
    w = map_latents(truth(net), z)
    assert (ours.mapping(z) - w).abs().max() < 1e-4
    ws = ours.broadcast(w)
    assert (ours.synthesis(ws) - synthesise(truth(net), ws)).abs().max() < 1e-4


@torch.no_grad()
def test_pickles_converted_from_tensorflow(tmp_path):
    """They hold the same modules beside empty settings, in the pickle protocol of Python 3.7."""
    content = {**make_content(), 'training_set_kwargs': None, 'augment_pipe': None}
    path = write_pickle(tmp_path / 'converted.pkl', content, protocol=3)
    weights = convert(read_pickle(path))
    assert sorted(weights) == ['d', 'g', 'g_ema', 'latent_avg']
    net, source = generator_from_state(weights['g_ema']), truth(content['G_ema'])
    ws = net.broadcast(map_latents(source, latents()))
    assert (net.synthesis(ws) - synthesise(source, ws)).abs().max() < 1e-4


def test_settings_that_get_lost_are_named(tmp_path, caplog):
    content = make_content()
    content['G_ema'].synthesis.b32.conv1.conv_clamp = 256
    content['D'].b4.mbstd.group_size = 8
    path = write_pickle(tmp_path / 'clamped.pkl', content)
    with caplog.at_level('INFO'):
        convert(read_pickle(path))
    assert 'clamped to +-256' in caplog.text and 'minibatch groups of 8' in caplog.text


def test_frozen_layers_are_buffers(tmp_path):
    net = make_discriminator()
    weight = net.b32.conv0.weight.detach().clone()
    del net.b32.conv0.weight
    net.b32.conv0.register_buffer('weight', weight)
    path = write_pickle(tmp_path / 'f.pkl', {'G_ema': make_generator(), 'D': net})
    assert torch.equal(convert(read_pickle(path))['d']['convs.1.conv1.0.weight'], weight)


def test_damaged_and_foreign_files(tmp_path, pickle_path):
    path = tmp_path / 'cut.pkl'
    for data in (pickle_path.read_bytes()[:5000], b'', b'not a pickle', pickle.dumps([1, 2])):
        path.write_bytes(data)
        with pytest.raises(UserError, match='cut.pkl'):
            read_pickle(path)
    with pytest.raises(UserError, match='not found'):
        read_pickle(tmp_path / 'none.pkl')
    path.write_bytes(b'\x80\x02cdnnlib.tflib.network\nNetwork\n.')
    with pytest.raises(UserError, match='TensorFlow'):
        read_pickle(path)


def test_a_cycle_of_modules_is_refused(tmp_path):
    def text(value):
        return b'X' + len(value).to_bytes(4, 'little') + value.encode()

    # {'G_ema': module} whose own dict of children (memo 1) receives the module (memo 2) afterwards.
    path = tmp_path / 'cycle.pkl'
    path.write_bytes(
        b''.join(
            [
                b'\x80\x02}',
                text('G_ema'),
                b'ctorch_utils.persistence\n_reconstruct_persistent_obj\n',
                b'}(',
                text('type'),
                text('class'),
                text('class_name'),
                text('Generator'),
                text('state'),
                b'}(',
                text('_modules'),
                b'}q\x01uu\x85Rq\x02s',
                b'h\x01',
                text('loop'),
                b'h\x02s0.',
            ]
        )
    )
    with pytest.raises(UserError, match='holds itself'):
        read_pickle(path)


# --- the script -----------------------------------------------------------------------------


def test_script_converts_a_pickle(pickle_path, content, tmp_path, capsys):
    dest = tmp_path / 'out' / 'g.pt'
    options = ['--source', str(pickle_path), '--dest', str(dest), '--device', 'cpu']
    assert script.main(options) == 0
    assert '32 px, 3 mapping layers' in capsys.readouterr().out
    saved = load_weights(dest)
    assert sorted(saved) == ['d', 'g', 'g_ema', 'latent_avg']
    net, latent_avg = load_generator(dest)
    assert torch.equal(latent_avg, truth(content['G_ema'])['mapping.w_avg'])
    assert load_discriminator(dest)(net(latents(4))).shape == (4, 1)
    with pytest.raises(UserError, match='already exists'):
        script.main(options)
    assert script.main([*options, '--overwrite', '--no_discriminator']) == 0
    assert sorted(load_weights(dest)) == ['g_ema', 'latent_avg']


def test_script_reads_a_trainer_checkpoint(tmp_path):
    torch.manual_seed(0)
    g, d = (
        Generator(32, style_dim=8, n_mlp=2, channels=CHANNELS),
        Discriminator(32, channels=CHANNELS),
    )
    source = namespace_checkpoint(
        tmp_path / '000100.pt',
        {
            'g': g.state_dict(),
            'd': d.state_dict(),
            'g_ema': g.state_dict(),
            'g_optim': {},
            'ada_aug_p': 0.1,
        },
    )
    dest = tmp_path / 'g.pt'
    assert (
        script.main(
            [
                '--source',
                str(source),
                '--dest',
                str(dest),
                '--device',
                'cpu',
                '--latent_samples',
                '500',
            ]
        )
        == 0
    )
    net, latent_avg = load_generator(dest)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in g.state_dict().items())
    assert torch.allclose(latent_avg, g.mean_latent(500, seed=0))


def test_script_fills_missing_noise_the_same_way_each_time(tmp_path):
    g = Generator(32, style_dim=8, n_mlp=2, channels=CHANNELS)
    state = {k: v for k, v in g.state_dict().items() if not k.startswith('noises.')}
    save_torch(tmp_path / 'a.pt', {'g_ema': state, 'latent_avg': torch.zeros(8)})
    for name in ('b.pt', 'c.pt'):
        script.main(['--source', str(tmp_path / 'a.pt'), '--dest', str(tmp_path / name)])
    b, c = (load_weights(tmp_path / n)['g_ema'] for n in ('b.pt', 'c.pt'))
    assert b.keys() == g.state_dict().keys() and all(torch.equal(b[k], c[k]) for k in b)


def test_script_refuses_bad_files(tmp_path):
    torch.save({'g_ema': Call(os.system, f'touch {tmp_path / "marker"}')}, tmp_path / 'evil.pt')
    save_torch(tmp_path / 'other.pt', {'state_dict': {}})
    g = Generator(32, style_dim=8, n_mlp=2, channels=CHANNELS)
    broken = g.state_dict()
    broken['convs.0.conv.weight'] = broken['convs.0.conv.weight'] * float('nan')
    save_torch(tmp_path / 'nan.pt', {'g_ema': broken})
    for name, words in (
        ('evil.pt', 'objects other'),
        ('other.pt', 'no "g_ema"'),
        ('nan.pt', 'not finite'),
        ('none.pt', 'not found'),
    ):
        with pytest.raises(UserError, match=words):
            script.main(['--source', str(tmp_path / name), '--dest', str(tmp_path / 'x.pt')])
    assert not (tmp_path / 'marker').exists() and not (tmp_path / 'x.pt').exists()


def test_script_runs_from_any_folder(pickle_path, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / 'scripts' / 'convert_stylegan2_ada.py'),
            '--source',
            str(pickle_path),
            '--dest',
            'g.pt',
            '--device',
            'cpu',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / 'scripts' / 'convert_stylegan2_ada.py'),
            '--source',
            str(pickle_path),
            '--dest',
            'g.pt',
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith('error: --dest g.pt already exists')


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'empty or cut short'),
        (b'Pfile\n.', 'data outside itself'),
        (b'\x89PNG\r\n', 'refused'),
    ],
)
def test_other_files_are_refused_in_a_sentence(content, message, tmp_path):
    (tmp_path / 'net.pkl').write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_pickle(tmp_path / 'net.pkl')
