"""A ReStyle checkpoint of twice the resolution that begins where the smaller one ended.

Shapes: S input side and picture side of the smaller one, L its styles, D style dimension.
"""

import torch

from models.encoders import build_encoder
from models.encoders.light_encoder import LightEncoder
from models.psp import PSP
from models.stylegan2 import Generator
from training.stylegan2_growing import grow_generator
from utils.errors import UserError


def grow_psp(psp: PSP, *, channels: int, source: str) -> PSP:
    """Encoder and generator for 2 S px from those for S px, both sides of one size.

    The encoder finds in a photograph what the smaller one finds in its halved copy from the same
    first picture (which is a little sharper now), and the generator draws the smaller one's
    picture, enlarged; the new layers, `channels` wide, are untrained. UserError naming `source` for
    other encoders than those that read patches (LightEncoder and its kin), and for encoders that do
    not see whole pictures.
    """
    encoder, decoder = psp.encoder, psp.decoder
    if not isinstance(encoder, LightEncoder):
        raise UserError(
            f'{source}: {type(encoder).__name__} does not grow, LightEncoder and its kin do'
        )
    if psp.input_size != decoder.size:
        raise UserError(
            f'{source}: the encoder sees {psp.input_size} px of pictures of {decoder.size}; it '
            'must see whole pictures to grow'
        )
    large = Generator(
        2 * decoder.size,
        style_dim=decoder.style_dim,
        n_mlp=decoder.n_mlp,
        channels={**decoder.channels, 2 * decoder.size: channels},
    )
    grow_generator(large, decoder.state_dict(), source=source)
    new = build_encoder(
        type(encoder).__name__,
        n_styles=large.n_latent,
        input_size=2 * psp.input_size,
        style_dim=decoder.style_dim,
        width=encoder.stem.out_channels,
    )
    assert isinstance(new, LightEncoder)
    _grow_encoder(encoder, new)
    extra = large.n_latent - decoder.n_latent
    average = torch.cat([psp.latent_avg, psp.latent_avg[-1:].expand(extra, -1)])
    return PSP(new, large, average, 2 * psp.input_size).eval()


@torch.no_grad()
def _grow_encoder(small: LightEncoder, large: LightEncoder) -> None:
    """Takes the weights over; new styles are told what the last one is told."""
    state = small.state_dict()
    weight, side = state['stem.weight'], small.patch  # [K, C side^2, 3, 3], a channel per pixel
    pixels = weight.unflatten(1, (-1, side, side)) / 4  # each is now the mean of four
    pixels = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    state['stem.weight'] = pixels.flatten(1, 3)
    for name in ('head.weight', 'head.bias'):
        styles = state[name].unflatten(0, (small.n_styles, small.style_dim))
        extra = large.n_styles - small.n_styles
        state[name] = torch.cat([styles, *[styles[-1:]] * extra]).flatten(0, 1)
    large.load_state_dict({**large.state_dict(), **state})
