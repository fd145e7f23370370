"""Reading NVIDIA's StyleGAN2-ADA network pickles as data, and their map to this project's keys.

Such a pickle stores each network as a dict that carries Python source text, which the original
loader executes. Here the text is skipped: the reader below builds tensors, numbers, strings and
plain containers, and refuses every other name that a pickle asks for. A network becomes a
`PickledModule`, whose tensors are collected by walking its state.

Key map: the weights need no transposes, flips or scales, only added unit dimensions; the stored
FIR kernels of the two upsampling places are 4 times NVIDIA's, which apply that gain at run time.
"""
import collections
import dataclasses
import io
import logging
import math
import pickle
from pathlib import Path

import numpy as np
import torch

from models.stylegan2.checkpoint import discriminator_from_state, generator_from_state
from utils.errors import UserError

log = logging.getLogger(__name__)

_ADVICE = 'Only unconditional RGB StyleGAN2 networks (generator "skip", discriminator "resnet", ' \
          'z and w of one width) can be converted.'
_MAPPING_LR = 0.01


@dataclasses.dataclass
class PickledModule:
    """A network or layer of the pickle: the name of its class and its attributes."""

    class_name: str
    state: dict


class _Dtype:
    """Stands for a numpy dtype while reading; only what a number needs."""

    def __init__(self, code, *_):
        self.code, self.order = str(code), '='

    def __setstate__(self, state):
        self.order = {'<': '<', '>': '>', '|': '|'}.get(state[1], '=')


def _scalar(dtype, data):
    """A numpy scalar as a plain Python number."""
    kind = dtype.code[:1]
    if not isinstance(dtype, _Dtype) or kind not in 'biuf' or not isinstance(data, bytes):
        raise pickle.UnpicklingError('it holds a numpy value that is not a number')
    return np.frombuffer(data, np.dtype(dtype.order + dtype.code))[0].item()


def _storage(data):
    return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)


def _tensor(storage, offset, size, stride, *_):
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    if math.prod(size) > flat.numel():
        raise pickle.UnpicklingError('it holds a tensor that reaches beyond its data')
    return flat.as_strided(size, stride, offset).clone()    # raises when out of bounds


def _parameter(data, *_):
    return data


def _module(meta):
    if meta.get('type') != 'class':
        raise pickle.UnpicklingError(f'it holds a stored {meta.get("type")!r}, not a class')
    return PickledModule(str(meta['class_name']), dict(meta['state']))


_ALLOWED = {
    ('torch_utils.persistence', '_reconstruct_persistent_obj'): _module,
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('builtins', 'set'): set,
    ('__builtin__', 'set'): set,
    ('torch._utils', '_rebuild_parameter'): _parameter,
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch.storage', '_load_from_bytes'): _storage,
    ('numpy', 'dtype'): _Dtype,
    ('numpy.core.multiarray', 'scalar'): _scalar,
    ('numpy._core.multiarray', 'scalar'): _scalar,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module, name):
        if name == 'EasyDict' and module.split('.')[0] == 'dnnlib':
            return dict
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module.startswith('dnnlib.tflib'):
            raise pickle.UnpicklingError(
                'it is a TensorFlow network; convert it to a PyTorch pickle first, with the '
                'legacy converter of the software it came from')
        raise pickle.UnpicklingError(f'it asks for {module}.{name}, which a network does not need')

    def persistent_load(self, pid):
        raise pickle.UnpicklingError('it is no network pickle; it refers to data outside itself')


def read_pickle(path):
    """Reads an NVIDIA network pickle -> dict of PickledModule and plain values.

    No code from the file is run. UserError when the file is missing or damaged, or names
    anything but tensors, numbers and plain containers (a hostile file does).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'network pickle not found: {path}')
    try:
        with open(path, 'rb') as file:
            content = _Reader(file).load()
            networks = content.values() if isinstance(content, dict) else ()
            for module in networks:
                if isinstance(module, PickledModule):
                    collections.deque(_walk(module), maxlen=0)    # a cycle ends here, not later
    except EOFError as error:
        raise UserError(f'{path} was refused: it is empty or cut short') from error
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError,
            AttributeError, RuntimeError, OverflowError, MemoryError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f'{path} was refused: {reason}') from error
    if not isinstance(content, dict) or not isinstance(content.get('G_ema'), PickledModule):
        raise UserError(f'{path} is not a StyleGAN2-ADA network pickle: it has no "G_ema" network')
    return content


def tensors(module, prefix=''):
    """All parameters and buffers of a PickledModule as {dotted name: float32 tensor}.

    Buffers count too: layers frozen in training are stored as such.
    """
    found = {}
    for part in ('_parameters', '_buffers'):
        for name, value in (module.state.get(part) or {}).items():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value.detach().float()
    for name, child in (module.state.get('_modules') or {}).items():
        if isinstance(child, PickledModule):
            found.update(tensors(child, f'{prefix}{name}.'))
    return found


def _walk(module):
    yield module
    for child in (module.state.get('_modules') or {}).values():
        if isinstance(child, PickledModule):
            yield from _walk(child)


def _resolutions(size):
    return [2 ** i for i in range(2, int(math.log2(size)) + 1)]


def generator_map(size, n_mlp):
    """[(this project's key, NVIDIA's key, operation)] of a generator.

    Operations: '=' as it is, 'u0' one leading unit dimension, 'u00' two, 'v3' to [1, 3, 1, 1],
    'x4' times 4.
    """
    table = []
    for n in range(n_mlp):
        table += [(f'style.{n + 1}.{p}', f'mapping.fc{n}.{p}', '=') for p in ('weight', 'bias')]
    table.append(('input.input', 'synthesis.b4.const', 'u0'))
    for i, r in enumerate(_resolutions(size)):
        block = f'synthesis.b{r}'
        layers = (0, 1) if i else (1,)
        for k in layers:
            ours, theirs = f'convs.{2 * i - 2 + k}' if i else 'conv1', f'{block}.conv{k}'
            table += [(f'{ours}.conv.weight', f'{theirs}.weight', 'u0'),
                      (f'{ours}.conv.modulation.weight', f'{theirs}.affine.weight', '='),
                      (f'{ours}.conv.modulation.bias', f'{theirs}.affine.bias', '='),
                      (f'{ours}.noise.weight', f'{theirs}.noise_strength', 'u0'),
                      (f'{ours}.activate.bias', f'{theirs}.bias', '='),
                      (f'noises.noise_{2 * i - 1 + k if i else 0}', f'{theirs}.noise_const',
                       'u00')]
        ours = f'to_rgbs.{i - 1}' if i else 'to_rgb1'
        table += [(f'{ours}.conv.weight', f'{block}.torgb.weight', 'u0'),
                  (f'{ours}.conv.modulation.weight', f'{block}.torgb.affine.weight', '='),
                  (f'{ours}.conv.modulation.bias', f'{block}.torgb.affine.bias', '='),
                  (f'{ours}.bias', f'{block}.torgb.bias', 'v3')]
        if i:
            table += [(f'convs.{2 * i - 2}.conv.blur.kernel', f'{block}.conv0.resample_filter',
                       'x4'),
                      (f'{ours}.upsample.kernel', f'{block}.resample_filter', 'x4')]
    return table


def discriminator_map(size):
    """[(this project's key, NVIDIA's key, operation)] of a discriminator."""
    table = [('convs.0.0.weight', f'b{size}.fromrgb.weight', '='),
             ('convs.0.1.bias', f'b{size}.fromrgb.bias', '=')]
    for k, r in enumerate(reversed(_resolutions(size)[1:]), start=1):
        ours, theirs = f'convs.{k}', f'b{r}'
        table += [(f'{ours}.conv1.0.weight', f'{theirs}.conv0.weight', '='),
                  (f'{ours}.conv1.1.bias', f'{theirs}.conv0.bias', '='),
                  (f'{ours}.conv2.1.weight', f'{theirs}.conv1.weight', '='),
                  (f'{ours}.conv2.2.bias', f'{theirs}.conv1.bias', '='),
                  (f'{ours}.skip.1.weight', f'{theirs}.skip.weight', '='),
                  (f'{ours}.conv2.0.kernel', f'{theirs}.conv1.resample_filter', '='),
                  (f'{ours}.skip.0.kernel', f'{theirs}.skip.resample_filter', '=')]
    return table + [('final_conv.0.weight', 'b4.conv.weight', '='),
                    ('final_conv.1.bias', 'b4.conv.bias', '='),
                    ('final_linear.0.weight', 'b4.fc.weight', '='),
                    ('final_linear.0.bias', 'b4.fc.bias', '='),
                    ('final_linear.1.weight', 'b4.out.weight', '='),
                    ('final_linear.1.bias', 'b4.out.bias', '=')]


_OPERATIONS = {'=': lambda t: t, 'u0': lambda t: t[None], 'u00': lambda t: t[None, None],
               'v3': lambda t: t.view(1, 3, 1, 1), 'x4': lambda t: t * 4}


def _rename(table, found, what):
    missing = [theirs for _, theirs, _ in table if theirs not in found]
    if missing:
        raise UserError(f'the {what} has no {missing[0]}: its architecture differs. {_ADVICE}')
    return {ours: _OPERATIONS[op](found[theirs]) for ours, theirs, op in table}


def _size(found, prefix, what):
    blocks = {int(k[len(prefix) + 1:].split('.')[0]) for k in found
              if k.startswith(f'{prefix}b') and k[len(prefix) + 1:].split('.')[0].isdigit()}
    if not blocks or sorted(blocks) != _resolutions(max(blocks)):
        raise UserError(f'the {what} has no StyleGAN2 blocks (is it a StyleGAN3 network?). '
                        f'{_ADVICE}')
    return max(blocks)


def _check_layers(module, what):
    """UserError for settings that the shapes do not show."""
    for layer in _walk(module):
        if layer.state.get('c_dim'):
            raise UserError(f'the {what} is class-conditional (c_dim {layer.state["c_dim"]}). '
                            f'{_ADVICE}')
        activation = layer.state.get('activation', 'lrelu')
        if activation not in ('lrelu', 'linear'):
            raise UserError(f'the {what} uses the activation {activation!r}; only lrelu can be '
                            'converted')
    for name, child in tensors(module).items():
        if name.endswith('resample_filter') and tuple(child.shape) != (4, 4):
            raise UserError(f'the {what} resamples with a filter of shape {tuple(child.shape)}; '
                            'only 4 x 4 filters can be converted')


def convert_generator(module, what='generator'):
    """PickledModule -> (state dict in this project's keys, w_avg [D] or None).

    Size, channels and mapping depth come from the shapes. UserError for what cannot be
    represented: class conditions, images that are not RGB, other architectures.
    """
    _check_layers(module, what)
    found = tensors(module)
    size = _size(found, 'synthesis.', what)
    if 'mapping.embed.weight' in found:
        raise UserError(f'the {what} is class-conditional. {_ADVICE}')
    extra = [k for k in found if k.endswith('.skip.weight')]
    if extra:
        raise UserError(f'the {what} is of the "resnet" kind ({extra[0]}). {_ADVICE}')
    n_mlp = sum(k.startswith('mapping.fc') and k.endswith('.weight') for k in found)
    state = _rename_rgb(generator_map(size, n_mlp), found, 'synthesis.b4.torgb.bias', what)
    w_dim = state['conv1.conv.modulation.weight'].shape[1]
    for n in range(n_mlp):
        shape = tuple(state[f'style.{n + 1}.weight'].shape)
        if shape != (w_dim, w_dim):
            raise UserError(f'the mapping network of the {what} has a layer {shape[1]} -> '
                            f'{shape[0]} beside w_dim {w_dim}. {_ADVICE}')
    _check_mapping_rate(module, what)
    return generator_from_state(state, source=f'the {what}').state_dict(), \
        found.get('mapping.w_avg')


def _rename_rgb(table, found, colour_key, what):
    colours = found.get(colour_key)
    if colours is not None and colours.shape[0] != 3:
        raise UserError(f'the {what} makes images of {colours.shape[0]} channel(s). {_ADVICE}')
    return _rename(table, found, what)


def _check_mapping_rate(module, what):
    """The run-time scale of the mapping layers is not stored in a state dict, so it must be the
    one this project's generator applies."""
    mapping = module.state['_modules']['mapping']
    for layer in (mapping.state.get('_modules') or {}).values():
        rate = layer.state.get('bias_gain', _MAPPING_LR)
        if not math.isclose(rate, _MAPPING_LR, rel_tol=1e-6):
            raise UserError(f'the mapping network of the {what} was trained with the learning '
                            f'rate multiplier {rate}; only {_MAPPING_LR} can be converted')


def convert_discriminator(module, what='discriminator'):
    """PickledModule -> state dict in this project's keys; UserError as in convert_generator."""
    _check_layers(module, what)
    found = tensors(module)
    size = _size(found, '', what)
    if any(k.startswith('mapping.') or '.cmap' in k for k in found):
        raise UserError(f'the {what} is class-conditional. {_ADVICE}')
    lower = [k for k in found if '.fromrgb.' in k and not k.startswith(f'b{size}.')]
    if lower:
        raise UserError(f'the {what} is of the "skip" kind ({lower[0]}). {_ADVICE}')
    weight = found.get(f'b{size}.fromrgb.weight')
    if weight is not None and weight.shape[1] != 3:
        raise UserError(f'the {what} sees images of {weight.shape[1]} channel(s). {_ADVICE}')
    state = _rename(discriminator_map(size), found, what)
    if state['final_conv.0.weight'].shape[1] != state['final_conv.0.weight'].shape[0] + 1:
        raise UserError(f'the {what} has no or several minibatch-deviation channels; exactly one '
                        'can be converted')
    return discriminator_from_state(state, source=f'the {what}').state_dict()


def lost_settings(networks):
    """Settings of the pickle that the weights do not carry, as sentences for the user."""
    notes = set()
    for module in networks:
        for layer in _walk(module):
            clamp, group = layer.state.get('conv_clamp'), layer.state.get('group_size')
            if clamp is not None:
                notes.add(f'activations were clamped to +-{clamp}; the converted networks clamp '
                          'in half precision only')
            if group not in (None, 4):
                notes.add(f'the discriminator used minibatch groups of {group}; the default here '
                          'is 4')
    return sorted(notes)


def convert(content):
    """The whole pickle (read_pickle) -> {'g_ema', 'latent_avg'?, 'g'?, 'd'?} of plain tensors."""
    networks = {k: v for k, v in content.items() if isinstance(v, PickledModule)}
    state, w_avg = convert_generator(networks['G_ema'], 'generator G_ema')
    weights = {'g_ema': state}
    if w_avg is not None:
        weights['latent_avg'] = w_avg
    if 'G' in networks:
        weights['g'] = convert_generator(networks['G'], 'generator G')[0]
    if 'D' in networks:
        weights['d'] = convert_discriminator(networks['D'], 'discriminator D')
    for note in lost_settings(networks.values()):
        log.info('not carried over: %s', note)
    return weights
