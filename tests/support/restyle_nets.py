"""A tiny pSp of 32 px, and photographs for it."""

import torch
from golden_fill import fill_image, fill_state_dict, fill_tensor

from models.encoders import build_encoder
from models.psp import PSP
from models.stylegan2 import Generator

SMALL = {4: 8, 8: 8, 16: 8, 32: 8}


def make_psp(name='LightEncoder'):
    decoder = Generator(32, style_dim=16, n_mlp=2, channels=SMALL)
    decoder.load_state_dict(fill_state_dict(decoder.state_dict(), equalized=True))
    options = {'width': 8} if name == 'LightEncoder' else {}
    encoder = build_encoder(name, n_styles=8, input_size=32, style_dim=16, **options)
    filled = fill_state_dict(encoder.state_dict(), equalized=False)
    if name == 'LightEncoder':
        filled['head.weight'] *= 0.02
    encoder.load_state_dict(filled)
    return PSP(encoder, decoder, fill_tensor('latent_avg', (8, 16), 0.1), 32)


def photographs(n=12, size=32):
    img = fill_image('photographs', (n, 3, size, size))
    return img.mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)
