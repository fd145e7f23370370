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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float32

from models.loading import mismatch
from models.stylegan2.checkpoint import (
    discriminator_from_state,
    generator_from_state,
    latent_average,
)
from utils.errors import UserError
from utils.torch_files import BrokenFile, check_pickle, check_tensors, read_torch_bytes

log = logging.getLogger(__name__)

_ADVICE = (
    'Only unconditional RGB StyleGAN2 networks (generator "skip", discriminator "resnet", '
    'z and w of one width) can be converted.'
)
_MAPPING_LR = 0.01
_MAX_BYTES = 2**33
_MAX_LAYERS = 10_000

State = dict[str, torch.Tensor]  # by name
Entry = tuple[str, str, str]  # this project's key, NVIDIA's key, operation


@dataclasses.dataclass
class PickledModule:
    """A network or layer of the pickle: the name of its class and its attributes."""

    class_name: str
    state: dict


class _Dtype:
    """Stands for a numpy dtype while reading; only what a number needs."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str):
            raise pickle.UnpicklingError('it holds a numpy type without a name')
        self.code, self.order = code, '='

    def __setstate__(self, state: Any) -> None:
        self.order = {'<': '<', '>': '>', '|': '|'}.get(state[1], '=')


def _scalar(dtype: object, data: object) -> float:
    """A numpy scalar as a plain Python number."""
    if not isinstance(dtype, _Dtype) or dtype.code[:1] not in 'biuf' or not isinstance(data, bytes):
        raise pickle.UnpicklingError('it holds a numpy value that is not a number')
    return np.frombuffer(data, np.dtype(dtype.order + dtype.code))[0].item()


def _tensor(
    storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> torch.Tensor:
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    if not all(isinstance(n, int) for n in size) or math.prod(size) > flat.numel():
        raise pickle.UnpicklingError('it holds a tensor that reaches beyond its data')
    return flat.as_strided(size, stride, offset)  # raises when out of bounds


def _parameter(data: object, *_: object) -> object:
    return data


def _module(meta: object) -> PickledModule:
    # Nothing is printed or turned into text before its type is known: that may never end.
    if not isinstance(meta, dict) or meta.get('type') != 'class':
        raise pickle.UnpicklingError('it holds a stored function or module, not a class')
    name, state = meta.get('class_name'), meta.get('state')
    if not isinstance(name, str) or not isinstance(state, dict):
        raise pickle.UnpicklingError('it holds a class without a name or attributes')
    return PickledModule(name, dict(state))


_ALLOWED = {
    ('torch_utils.persistence', '_reconstruct_persistent_obj'): _module,
    ('collections', 'OrderedDict'): collections.OrderedDict,
    ('builtins', 'set'): set,
    ('__builtin__', 'set'): set,
    ('torch._utils', '_rebuild_parameter'): _parameter,
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch.storage', '_load_from_bytes'): read_torch_bytes,
    ('numpy', 'dtype'): _Dtype,
    ('numpy.core.multiarray', 'scalar'): _scalar,
    ('numpy._core.multiarray', 'scalar'): _scalar,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == 'EasyDict' and module.split('.')[0] == 'dnnlib':
            return dict
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module.startswith('dnnlib.tflib'):
            raise pickle.UnpicklingError(
                'it is a TensorFlow network; convert it to a PyTorch pickle first, with the '
                'legacy converter of the software it came from'
            )
        raise pickle.UnpicklingError(f'it asks for {module}.{name}, which a network does not need')

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError('it is no network pickle; it refers to data outside itself')


def read_pickle(path: str | Path) -> dict:
    """Reads an NVIDIA network pickle -> dict of PickledModule and plain values.

    No code from the file is run. UserError when the file is missing or damaged, or names
    anything but tensors, numbers and plain containers (a hostile file does).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'network pickle not found: {path}')
    if path.stat().st_size > _MAX_BYTES:
        raise UserError(f'{path} was refused: it is larger than any network pickle')
    data = path.read_bytes()
    try:
        check_pickle(io.BytesIO(data))
        content = _Reader(io.BytesIO(data)).load()
        found = []
        for module in content.values() if isinstance(content, dict) else ():
            if isinstance(module, PickledModule):
                found += [
                    _part(layer, part)
                    for layer in _walk(module)
                    for part in ('_parameters', '_buffers')
                ]
        check_tensors(found)
    except BrokenFile as error:
        reason = 'empty' if not data else f'damaged ({error})'
        raise UserError(f'{path} was refused: it is {reason} or cut short') from error
    except Exception as error:  # random bytes make the reader fail in any way
        raise UserError(f'{path} was refused: {mismatch(error)}') from error
    if not isinstance(content, dict) or not isinstance(content.get('G_ema'), PickledModule):
        raise UserError(f'{path} is not a StyleGAN2-ADA network pickle: it has no "G_ema" network')
    return content


def tensors(module: PickledModule) -> State:
    """All parameters and buffers of a PickledModule as {dotted name: float32 tensor}.

    Buffers count too: layers frozen in training are stored as such.
    """
    return {
        f'{prefix}{name}': value.detach().float()
        for prefix, layer in _named_layers(module)
        for part in ('_parameters', '_buffers')
        for name, value in _part(layer, part).items()
        if isinstance(value, torch.Tensor)
    }


def _part(module: PickledModule, part: str) -> dict:
    """One of the dicts a network keeps its parts in, by name."""
    found = module.state.get(part)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(k, str) for k in found):
        raise pickle.UnpicklingError(f'a network in it has {part} without names')
    return found


def _named_layers(module: PickledModule) -> Iterator[tuple[str, PickledModule]]:
    """(prefix of its names, layer) of a network and everything inside it.

    pickle.UnpicklingError for one that holds itself, or layers so often that it never ends.
    """
    todo, n_layers = [('', module)], 0
    while todo:
        prefix, layer = todo.pop()
        n_layers += 1
        if n_layers > _MAX_LAYERS or not isinstance(layer.state, dict):
            raise pickle.UnpicklingError('a network in it has too many layers, or holds itself')
        yield prefix, layer
        todo += [
            (f'{prefix}{name}.', child)
            for name, child in _part(layer, '_modules').items()
            if isinstance(child, PickledModule)
        ]


def _walk(module: PickledModule) -> Iterator[PickledModule]:
    return (layer for _, layer in _named_layers(module))


def _resolutions(size: int) -> list[int]:
    return [2**i for i in range(2, int(math.log2(size)) + 1)]


def generator_map(size: int, n_mlp: int) -> list[Entry]:
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
            table += [
                (f'{ours}.conv.weight', f'{theirs}.weight', 'u0'),
                (f'{ours}.conv.modulation.weight', f'{theirs}.affine.weight', '='),
                (f'{ours}.conv.modulation.bias', f'{theirs}.affine.bias', '='),
                (f'{ours}.noise.weight', f'{theirs}.noise_strength', 'u0'),
                (f'{ours}.activate.bias', f'{theirs}.bias', '='),
                (f'noises.noise_{2 * i - 1 + k if i else 0}', f'{theirs}.noise_const', 'u00'),
            ]
        ours = f'to_rgbs.{i - 1}' if i else 'to_rgb1'
        table += [
            (f'{ours}.conv.weight', f'{block}.torgb.weight', 'u0'),
            (f'{ours}.conv.modulation.weight', f'{block}.torgb.affine.weight', '='),
            (f'{ours}.conv.modulation.bias', f'{block}.torgb.affine.bias', '='),
            (f'{ours}.bias', f'{block}.torgb.bias', 'v3'),
        ]
        if i:
            table += [
                (f'convs.{2 * i - 2}.conv.blur.kernel', f'{block}.conv0.resample_filter', 'x4'),
                (f'{ours}.upsample.kernel', f'{block}.resample_filter', 'x4'),
            ]
    return table


def discriminator_map(size: int) -> list[Entry]:
    """[(this project's key, NVIDIA's key, operation)] of a discriminator."""
    table = [
        ('convs.0.0.weight', f'b{size}.fromrgb.weight', '='),
        ('convs.0.1.bias', f'b{size}.fromrgb.bias', '='),
    ]
    for k, r in enumerate(reversed(_resolutions(size)[1:]), start=1):
        ours, theirs = f'convs.{k}', f'b{r}'
        table += [
            (f'{ours}.conv1.0.weight', f'{theirs}.conv0.weight', '='),
            (f'{ours}.conv1.1.bias', f'{theirs}.conv0.bias', '='),
            (f'{ours}.conv2.1.weight', f'{theirs}.conv1.weight', '='),
            (f'{ours}.conv2.2.bias', f'{theirs}.conv1.bias', '='),
            (f'{ours}.skip.1.weight', f'{theirs}.skip.weight', '='),
            (f'{ours}.conv2.0.kernel', f'{theirs}.conv1.resample_filter', '='),
            (f'{ours}.skip.0.kernel', f'{theirs}.skip.resample_filter', '='),
        ]
    return table + [
        ('final_conv.0.weight', 'b4.conv.weight', '='),
        ('final_conv.1.bias', 'b4.conv.bias', '='),
        ('final_linear.0.weight', 'b4.fc.weight', '='),
        ('final_linear.0.bias', 'b4.fc.bias', '='),
        ('final_linear.1.weight', 'b4.out.weight', '='),
        ('final_linear.1.bias', 'b4.out.bias', '='),
    ]


_OPERATIONS = {
    '=': lambda t: t,
    'u0': lambda t: t[None],
    'u00': lambda t: t[None, None],
    'v3': lambda t: t.view(1, 3, 1, 1),
    'x4': lambda t: t * 4,
}


def _rename(table: Sequence[Entry], found: State, what: str) -> State:
    missing = [theirs for _, theirs, _ in table if theirs not in found]
    if missing:
        raise UserError(f'the {what} has no {missing[0]}: its architecture differs. {_ADVICE}')
    return {ours: _OPERATIONS[op](found[theirs]) for ours, theirs, op in table}


def _size(found: Iterable[str], prefix: str, what: str) -> int:
    blocks = {
        int(k[len(prefix) + 1 :].split('.')[0])
        for k in found
        if k.startswith(f'{prefix}b') and k[len(prefix) + 1 :].split('.')[0].isdigit()
    }
    if not blocks or sorted(blocks) != _resolutions(max(blocks)):
        raise UserError(
            f'the {what} has no StyleGAN2 blocks (is it a StyleGAN3 network?). {_ADVICE}'
        )
    return max(blocks)


def _check_layers(module: PickledModule, what: str) -> None:
    """UserError for settings that the shapes do not show."""
    for layer in _walk(module):
        classes = layer.state.get('c_dim')
        if classes and isinstance(classes, int):
            raise UserError(f'the {what} is class-conditional (c_dim {classes}). {_ADVICE}')
        activation = layer.state.get('activation', 'lrelu')
        if not isinstance(activation, str) or not isinstance(classes, (int, NoneType)):
            raise UserError(f'the {what} has settings of unknown kinds. {_ADVICE}')
        if activation not in ('lrelu', 'linear'):
            raise UserError(
                f'the {what} uses the activation {activation[:40]!r}; only lrelu can be converted'
            )
    for name, child in tensors(module).items():
        if name.endswith('resample_filter') and tuple(child.shape) != (4, 4):
            raise UserError(
                f'the {what} resamples with a filter of shape {tuple(child.shape)}; '
                'only 4 x 4 filters can be converted'
            )


def convert_generator(
    module: PickledModule, what: str = 'generator'
) -> tuple[State, Float32[torch.Tensor, ' D'] | None]:
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
            raise UserError(
                f'the mapping network of the {what} has a layer {shape[1]} -> '
                f'{shape[0]} beside w_dim {w_dim}. {_ADVICE}'
            )
    _check_mapping_rate(module, what)
    net = generator_from_state(state, source=f'the {what}')
    return net.state_dict(), found.get('mapping.w_avg')


def _rename_rgb(table: Sequence[Entry], found: State, colour_key: str, what: str) -> State:
    colours = found.get(colour_key)
    if colours is not None and colours.shape[0] != 3:
        raise UserError(f'the {what} makes images of {colours.shape[0]} channel(s). {_ADVICE}')
    return _rename(table, found, what)


def _check_mapping_rate(module: PickledModule, what: str) -> None:
    """UserError unless the mapping layers' scale, which no state dict holds, is this project's."""
    for layer in _walk(_part(module, '_modules')['mapping']):
        rate = layer.state.get('bias_gain', _MAPPING_LR)
        if not isinstance(rate, (int, float)):
            raise UserError(f'the {what} has settings of unknown kinds. {_ADVICE}')
        if not math.isclose(rate, _MAPPING_LR, rel_tol=1e-6):
            raise UserError(
                f'the mapping network of the {what} was trained with the learning '
                f'rate multiplier {rate}; only {_MAPPING_LR} can be converted'
            )


def convert_discriminator(module: PickledModule, what: str = 'discriminator') -> State:
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
        raise UserError(
            f'the {what} has no or several minibatch-deviation channels; exactly one '
            'can be converted'
        )
    return discriminator_from_state(state, source=f'the {what}').state_dict()


def lost_settings(networks: Iterable[PickledModule]) -> list[str]:
    """Settings of the pickle that the weights do not carry, as sentences for the user."""
    notes = set()
    for module in networks:
        for layer in _walk(module):
            clamp, group = layer.state.get('conv_clamp'), layer.state.get('group_size')
            if isinstance(clamp, (int, float)):
                notes.add(
                    f'activations were clamped to +-{clamp}; the converted networks clamp '
                    'in half precision only'
                )
            if isinstance(group, int) and group != 4:
                notes.add(
                    f'the discriminator used minibatch groups of {group}; the default here is 4'
                )
    return sorted(notes)


def convert(content: dict, *, source: str | Path = 'the pickle') -> dict:
    """The whole pickle (read_pickle) -> {'g_ema', 'latent_avg'?, 'g'?, 'd'?} of plain tensors.

    UserError naming `source` for what cannot be represented and for what makes no network.
    """
    try:
        return _convert(content)
    except UserError as error:
        raise UserError(f'{source}: {error}') from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f'{source} holds no StyleGAN2 networks ({mismatch(error)}). {_ADVICE}'
        ) from error


def _convert(content: dict) -> dict:
    networks = {k: v for k, v in content.items() if isinstance(v, PickledModule)}
    state, w_avg = convert_generator(networks['G_ema'], 'generator G_ema')
    weights: dict[str, Any] = {'g_ema': state}
    if w_avg is not None:
        width = state['conv1.conv.modulation.weight'].shape[1]
        weights['latent_avg'] = latent_average(w_avg, width, source='the generator G_ema')
    if 'G' in networks:
        weights['g'] = convert_generator(networks['G'], 'generator G')[0]
    if 'D' in networks:
        weights['d'] = convert_discriminator(networks['D'], 'discriminator D')
    for note in lost_settings(networks.values()):
        log.info('not carried over: %s', note)
    return weights
