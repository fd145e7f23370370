"""Builds StyleGAN2 networks from weight files; the architecture is read from the shapes."""
from pathlib import Path

from models.stylegan2.model import Discriminator, Generator
from utils.errors import UserError
from utils.io import load_weights

_REMEDY = ('Train one with scripts/train_stylegan2_ada.py, or convert an NVIDIA .pkl with '
           'scripts/convert_stylegan2_ada.py.')


def _reason(error):
    if isinstance(error, KeyError):
        return f'it lacks {error}'
    # torch's first line only says that there was an error; the keys stand on the next.
    return ' '.join(line.strip() for line in str(error).splitlines()[:2])


def generator_from_state(state, *, source='generator weights', remedy=_REMEDY):
    """A Generator with the weights of a state dict (size, channels and mapping depth inferred).

    Raises UserError naming `source` and the remedy when the keys or shapes are not a generator's.
    """
    try:
        table = {4: state['input.input'].shape[1]}
        while f'convs.{2 * (len(table) - 1)}.conv.weight' in state:
            weight = state[f'convs.{2 * (len(table) - 1)}.conv.weight']
            table[4 * 2 ** len(table)] = weight.shape[1]
        n_mlp = sum(k.startswith('style.') and k.endswith('.weight') for k in state)
        net = Generator(max(table), style_dim=state['conv1.conv.modulation.weight'].shape[1],
                        n_mlp=n_mlp, channels=table)
        if not any(k.startswith('noises.') for k in state):
            # Files of early ports lack the stored noise; fixed maps replace it.
            state = {**state, **{k: v for k, v in net.state_dict().items()
                                 if k.startswith('noises.')}}
        net.load_state_dict(state)
    except (KeyError, IndexError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f'{source}: no StyleGAN2 generator ({_reason(error)}). {remedy}'
                        ) from error
    return net


def discriminator_from_state(state, *, source='discriminator weights', remedy=_REMEDY):
    """A Discriminator with the weights of a state dict; UserError when it is not one."""
    try:
        n_blocks = sum(k.startswith('convs.') and k.endswith('.skip.1.weight') for k in state)
        size = 4 * 2 ** n_blocks
        table = {size: state['convs.0.0.weight'].shape[0]}
        for i in range(1, n_blocks + 1):
            table[size >> i] = state[f'convs.{i}.skip.1.weight'].shape[0]
        net = Discriminator(size, channels=table)
        net.load_state_dict(state)
    except (KeyError, IndexError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f'{source}: no StyleGAN2 discriminator ({_reason(error)}). {remedy}'
                        ) from error
    return net


def load_generator(path, device='cpu'):
    """Reads `g_ema` and `latent_avg` of a weight file.

    Returns (generator, latent_avg): frozen, in eval mode, on `device`; latent_avg is [D] or
    None when the file has none. Raises UserError when the file is missing or is not a
    generator file.
    """
    weights = load_weights(path, what='generator file', hint=_REMEDY)
    if not isinstance(weights, dict) or 'g_ema' not in weights:
        raise UserError(f'{path} is not a generator file: it has no "g_ema" entry. {_REMEDY}')
    net = generator_from_state(weights['g_ema'], source=str(Path(path)))
    latent_avg = weights.get('latent_avg')
    if latent_avg is not None:
        latent_avg = latent_avg.to(device)
    return net.to(device).eval().requires_grad_(False), latent_avg


def load_discriminator(path, device='cpu'):
    """Reads the `d` entry of a weight file as a trainable Discriminator on `device`."""
    weights = load_weights(path, what='generator file', hint=_REMEDY)
    if not isinstance(weights, dict) or 'd' not in weights:
        raise UserError(f'{path} holds no discriminator ("d" entry). {_REMEDY}')
    return discriminator_from_state(weights['d'], source=str(Path(path))).to(device)
