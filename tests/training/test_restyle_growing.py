"""A grown checkpoint begins where the smaller one ended."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import avg_pool2d

from models.encoders import build_encoder
from models.encoders.pooled_encoder import read_at
from models.psp import PSP, invert, load_psp, psp_checkpoint
from models.stylegan2 import Generator
from scripts import grow_restyle
from training.restyle_growing import grow_psp
from utils.errors import UserError
from utils.io import save_torch


def small_psp(encoder: str = 'LightProgressiveEncoder', side: int = 64) -> PSP:
    torch.manual_seed(0)
    generator = Generator(64, n_mlp=2, style_dim=32, channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 8})
    net = build_encoder(
        encoder, n_styles=generator.n_latent, input_size=side, style_dim=32, width=8
    )
    with torch.no_grad():  # its latents differ, from photograph to photograph and style to style
        net.head.weight.normal_(0, 0.1)
    return PSP(net, generator, torch.randn(generator.n_latent, 32), side).eval()


@pytest.mark.parametrize('encoder', ['LightEncoder', 'LightProgressiveEncoder'])
def test_it_begins_where_the_smaller_one_ended(encoder: str) -> None:
    small = small_psp(encoder)
    large = grow_psp(small, channels=4, source='x')
    assert large.decoder.channels == {**small.decoder.channels, 128: 4}
    photographs = 2 * torch.rand(2, 3, 128, 128) - 1
    seen = torch.cat([photographs, photographs.flip(0)], 1)
    found, known = large.encoder(seen), small.encoder(avg_pool2d(seen, 2))
    torch.testing.assert_close(found[:, :10], known)
    torch.testing.assert_close(found[:, 10:], known[:, -1:].expand(-1, 2, -1))
    ws = small.latent_avg + known
    drawn = large.decode(torch.cat([ws, ws[:, -1:], ws[:, -1:]], 1), noise='none')
    before = small.decode(ws, noise='none')
    assert (avg_pool2d(drawn, 2) - before).std() < 0.02 * before.std()
    assert large.latent_avg.shape == (12, 32)


def test_the_command(tmp_path: Path) -> None:
    save_torch(tmp_path / 'small.pt', psp_checkpoint(small_psp(), {}))
    command = [f'--checkpoint_path={tmp_path / "small.pt"}', f'--dest={tmp_path / "large.pt"}']
    assert grow_restyle.main(command) == 0
    grown = load_psp(tmp_path / 'large.pt').eval()
    assert grown.input_size == grown.decoder.size == 128
    assert grown.decoder.channels[128] == 8
    assert invert(grown, torch.zeros(1, 3, 128, 128), n_iters=1).ws.shape == (1, 12, 32)
    command[1] = f'--dest={tmp_path / "again.pt"}'
    assert grow_restyle.main(command) == 0
    assert (tmp_path / 'again.pt').read_bytes() == (tmp_path / 'large.pt').read_bytes()
    with pytest.raises(UserError, match='already exists'):
        grow_restyle.main(command)


def test_features_are_read_at_128_px() -> None:
    photographs = torch.rand(1, 3, 256, 256)
    assert torch.equal(read_at(photographs), avg_pool2d(photographs, 2))
    assert torch.equal(read_at(photographs[..., :64, :64]), photographs[..., :64, :64])


def test_what_does_not_grow() -> None:
    torch.manual_seed(0)
    generator = Generator(64, n_mlp=2, style_dim=32, channels=dict.fromkeys((4, 8, 16, 32, 64), 8))
    with pytest.raises(UserError, match='x: the encoder sees 32 px of pictures of 64'):
        grow_psp(small_psp(side=32), channels=4, source='x')
    net = build_encoder('BackboneEncoder', n_styles=10, input_size=64, style_dim=32)
    psp = PSP(net, generator, torch.zeros(32), 64)
    with pytest.raises(UserError, match='x: BackboneEncoder does not grow'):
        grow_psp(psp, channels=4, source='x')
