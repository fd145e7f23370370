"""The mapping network for an encoder's latents: energy distance, fit, command."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from test_joint_training import make_joint_psp
from test_restyle_training import photographs

from models.psp import load_psp, psp_checkpoint
from models.stylegan2 import Generator
from models.stylegan2.sampling import leading_directions
from scripts import fit_mapping as command
from training.mapping import energy_distance, fit_mapping
from utils.errors import UserError
from utils.io import save_torch
from utils.seeds import torch_generator


def test_energy_distance_is_zero_for_one_distribution_only() -> None:
    draw = torch_generator(0)
    x, y = torch.randn(2, 400, 4, generator=draw)
    assert abs(float(energy_distance(x, y))) < 0.02
    assert float(energy_distance(x, 2 * y)) > 0.1 and float(energy_distance(x, y + 1)) > 0.1
    points = torch.tensor([[0.0], [3.0]]), torch.tensor([[1.0], [2.0]])
    assert float(energy_distance(*points)) == pytest.approx(2 * 1.5 - 3 - 1)


def test_the_mapping_learns_the_latents_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    net = Generator(32, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8})
    before = {k: v.clone() for k, v in net.state_dict().items()}
    draw = torch_generator(1)
    mix = torch.randn(16, 16, generator=draw)
    latents = torch.randn(500, 16, generator=draw) @ mix / 4 + 1
    found = fit_mapping(net, latents, steps=300, batch=100)
    assert sum(found[-10:]) / 10 < 0.1 * found[0]
    with torch.no_grad():
        w = net.mapping(torch.randn(2000, 16, generator=draw))
    assert float((w.mean(0) - latents.mean(0)).abs().mean()) < 0.2
    assert float(w.std(0).mean() / latents.std(0).mean()) == pytest.approx(1, abs=0.15)
    # What varies most in the latents varies most in the mapping's, too.
    directions = leading_directions(net, 4).directions
    away = (latents - latents.mean(0)).double()
    found_share = (away @ directions.T).square().sum() / away.square().sum()
    most = torch.linalg.svdvals(away)[:4].square().sum() / away.square().sum()
    assert float(found_share) > 0.95 * float(most)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith('style.') for k in changed)
    with pytest.raises(UserError, match='at least two'):
        fit_mapping(net, latents[:1])


def test_command(tmp_path: Path) -> None:
    (tmp_path / 'data').mkdir()
    for i, picture in enumerate(photographs(5, 64)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / 'data' / f'{i}.png')
    psp = make_joint_psp()
    save_torch(tmp_path / 'a.pt', psp_checkpoint(psp, {'seed': 3}))
    flags = ['--checkpoint_path', str(tmp_path / 'a.pt'), '--data', str(tmp_path / 'data')]
    command.main([*flags, '--dest', str(tmp_path / 'b.pt'), '--steps=3', '--device=cpu'])
    few = [*flags, '--steps=3', '--device=cpu', '--half_export']
    command.main([*few, '--dest', str(tmp_path / 'c.pt')])
    sizes = [(tmp_path / f'{name}.pt').stat().st_size for name in 'bc']
    assert sizes[1] < 0.75 * sizes[0]
    again = load_psp(tmp_path / 'b.pt')
    ours, theirs = psp.state_dict(), again.state_dict()
    assert any(not torch.equal(ours[k], v) for k, v in theirs.items() if '.style.' in k)
    assert all(torch.equal(ours[k], v) for k, v in theirs.items() if '.style.' not in k)
