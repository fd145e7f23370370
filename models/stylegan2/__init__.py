"""StyleGAN2 in the state-dict format of the widespread PyTorch port."""

from models.stylegan2.checkpoint import (
    discriminator_from_state,
    generator_from_state,
    load_discriminator,
    load_generator,
)
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.model import Generator, channel_table, truncate

__all__ = [
    'Discriminator',
    'Generator',
    'channel_table',
    'discriminator_from_state',
    'generator_from_state',
    'load_discriminator',
    'load_generator',
    'truncate',
]
