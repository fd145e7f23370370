"""Growing: the networks of a generator of half the resolution start those of a larger one.

The larger generator's last skip layer starts at zero, so that its pictures begin as the smaller
one's, enlarged by the network's own filter. The larger discriminator's first block starts as a
reduction by half in front of the smaller discriminator, where the widths allow it.
After Karras et al. 2018 (progressive growing); the skip generator needs no fading in.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch

from models.psp import psp_from_checkpoint
from models.stylegan2 import Discriminator, Generator
from models.stylegan2.checkpoint import discriminator_from_state, generator_from_state
from training.stylegan2_loop import Trainer
from training.stylegan2_networks import silence_noise
from utils.errors import UserError
from utils.io import load_weights

log = logging.getLogger(__name__)

State = dict[str, torch.Tensor]


def grow(trainer: Trainer, path: Path) -> None:
    """Starts the networks of a fresh `trainer` from the file `path` of half the resolution.

    path: a training snapshot, a generator file, or a ReStyle checkpoint, whose decoder is taken.
    The average of the weights then needs no ramp-up, as after a transfer. Raises UserError when
    the file holds no such generator or the widths that both have differ.
    """
    weights: Any = load_weights(
        path, what='generator file, training snapshot or ReStyle checkpoint'
    )
    if isinstance(weights, dict) and 'state_dict' in weights:
        weights = {'g_ema': psp_from_checkpoint(weights, source=str(path)).decoder.state_dict()}
    if not isinstance(weights, dict) or 'g_ema' not in weights:
        raise UserError(
            f'`grow` {path}: neither a generator file, a training snapshot nor a ReStyle checkpoint'
        )
    grow_generator(trainer.g_ema, weights['g_ema'], source=f'`grow` {path}')
    grow_generator(trainer.g, weights['g' if 'g' in weights else 'g_ema'], source=f'`grow` {path}')
    if not trainer.config.use_noise:
        silence_noise(trainer.g)
        silence_noise(trainer.g_ema)
    opponent = weights.get('config', {}).get('discriminator', 'stylegan2')
    if 'd' not in weights or opponent != trainer.config.discriminator:
        log.warning('%s holds no such discriminator; it starts untrained', path)
    elif opponent == 'projected':  # its heads fit pictures of any size
        trainer.d.load_state_dict(weights['d'])
    elif isinstance(trainer.d, Discriminator):
        grow_discriminator(trainer.d, weights['d'], source=f'`grow` {path}')
    trainer.mark_transferred()


def _check_half(
    small: Generator | Discriminator, large: Generator | Discriminator, source: str
) -> None:
    shared = {r: c for r, c in large.channels.items() if r < large.size}
    if small.channels != shared:
        raise UserError(
            f'{source}: holds networks of {small.size} px with channels '
            f'{small.channels}; a run of {large.size} px with this `cfg`, `cbase` and '
            f'`cmax` grows from {large.size // 2} px with channels {shared}'
        )


@torch.no_grad()
def grow_generator(net: Generator, state: State, *, source: str) -> None:
    """Loads the generator weights `state` of half the size into `net`.

    Layers that both have are taken over, the new ones stay as they are but for the last skip
    layer, which becomes 0: every picture of `net` is then the smaller generator's of the same
    latents and noise, enlarged. UserError naming `source` when they do not fit.
    """
    small = generator_from_state(state, source=source)
    _check_half(small, net, source)
    if (small.n_mlp, small.style_dim) != (net.n_mlp, net.style_dim):
        raise UserError(
            f'{source}: has {small.n_mlp} mapping layers of {small.style_dim} numbers, '
            f'this run wants {net.n_mlp} of {net.style_dim}; set `map_depth`'
        )
    net.load_state_dict({**net.state_dict(), **small.state_dict()})
    last: Any = net.to_rgbs[-1]
    last.conv.weight.zero_()


@torch.no_grad()
def grow_discriminator(net: Discriminator, state: State, *, source: str) -> None:
    """Loads the discriminator weights `state` of half the size into `net`.

    Blocks that both have are taken over under their new numbers. With equal widths at the two
    highest resolutions the first block hands on the colour layer's map, blurred and halved; the
    logits are then close to the smaller discriminator's for the halved picture. Otherwise
    colour layer and first block stay as they are. UserError naming `source` when nothing fits.
    """
    small = discriminator_from_state(state, source=source)
    _check_half(small, net, source)
    new = net.state_dict()
    for key, value in small.state_dict().items():
        part, _, rest = key.partition('.')
        if part != 'convs':
            new[key] = value
            continue
        number, _, name = rest.partition('.')
        if number != '0':
            new[f'convs.{int(number) + 1}.{name}'] = value
    net.load_state_dict(new)
    if net.channels[net.size] != net.channels[net.size // 2]:
        return
    net.convs[0].load_state_dict(small.convs[0].state_dict())
    block: Any = net.convs[1]
    block.conv2[1].weight.zero_()  # its share of the sum starts at 0 and is learnt
    convolution = block.skip[1]
    identity = torch.eye(net.channels[net.size])[:, :, None, None]
    convolution.weight.copy_(identity * math.sqrt(2) / convolution.scale)
