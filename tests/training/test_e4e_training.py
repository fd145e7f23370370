"""e4e and known latents: encoders, one step by hand, exact resume, processes, command."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_fill import fill_image, fill_state_dict, fill_tensor
from PIL import Image
from test_restyle_training import Pictures, make_psp, photographs
from two_processes import run_in_one_and_two

from models.encoders import build_encoder
from models.psp import PSP, invert, load_psp, psp_checkpoint, psp_from_checkpoint
from models.stylegan2 import Generator
from scripts import train_restyle_e4e, train_restyle_psp
from training.coach_config import CoachConfig
from training.coach_restyle_e4e import E4ECoach, E4EConfig, progressive_steps
from training.coach_restyle_psp import Coach, encoder_run
from training.latent_discriminator import LatentCodesDiscriminator, LatentCodesPool, LatentGame
from training.reconstruction import L2Term
from utils.errors import UserError
from utils.io import load_weights, save_torch
from utils.logs import read_jsonl
from utils.seeds import torch_generator

STEPS = (0, 1, 1, 2, 2, 2, 3, 3)
E4E = E4EConfig(
    w_discriminator_lambda=0.1,
    w_discriminator_lr=1e-3,
    d_reg_every=2,
    use_w_pool=True,
    w_pool_size=5,
    delta_norm_lambda=0.01,
    progressive_steps=STEPS,
)


def make_e4e_psp() -> PSP:
    torch.manual_seed(0)
    psp = make_psp()
    for layer in psp.decoder.style[1:]:
        torch.nn.init.normal_(layer.weight, std=100)  # latents of unit size, as trained ones
    encoder = build_encoder(
        'LightProgressiveEncoder', n_styles=8, input_size=32, style_dim=16, width=8
    )
    return PSP(encoder, psp.decoder, psp.latent_avg, 32)


def make_coach(psp: PSP | None = None, e4e: E4EConfig | None = E4E, **settings) -> Coach:
    settings = {
        'batch_size': 4,
        'test_batch_size': 3,
        'max_steps': 4,
        'val_interval': 2,
        'board_interval': 1,
        'image_interval': 2,
        'n_iters': 2,
        'optim_name': 'adam',
        **settings,
    }
    make, more = (Coach, {}) if e4e is None else (E4ECoach, {'e4e': e4e})
    return make(
        psp or make_e4e_psp(),
        Pictures(photographs()),
        Pictures(photographs(3)),
        CoachConfig(**settings),
        losses={'l2': (L2Term(), 1.0)},
        device='cpu',
        **more,
    )


@pytest.mark.parametrize(
    'name, twin',
    [
        ('ProgressiveBackboneEncoder', 'BackboneEncoder'),
        ('ResNetProgressiveBackboneEncoder', 'ResNetBackboneEncoder'),
        ('LightProgressiveEncoder', 'LightEncoder'),
        ('LiteProgressiveEncoder', 'LiteEncoder'),
    ],
)
def test_styles_are_the_first_plus_deltas_up_to_the_stage(name: str, twin: str) -> None:
    side = 64 if 'Lite' in name else 32
    size = {'n_styles': 8, 'input_size': side, 'style_dim': 512 if 'Backbone' in name else 16}
    encoder, plain = build_encoder(name, **size).eval(), build_encoder(twin, **size).eval()
    x = torch.rand(1, 6, side, side, generator=torch_generator(0))
    with torch.no_grad():
        first = encoder(x)
        assert torch.equal(first, first[:, :1].expand_as(first))  # deltas start at 0
        assert first.abs().sum() > 0
        encoder.load_state_dict(plain.state_dict())  # the same names and shapes
        styles = plain(x)
        encoder.stage = 2
        got = encoder(x)
    want = styles[:, :1].repeat(1, 8, 1)
    want[:, 1:3] += styles[:, 1:3]
    assert torch.allclose(got, want, atol=1e-6)


def test_checkpoints_keep_the_published_layout() -> None:
    psp = make_e4e_psp()
    psp.encoder.load_state_dict(fill_state_dict(psp.encoder.state_dict(), equalized=False))
    checkpoint = psp_checkpoint(psp, {})
    assert set(checkpoint) == {'state_dict', 'opts', 'latent_avg'}
    assert checkpoint['opts']['encoder_type'] == 'LightProgressiveEncoder'
    again = psp_from_checkpoint({**checkpoint, 'discriminator_state_dict': {}})
    x = fill_image('psp/source', (2, 3, 32, 32))
    assert torch.equal(invert(again.eval(), x).ws, invert(psp.eval(), x).ws)
    # Without the name of the class the same weights are a pSp encoder's.
    plain = psp_from_checkpoint({**checkpoint, 'opts': {}})
    assert type(plain.encoder).__name__ == 'LightEncoder'
    assert not torch.equal(invert(plain.eval(), x).ws, invert(psp, x).ws)


def test_steps_of_the_deltas() -> None:
    assert progressive_steps(5, given=None, start=100, every=10) == (0, 100, 110, 120, 130)
    assert progressive_steps(3, given=[0, 4, 9], start=None, every=10) == (0, 4, 9)
    assert progressive_steps(3, given=None, start=None, every=10) is None
    for bad in ([0, 1], [1, 2, 3], [0, 9, 4]):
        with pytest.raises(UserError, match='3 rising steps'):
            progressive_steps(3, given=bad, start=None, every=1)


def test_stage_follows_the_steps() -> None:
    coach = make_coach()
    stages = []
    for _ in range(4):
        coach.step(photographs(4).float() / 127.5 - 1)
        stages.append(coach.psp.encoder.stage)
    assert stages == [0, 2, 5, 7]
    free = make_coach(e4e=E4EConfig())
    assert 'delta' not in free.step(photographs(4).float() / 127.5 - 1)[0]
    assert free.psp.encoder.stage == 7


def test_one_step_by_hand() -> None:
    x = fill_image('psp/source', (4, 3, 32, 32))
    coach = make_coach(learning_rate=0.01)
    coach.step_count = 2  # deltas of the styles 1 to 5 are in use, and the penalty is due
    values, _ = coach.step(x)
    psp, game = (
        make_e4e_psp(),
        LatentGame(
            16, lr=1e-3, r1=10, reg_every=2, pool_size=5, seed=0, device=torch.device('cpu')
        ),
    )
    net, generator = psp.encoder.train(), psp.decoder.requires_grad_(False)
    net.stage = 5
    before = game.net.state_dict()
    w, y = psp.latent_avg.repeat(4, 1, 1), generator.synthesis(psp.latent_avg[None])
    y, total, seen = y.repeat(4, 1, 1, 1), 0, []
    for t in range(2):
        draw = torch_generator(0, 'noise', 2, t)
        noise = [torch.randn(4, 1, s, s, generator=draw) for s in (4, 8, 8, 16, 16, 32, 32)]
        w = net(torch.cat([x, y], 1)) + w
        y = generator.synthesis(w, noise=noise)
        adversarial = F.softplus(-game.net(w[:, :6])).mean()
        delta = sum((w[:, i] - w[:, 0]).norm(2, dim=1).mean() for i in range(1, 6))
        total = total + F.mse_loss(y, x) + 0.01 * delta + 0.1 * adversarial
        w, y = w.detach(), y.detach()
        seen.append(w[:, :6])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    total.backward()
    optimizer.step()
    assert float(values['delta']) == pytest.approx(float(delta.detach()), rel=1e-4)
    assert float(values['w_adversarial']) == pytest.approx(float(adversarial.detach()), rel=1e-4)
    for got, want in zip(coach.psp.encoder.parameters(), net.parameters()):
        assert float((got - want).detach().abs().mean()) < 1e-5
    # The discriminator: one of the latents of each photograph against the mapping's.
    draw = torch_generator(0, 'latents', 2)
    choice = torch.randint(12, (4,), generator=draw)
    real = psp.decoder.mapping(torch.randn(4, 16, generator=draw)).detach()
    fake = torch.stack(seen, 1).flatten(1, 2)[torch.arange(4), choice]
    discriminator = LatentCodesDiscriminator(16)
    discriminator.load_state_dict(before)
    adam = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake)).mean()
    loss.backward()
    adam.step()
    adam.zero_grad()
    real.requires_grad_(True)
    (slope,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    (slope.square().sum(1).mean() * 10 / 2 * 2).backward()
    adam.step()
    assert float(values['w_discriminator']) == pytest.approx(float(loss.detach()), rel=1e-4)
    for got, want in zip(coach.game.net.parameters(), discriminator.parameters()):
        assert torch.allclose(got, want, atol=1e-6)


def test_pool_gives_new_latents_or_swaps_them_for_older_ones() -> None:
    pool, draw = LatentCodesPool(3), torch_generator(0)
    first = torch.arange(3.0)[:, None]
    assert torch.equal(pool.query(first, draw), first)
    known = {0.0, 1.0, 2.0}
    swapped = 0
    for i in range(3, 43):
        (got,) = pool.query(torch.tensor([[float(i)]]), draw).flatten().tolist()
        assert got == i or got in known
        swapped += got != i
        known = set(pool.kept.flatten().tolist())
        assert len(known) == 3 and (got == i) == (i not in known)
    assert 8 < swapped < 32
    none = LatentCodesPool(0)
    assert torch.equal(none.query(first, draw), first) and none.kept is None


@pytest.mark.parametrize('settings', [{}, {'e4e': None, 'synthetic': 0.5}])
def test_resume_is_exact(tmp_path: Path, settings: dict) -> None:
    straight = make_coach(**settings)
    encoder_run(straight, tmp_path / 'straight').to_the_end()
    encoder_run(make_coach(max_steps=2, **settings), tmp_path / 'parts').to_the_end()
    second = make_coach(**settings)
    run = encoder_run(second, tmp_path / 'parts')
    assert run.resume() and run.to_the_end()
    one, two = (
        {
            **c.psp.encoder.state_dict(),
            **(c.game.state()['discriminator_state_dict'] if isinstance(c, E4ECoach) else {}),
        }
        for c in (straight, second)
    )
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_state_without_its_discriminator_is_refused() -> None:
    state = make_coach(e4e=E4EConfig()).state()
    with pytest.raises(UserError, match='no latent discriminator'):
        make_coach().load_state(state, source='x.pt')


def test_samples_with_known_latents_by_hand() -> None:
    coach = make_coach(e4e=None, synthetic=0.5, latent_lambda=0.3, learning_rate=0.01)
    x = fill_image('psp/source', (4, 3, 32, 32))
    values, pictures = coach.step(x)
    psp = make_e4e_psp()
    net, generator = psp.encoder.train(), psp.decoder.requires_grad_(False)
    known = coach.known.latents(0)
    assert known.shape == (2, 8, 16)
    draw = torch_generator(0, 'noise', 0, 'sample')
    noise = [torch.randn(4, 1, s, s, generator=draw)[:2] for s in (4, 8, 8, 16, 16, 32, 32)]
    batch = torch.cat([generator.synthesis(known, noise=noise).clamp(-1, 1), x[2:]])
    assert torch.allclose(pictures[0], batch, atol=1e-5)
    z = torch.randn(4096, 16, generator=torch_generator(0, 'scale'))
    variance = generator.mapping(z).var(0).mean()
    w, y, total = psp.latent_avg.repeat(4, 1, 1), generator.synthesis(psp.latent_avg[None]), 0
    y = y.repeat(4, 1, 1, 1)
    for t in range(2):
        draw = torch_generator(0, 'noise', 0, t)
        noise = [torch.randn(4, 1, s, s, generator=draw) for s in (4, 8, 8, 16, 16, 32, 32)]
        w = net(torch.cat([batch, y], 1)) + w
        y = generator.synthesis(w, noise=noise)
        latent = ((w[:2] - known) ** 2).mean() / variance / 2
        total = total + F.mse_loss(y, batch) + 0.3 * latent
        w, y = w.detach(), y.detach()
    total.backward()
    torch.optim.Adam(net.parameters(), lr=0.01).step()
    assert float(values['latent']) == pytest.approx(float(latent.detach()), rel=1e-4)
    for got, want in zip(coach.psp.encoder.parameters(), net.parameters()):
        assert float((got - want).detach().abs().mean()) < 1e-5


def test_samples_do_not_depend_on_passes() -> None:
    # Three of four pictures are samples, so a pass of two holds both kinds.
    whole, parts = (make_coach(e4e=None, synthetic=0.75, accumulate=n) for n in (1, 2))
    x = fill_image('psp/source', (4, 3, 32, 32))
    one, two = whole.step(x)[0], parts.step(x)[0]
    for name in ('l2', 'latent', 'loss'):
        assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4)


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    """Same global batch, with latent discriminator and samples, under torchrun with gloo."""
    code = """
from pathlib import Path
from test_e4e_training import encoder_run, make_coach
from utils import distributed
distributed.init('cpu')
coach = make_coach(synthetic=0.5, learning_rate=1e-3, optim_name='ranger')
encoder_run(coach, Path(sys.argv[1])).to_the_end()
distributed.shutdown()
"""
    run_in_one_and_two(code, tmp_path)
    one, two = (load_weights(tmp_path / n / 'checkpoints' / 'state_4.pt') for n in '12')
    start = make_coach(synthetic=0.5).state()
    for part in ('weights', 'discriminator_state_dict'):
        moved = sum(float((one[part][k] - v).square().sum()) for k, v in start[part].items())
        apart = sum(float((one[part][k] - v).square().sum()) for k, v in two[part].items())
        assert moved > 0 and apart < 1e-4 * moved, part


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('e4e')
    for part, n in (('train', 6), ('test', 3)):
        (root / part).mkdir()
        for i, picture in enumerate(photographs(n)):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(root / part / f'{i}.png')
    decoder = Generator(32, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8})
    decoder.load_state_dict(fill_state_dict(decoder.state_dict(), equalized=True))
    for layer in decoder.style[1:]:
        torch.nn.init.normal_(layer.weight, std=100)
    save_torch(
        root / 'generator.pt',
        {'g_ema': decoder.state_dict(), 'latent_avg': fill_tensor('latent_avg', (16,), 0.1)},
    )
    return root


def test_published_flags_train_and_the_checkpoint_loads(project: Path) -> None:
    flags = [
        '--train_path',
        str(project / 'train'),
        '--test_path',
        str(project / 'test'),
        '--stylegan_weights',
        str(project / 'generator.pt'),
        '--encoder_size=32',
        '--light_width=8',
        '--batch_size=4',
        '--test_batch_size=4',
        '--n_iters_per_batch=2',
        '--l2_lambda=1',
        '--input_nc=6',
        '--start_from_latent_avg',
        '--device=cpu',
    ]
    e4e = [
        '--encoder_type=LightProgressiveEncoder',
        '--use_w_pool',
        '--w_discriminator_lambda=.1',
        '--progressive_start=1',
        '--progressive_step_every=1',
        '--delta_norm_lambda=0.0002',
    ]
    run = project / 'run'
    train_restyle_e4e.main([*flags, *e4e, '--exp_dir', str(run), '--max_steps=3'])
    checkpoint = load_weights(run / 'checkpoints' / 'best_model.pt')
    assert checkpoint['opts']['progressive_start'] == 1
    assert checkpoint['latent_avg'].shape == (8, 16)
    psp = load_psp(run / 'checkpoints' / 'best_model.pt')
    assert type(psp.encoder).__name__ == 'LightProgressiveEncoder'
    rows = read_jsonl(run / 'stats.jsonl')
    assert {'train/w_discriminator', 'train/delta', 'test/l2_2'} <= {k for r in rows for k in r}
    train_restyle_e4e.main(
        [
            *flags,
            *e4e,
            '--exp_dir',
            str(run),
            '--max_steps=4',
            '--resume_training_from_ckpt',
            str(run / 'checkpoints' / 'state_3.pt'),
        ]
    )
    assert load_weights(run / 'checkpoints' / 'state_4.pt')['step'] == 4
    with pytest.raises(UserError, match='8 rising steps'):
        train_restyle_e4e.main(
            [*flags, *e4e[:-3], '--exp_dir', str(project / 'x'), '--progressive_steps', '0', '5']
        )
    assert not (project / 'x').exists()
    # Pretraining on samples alone, from the pSp script.
    train_restyle_psp.main(
        [
            *flags,
            '--encoder_type=LightEncoder',
            '--synthetic=1',
            '--max_steps=2',
            '--exp_dir',
            str(project / 'samples'),
        ]
    )
    rows = read_jsonl(project / 'samples' / 'stats.jsonl')
    assert any('train/latent' in r for r in rows)
