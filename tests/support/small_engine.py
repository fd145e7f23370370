"""A small engine for group optimisation, and groups of noise for it."""

import torch
import torchvision

from anonymization.optimize import Group, GroupOptimizer, OptimizeConfig
from models.encoders import build_encoder
from models.features.content import content_network_from_state
from models.features.style import FILTERS, load_style_network
from models.psp import PSP
from models.stylegan2 import Generator


def small_engine(**options):
    torch.manual_seed(0)
    decoder = Generator(32, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8})
    encoder = build_encoder('LightEncoder', n_styles=8, input_size=32, style_dim=16, width=8)
    psp = PSP(encoder, decoder, 0.1 * torch.randn(16), 32)
    net = torchvision.models.resnet18(weights=None)
    content = content_network_from_state(net.state_dict(), source='random')
    content.input_size = 32
    config = OptimizeConfig(n_steps=6, n_crop=2, style_weight=1e-2)
    return GroupOptimizer(
        psp, content, load_style_network(FILTERS), config=config, device='cpu', **options
    )


def small_groups(engine, sizes):
    draw = torch.Generator().manual_seed(1)
    groups = []
    for k in sizes:
        photos = torch.randint(0, 256, (k, 3, 32, 32), generator=draw, dtype=torch.uint8)
        ws = torch.randn(k, 8, 16, generator=draw)
        content = torch.nn.functional.normalize(torch.randn(k, 512, generator=draw), dim=1)
        groups.append(Group(ws, photos, content))
    return groups
