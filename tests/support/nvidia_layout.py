"""Network pickles in NVIDIA's layout with random weights, and a plain forward pass over them.

The forward pass is written from the description of the networks, with literal zero insertion,
padding and filtering, and shares no code with the project's networks.
"""

import argparse
import collections
import contextlib
import math
import pickle
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F

CHANNELS = {4: 12, 8: 10, 16: 8, 32: 6}  # no channel multiplier gives this table
W_DIM = 12


def _never_called(*_):
    raise AssertionError('the original loader function must not run')


class EasyDict(dict):
    """The attribute dict that such pickles use for plain settings."""


class Net(torch.nn.Module):
    """A layer that pickles as a call of `_reconstruct_persistent_obj` on a description."""

    source = 'raise AssertionError("embedded source was executed")'

    def __init__(self, class_name, **attributes):
        super().__init__()
        self.class_name = class_name
        for name, value in attributes.items():
            setattr(self, name, value)

    def __reduce__(self):
        state = {k: v for k, v in self.__dict__.items() if k != 'class_name'}
        meta = EasyDict(
            type='class', version=6, module_src=self.source, class_name=self.class_name, state=state
        )
        return sys.modules['torch_utils.persistence']._reconstruct_persistent_obj, (meta,), None


@contextlib.contextmanager
def original_modules():
    """The module names the pickle refers to exist while it is written, not while it is read."""
    names = {
        'torch_utils': types.ModuleType('torch_utils'),
        'torch_utils.persistence': types.ModuleType('torch_utils.persistence'),
        'dnnlib': types.ModuleType('dnnlib'),
        'dnnlib.util': types.ModuleType('dnnlib.util'),
    }
    function = types.FunctionType(_never_called.__code__, globals(), '_reconstruct_persistent_obj')
    function.__module__ = 'torch_utils.persistence'
    function.__qualname__ = '_reconstruct_persistent_obj'
    names['torch_utils.persistence']._reconstruct_persistent_obj = function
    names['dnnlib.util'].EasyDict = EasyDict
    before = EasyDict.__module__
    EasyDict.__module__ = 'dnnlib.util'
    sys.modules.update(names)
    try:
        yield
    finally:
        EasyDict.__module__ = before
        for name in names:
            del sys.modules[name]


def write_pickle(path, content, protocol=4):
    """Writes `content` (dict of Net and plain values) the way the original software does."""
    with original_modules():
        path.write_bytes(pickle.dumps(EasyDict(content), protocol=protocol))
    return path


def _linear(g, in_dim, out_dim, lr=1.0, bias=0.0, activation='linear'):
    layer = Net(
        'FullyConnectedLayer', activation=activation, bias_gain=lr, weight_gain=lr / np.sqrt(in_dim)
    )  # a numpy number, as in the originals
    layer.weight = torch.nn.Parameter(torch.randn(out_dim, in_dim, generator=g) / lr)
    layer.bias = torch.nn.Parameter(bias + torch.randn(out_dim, generator=g) * 0.3 / lr)
    return layer


def _filter(layer):
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    layer.register_buffer('resample_filter', taps[:, None] * taps)
    return layer


def _conv(g, in_ch, out_ch, k, bias=True, **attributes):
    layer = _filter(Net('Conv2dLayer', activation='lrelu', act_gain=np.sqrt(2), **attributes))
    layer.weight = torch.nn.Parameter(torch.randn(out_ch, in_ch, k, k, generator=g))
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(out_ch, generator=g) * 0.3)
    else:
        layer.bias = None
    return layer


def _synthesis_layer(g, in_ch, out_ch, r):
    layer = _conv(g, in_ch, out_ch, 3, use_noise=True)
    layer.affine = _linear(g, W_DIM, in_ch, bias=1.0)
    layer.noise_strength = torch.nn.Parameter(torch.randn([], generator=g))
    layer.register_buffer('noise_const', torch.randn(r, r, generator=g))
    return layer


def make_generator(seed=0, *, n_mlp=3, channels=None, c_dim=0, colours=3, z_dim=W_DIM):
    """A generator in NVIDIA's naming; every parameter is random, biases and noise included."""
    g, channels = torch.Generator().manual_seed(seed), channels or CHANNELS
    net = Net('Generator', z_dim=z_dim, c_dim=c_dim, w_dim=W_DIM, img_channels=colours)
    net.mapping = Net('MappingNetwork', c_dim=c_dim, w_avg_beta=0.995, num_layers=n_mlp)
    for n in range(n_mlp):
        layer = _linear(g, z_dim if n == 0 else W_DIM, W_DIM, 0.01, activation='lrelu')
        setattr(net.mapping, f'fc{n}', layer)
    net.mapping.register_buffer('w_avg', torch.randn(W_DIM, generator=g))
    net.synthesis = Net(
        'SynthesisNetwork', img_resolution=max(channels), block_resolutions=list(channels)
    )
    before = 0
    for r, ch in channels.items():
        block = _filter(
            Net(
                'SynthesisBlock',
                architecture='skip',
                in_channels=before,
                is_last=r == max(channels),
            )
        )
        if r == 4:
            block.const = torch.nn.Parameter(torch.randn(ch, 4, 4, generator=g))
        else:
            block.conv0 = _synthesis_layer(g, before, ch, r)
        block.conv1 = _synthesis_layer(g, ch, ch, r)
        block.torgb = Net('ToRGBLayer')
        block.torgb.weight = torch.nn.Parameter(torch.randn(colours, ch, 1, 1, generator=g))
        block.torgb.bias = torch.nn.Parameter(torch.randn(colours, generator=g) * 0.3)
        block.torgb.affine = _linear(g, W_DIM, ch, bias=1.0)
        setattr(net.synthesis, f'b{r}', block)
        before = ch
    return net


def make_discriminator(seed=1, *, channels=None, conditional=False):
    """A discriminator in NVIDIA's naming with random weights."""
    g, channels = torch.Generator().manual_seed(seed), channels or CHANNELS
    net = Net('Discriminator', c_dim=3 if conditional else 0, img_resolution=max(channels))
    for r in sorted(channels, reverse=True)[:-1]:
        block = _filter(Net('DiscriminatorBlock', architecture='resnet', num_layers=4))
        if r == max(channels):
            block.fromrgb = _conv(g, 3, channels[r], 1)
        block.conv0 = _conv(g, channels[r], channels[r], 3)
        block.conv1 = _conv(g, channels[r], channels[r // 2], 3)
        block.skip = _conv(g, channels[r], channels[r // 2], 1, bias=False)
        setattr(net, f'b{r}', block)
    c = channels[4]
    net.b4 = Net('DiscriminatorEpilogue', architecture='resnet')
    net.b4.mbstd = Net('MinibatchStdLayer', group_size=4, num_channels=1)
    net.b4.conv = _conv(g, c + 1, c, 3)
    net.b4.fc = _linear(g, c * 16, c, activation='lrelu')
    net.b4.out = _linear(g, c, 1)
    return net


def make_content(**options):
    """A whole snapshot: G, D, G_ema and the plain values beside them."""
    return {
        'G': make_generator(5, **options),
        'D': make_discriminator(),
        'G_ema': make_generator(**options),
        'augment_pipe': None,
        'training_set_kwargs': EasyDict(
            class_name='ImageFolderDataset',
            xflip=False,
            seen={1, 2},
            order=collections.OrderedDict(a=1.5),
        ),
    }


def namespace_checkpoint(path, weights):
    """A trainer checkpoint that holds its command line."""
    torch.save({**weights, 'args': argparse.Namespace(size=32, batch=4)}, path)
    return path


# --- the plain forward pass -----------------------------------------------------------------


def _lrelu(x):
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def _fir(x, taps, up=1, down=1, pad=(0, 0), gain=1.0):
    """Zero insertion after every sample, padding, correlation with the symmetric taps."""
    n, c, h, w = x.shape
    if up > 1:
        y = x.new_zeros(n, c, h * up, w * up)
        y[:, :, ::up, ::up] = x
        x = y
    x = F.pad(x, (*pad, *pad))
    weight = (taps * gain).expand(c, 1, *taps.shape)
    return F.conv2d(x, weight, groups=c)[:, :, ::down, ::down]


def _style_layer(s, name, x, w, up):
    weight = s[f'{name}.weight']
    affine = s[f'{name}.affine.weight'] / math.sqrt(w.shape[1])
    style = w @ affine.T + s[f'{name}.affine.bias']
    images = []
    for i in range(len(x)):  # one image at a time, with its own weights
        own = weight * style[i][None, :, None, None]
        own = own / (own.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up:
            y = _fir(x[i : i + 1], s[f'{name}.resample_filter'], up=2, pad=(3, 2), gain=4)
            y = F.conv2d(y, own.flip([2, 3]))  # the up-sampling layers truly convolve
        else:
            y = F.conv2d(x[i : i + 1], own, padding=1)
        images.append(y)
    y = torch.cat(images) + s[f'{name}.noise_const'] * s[f'{name}.noise_strength']
    return _lrelu(y + s[f'{name}.bias'][:, None, None])


def _to_rgb(s, name, x, w):
    weight = s[f'{name}.weight']
    affine = s[f'{name}.affine.weight'] / math.sqrt(w.shape[1])
    style = (w @ affine.T + s[f'{name}.affine.bias']) / math.sqrt(weight.shape[1])
    y = torch.einsum('nchw,nc,oc->nohw', x, style, weight[:, :, 0, 0])
    return y + s[f'{name}.bias'][:, None, None]


def map_latents(s, z):
    """Mapping network over tensors by NVIDIA's names: z [N, D] -> w [N, D]."""
    x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    n = 0
    while f'mapping.fc{n}.weight' in s:
        weight = s[f'mapping.fc{n}.weight']
        x = _lrelu(
            x @ weight.T * (0.01 / math.sqrt(weight.shape[1])) + s[f'mapping.fc{n}.bias'] * 0.01
        )
        n += 1
    return x


def synthesise(s, ws):
    """Synthesis network: ws [N, L, D] -> images; block r starts at layer 2*log2(r) - 5."""
    x = s['synthesis.b4.const'].expand(len(ws), -1, -1, -1)
    x = _style_layer(s, 'synthesis.b4.conv1', x, ws[:, 0], up=False)
    rgb = _to_rgb(s, 'synthesis.b4.torgb', x, ws[:, 1])
    r, first = 8, 1
    while f'synthesis.b{r}.conv0.weight' in s:
        block = f'synthesis.b{r}'
        x = _style_layer(s, f'{block}.conv0', x, ws[:, first], up=True)
        x = _style_layer(s, f'{block}.conv1', x, ws[:, first + 1], up=False)
        rgb = _fir(rgb, s[f'{block}.resample_filter'], up=2, pad=(2, 1), gain=4) + _to_rgb(
            s, f'{block}.torgb', x, ws[:, first + 2]
        )
        r, first = 2 * r, first + 2
    return rgb


def judge(s, x):
    """Discriminator: images [N, 3, R, R] -> logits [N, 1]; minibatch groups of 4."""

    def conv(name, x, padding=0, stride=1, active=True):
        weight = s[f'{name}.weight']
        y = F.conv2d(x, weight / math.sqrt(weight[0].numel()), padding=padding, stride=stride)
        return _lrelu(y + s[f'{name}.bias'][:, None, None]) if active else y

    r = x.shape[-1]
    x = conv(f'b{r}.fromrgb', x)
    while r > 4:
        block = f'b{r}'
        skip = _fir(x, s[f'{block}.skip.resample_filter'], down=2, pad=(1, 1))
        skip = conv(f'{block}.skip', skip, active=False)
        x = conv(f'{block}.conv0', x, padding=1)
        x = _fir(x, s[f'{block}.conv1.resample_filter'], pad=(2, 2))
        x = (conv(f'{block}.conv1', x, stride=2) + skip) / math.sqrt(2)
        r //= 2
    group = min(4, len(x))
    deviation = torch.zeros(len(x), 1, 4, 4)
    for j in range(len(x) // group):
        members = list(range(j, len(x), len(x) // group))
        spread = (x[members].var(0, correction=0) + 1e-8).sqrt().mean()
        deviation[members] = spread
    x = conv('b4.conv', torch.cat([x, deviation], 1), padding=1).flatten(1)
    x = _lrelu(x @ s['b4.fc.weight'].T / math.sqrt(x.shape[1]) + s['b4.fc.bias'])
    return x @ s['b4.out.weight'].T / math.sqrt(x.shape[1]) + s['b4.out.bias']
