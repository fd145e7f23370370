"""A small untrained generator and encoder around feature networks, and a group for them."""

import torch

from anonymization.optimize import Group, GroupOptimizer, OptimizeConfig
from models.encoders import build_encoder
from models.psp import PSP
from models.stylegan2 import Generator


def pictures(n, side=64, seed=0):
    """Smooth random pictures in [-1, 1]."""
    draw = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, side // 8, side // 8, generator=draw) * 2 - 1
    return torch.nn.functional.interpolate(small, size=side, mode='bicubic').clamp(-1, 1)


def engine(content_net, style_net, side=64, guide=None, **options):
    """A small untrained generator and encoder around the given networks."""
    torch.manual_seed(0)
    channels = {s: 8 for s in (4, 8, 16, 32, 64, 128) if s <= side}
    decoder = Generator(side, style_dim=16, n_mlp=2, channels=channels)
    encoder = build_encoder(
        'LightEncoder', n_styles=decoder.n_latent, input_size=side, style_dim=16, width=8
    )
    psp = PSP(encoder, decoder, 0.1 * torch.randn(16), side)
    config = OptimizeConfig(**{'style_weight': 'auto', 'lr': 'auto', 'n_steps': 4, **options})
    return GroupOptimizer(psp, content_net, style_net, config=config, device='cpu', guide=guide)


def group_for(made, k=3, seed=1):
    """A group whose content features are those of its photographs."""
    side = made.psp.input_size
    photos = pictures(k, side, seed)
    draw = torch.Generator().manual_seed(seed)
    ws = torch.randn(k, made.synthesis.n_latent, 16, generator=draw)
    return Group(
        ws, ((photos + 1) * 127.5).round().to(torch.uint8), made.content_net.features(photos)
    )
