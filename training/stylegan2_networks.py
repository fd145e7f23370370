"""The networks of a generator training: filled from weight files, exported, drawn with."""

import logging
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.stylegan2 import Generator
from models.stylegan2.checkpoint import generator_from_state
from models.stylegan2.model import NoiseInjection
from training.adversarial import Opponent
from training.stylegan2_config import TrainConfig
from utils.errors import UserError
from utils.io import load_weights, save_torch
from utils.seeds import torch_generator

log = logging.getLogger(__name__)


class Networks(Protocol):
    """What is trained: a generator, its average, and a discriminator."""

    g: Generator
    g_ema: Generator
    d: Opponent
    config: TrainConfig


def load_networks(networks: Networks, weights: dict, source: str | Path) -> None:
    """Fills the networks from a snapshot or a generator file read from `source`.

    What it does not hold starts untrained, with a warning; `g` starts as `g_ema`. UserError when
    a network does not fit.
    """
    if not isinstance(weights.get('g_ema'), dict):
        raise UserError(f'{source} holds no generator (g_ema); give a snapshot or a generator file')
    opponent = weights.get('config', {}).get('discriminator', 'stylegan2')
    if opponent != networks.config.discriminator:
        weights = {k: v for k, v in weights.items() if k != 'd'}  # of another kind
    for name in ('g_ema', 'g', 'd'):
        state = weights.get(name) or (weights['g_ema'] if name == 'g' else None)
        if state is None:
            log.warning('%s holds no %s; it starts untrained', source, name)
            continue
        try:
            getattr(networks, name).load_state_dict(state)
        except RuntimeError as error:
            held = generator_from_state(weights['g_ema'], source=source)
            raise UserError(
                f'{source} holds networks for {_described(held)}, this run '
                f'wants {_described(networks.g)}; choose images of that size, and the '
                '`cfg` and `map_depth` it was trained with'
            ) from error
    if not networks.config.use_noise:
        silence_noise(networks.g)
        silence_noise(networks.g_ema)


def _described(net: Generator) -> str:
    channels = ', '.join(f'{r}: {c}' for r, c in net.channels.items())
    return f'{net.size} px, {net.n_mlp} mapping layers and channels {{{channels}}}'


@torch.no_grad()
def silence_noise(generator: Generator) -> None:
    """Sets the strength of the noise to 0 in all layers; what uses the network adds none then."""
    for module in generator.modules():
        if isinstance(module, NoiseInjection):
            module.weight.zero_()


def export_inference(snapshot: Path, target: Path) -> None:
    """Writes the generator alone: g_ema and latent_avg, without what leaks or is not needed."""
    state = load_weights(snapshot, what='training snapshot')
    save_torch(target, {'g_ema': state['g_ema'], 'latent_avg': state['latent_avg']})


@torch.no_grad()
def sample_grid(
    generator: Generator,
    *,
    n: int,
    seed: int,
    device: torch.device,
    psi: float = 1.0,
    latent_avg: Tensor | None = None,
    batch: int = 32,
) -> Tensor:
    """n images [n, 3, R, R] of fixed latents with stored noise, on the CPU."""
    z = torch.randn(n, generator.style_dim, generator=torch_generator(seed, 'grid'))
    images = [
        generator(part.to(device), truncation=psi, truncation_latent=latent_avg).float().cpu()
        for part in z.split(batch)
    ]
    return torch.cat(images)
