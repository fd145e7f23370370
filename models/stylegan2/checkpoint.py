"""Builds StyleGAN2 networks from weight files; the architecture is read from the shapes."""

from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor

from models.loading import fill, mismatch, named_tensors
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.model import MAX_SIZE, Generator
from utils.errors import UserError
from utils.io import load_weights

_REMEDY = (
    'Train one with scripts/train_stylegan2_ada.py, or convert an NVIDIA .pkl with '
    'scripts/convert_stylegan2_ada.py.'
)
_MAX_MLP = 64  # mapping layers; published networks have 2 to 8
_ERRORS = (KeyError, IndexError, ValueError, TypeError, RuntimeError, AttributeError)


def generator_from_state(
    state: object, *, source: str | Path = 'generator weights', remedy: str = _REMEDY
) -> Generator:
    """A Generator with the weights of a state dict (size, channels and mapping depth inferred).

    Raises UserError naming `source` and the remedy when the keys or shapes are not a generator's.
    """
    state = named_tensors(state, source=source, remedy=remedy)
    try:
        table = {4: state['input.input'].shape[1]}
        while f'convs.{2 * (len(table) - 1)}.conv.weight' in state:
            weight = state[f'convs.{2 * (len(table) - 1)}.conv.weight']
            table[4 * 2 ** len(table)] = weight.shape[1]
        n_mlp = sum(k.startswith('style.') and k.endswith('.weight') for k in state)
        if max(table) > MAX_SIZE or n_mlp > _MAX_MLP:
            raise ValueError(f'more than {MAX_SIZE} px, or than {_MAX_MLP} mapping layers')
        style_dim = state['conv1.conv.modulation.weight'].shape[1]
        # Files of early ports lack the stored noise; fixed maps replace it.
        return fill(
            lambda: Generator(max(table), style_dim=style_dim, n_mlp=n_mlp, channels=table),
            state,
            optional='noises.',
        )
    except _ERRORS as error:
        raise UserError(
            f'{source}: no StyleGAN2 generator ({mismatch(error)}). {remedy}'
        ) from error


def latent_average(
    value: object, style_dim: int, *, source: str | Path
) -> Float32[Tensor, ' D'] | None:
    """The mean latent [style_dim], float32, of a file's `latent_avg`; None for None.

    UserError naming `source` for anything but so many finite numbers.
    """
    if value is None:
        return None
    if (
        not isinstance(value, torch.Tensor)
        or value.numel() != style_dim
        or not value.is_floating_point()
        or not value.isfinite().all()
    ):
        raise UserError(f'{source}: latent_avg is no mean latent ({style_dim} finite numbers)')
    return value.reshape(style_dim).float()


def discriminator_from_state(
    state: object, *, source: str | Path = 'discriminator weights', remedy: str = _REMEDY
) -> Discriminator:
    """A Discriminator with the weights of a state dict; UserError when it is not one."""
    state = named_tensors(state, source=source, remedy=remedy)
    try:
        n_blocks = sum(k.startswith('convs.') and k.endswith('.skip.1.weight') for k in state)
        size = 4 * 2 ** min(n_blocks, 30)
        if size > MAX_SIZE:
            raise ValueError(f'more than {MAX_SIZE} px')
        table = {size: state['convs.0.0.weight'].shape[0]}
        for i in range(1, n_blocks + 1):
            table[size >> i] = state[f'convs.{i}.skip.1.weight'].shape[0]
        return fill(lambda: Discriminator(size, channels=table), state)
    except _ERRORS as error:
        raise UserError(
            f'{source}: no StyleGAN2 discriminator ({mismatch(error)}). {remedy}'
        ) from error


def load_generator(
    path: str | Path, device: torch.device | str = 'cpu'
) -> tuple[Generator, Float32[Tensor, ' D'] | None]:
    """Reads `g_ema` and `latent_avg` of a weight file.

    Returns (generator, latent_avg): frozen, in eval mode, on `device`; latent_avg is [D] or
    None when the file has none. Raises UserError when the file is missing or is not a
    generator file.
    """
    weights = load_weights(path, what='generator file', hint=_REMEDY)
    if not isinstance(weights, dict) or 'g_ema' not in weights:
        raise UserError(f'{path} is not a generator file: it has no "g_ema" entry. {_REMEDY}')
    net = generator_from_state(weights['g_ema'], source=path)
    latent_avg = latent_average(weights.get('latent_avg'), net.style_dim, source=path)
    if latent_avg is not None:
        latent_avg = latent_avg.to(device)
    return net.to(device).eval().requires_grad_(False), latent_avg


def load_discriminator(path: str | Path, device: torch.device | str = 'cpu') -> Discriminator:
    """Reads the `d` entry of a weight file as a trainable Discriminator on `device`."""
    weights = load_weights(path, what='generator file', hint=_REMEDY)
    if not isinstance(weights, dict) or 'd' not in weights:
        raise UserError(f'{path} holds no discriminator ("d" entry). {_REMEDY}')
    return discriminator_from_state(weights['d'], source=path).to(device)
