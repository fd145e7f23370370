"""The encoder that reads pooled features of a pretrained network: reading, checkpoints, errors."""

import pytest
import torch
from golden_fill import fill_image

from models.encoders import build_encoder
from models.encoders.restyle_e4e_encoders import LightProgressiveEncoder
from models.features.pretrained import load_feature_network
from models.psp import PSP, FrozenPSP, invert, psp_checkpoint, psp_from_checkpoint
from models.stylegan2 import Generator
from utils.errors import UserError


def make_psp() -> PSP:
    torch.manual_seed(0)
    decoder = Generator(64, style_dim=16, n_mlp=2, channels=dict.fromkeys((4, 8, 16, 32, 64), 8))
    encoder = build_encoder('LightPooledEncoder', n_styles=10, input_size=64, style_dim=16, width=8)
    return PSP(encoder, decoder, torch.zeros(10, 16), 64).eval()


def test_it_adds_a_linear_reading_of_the_photographs_features() -> None:
    encoder = make_psp().encoder
    photographs = fill_image('psp/source', (3, 3, 64, 64))
    pair = torch.cat([photographs, fill_image('psp/other', (3, 3, 64, 64))], 1)
    plain = LightProgressiveEncoder.forward(encoder, pair)
    assert torch.equal(encoder(pair), plain)  # nothing is read at first
    pooled = load_feature_network('lite0').pooled(photographs)
    encoder.standardise_by(pooled)
    torch.nn.init.normal_(encoder.reading.weight)
    scaled = (pooled - pooled.mean(0)) / pooled.std(0).clamp_min(1e-4)
    want = plain + (scaled @ encoder.reading.weight.T)[:, None]
    assert torch.allclose(encoder(pair), want, atol=1e-4)
    # Of the photograph, not of the reconstruction.
    assert not torch.allclose(encoder(pair.roll(3, 1)) - plain, encoder(pair) - plain, atol=1e-2)


def test_checkpoints_bring_it_back_without_the_networks_weights() -> None:
    psp = make_psp()
    photographs = fill_image('psp/source', (3, 3, 64, 64))
    psp.encoder.standardise_by(load_feature_network('lite0').pooled(photographs))
    psp.encoder.feature_std.fill_(0.01)  # as of many photographs
    torch.nn.init.normal_(psp.encoder.reading.weight, std=0.1)
    checkpoint = psp_checkpoint(psp, {})
    assert not any('net' in name for name in checkpoint['state_dict'])
    again = psp_from_checkpoint(checkpoint).eval()
    assert type(again.encoder).__name__ == 'LightPooledEncoder'
    one, two = (invert(p, photographs, n_iters=1).ws for p in (psp, again))
    assert torch.equal(one, two)
    low = invert(FrozenPSP(again, torch.bfloat16), photographs, n_iters=1).ws
    assert (low - one).abs().mean() < 0.2 * one.abs().mean()
    trained = {id(p) for p in again.parameters()}
    assert not any(id(p) in trained for p in again.encoder._network[0].parameters())


def test_pictures_below_the_networks_smallest_are_refused() -> None:
    with pytest.raises(UserError, match='too small'):
        build_encoder('LightPooledEncoder', n_styles=8, input_size=32, style_dim=16, width=8)
