"""Noise with a stated epsilon: how much it must be, what it covers, who can repeat it."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from release_fixture import save_networks, save_photographs, tree_bytes
from scipy.integrate import quad
from scipy.stats import norm
from small_engine import small_engine

from anonymization import Networks, OptimizeConfig, Settings, anonymize
from anonymization.audit import audit_release
from anonymization.calibrated import Noise, NoiseConfig, Teller, most_groups, noise_of
from anonymization.grouping import assign_groups
from anonymization.starts import KEY, secret_normals
from datasets.table import read_table
from utils.errors import UserError
from utils.io import sha256_file

SETTINGS = Settings(
    k=3,
    policy='together',
    optimize=OptimizeConfig(n_steps=0, latent_rank=4, n_crop=2),
    noise=NoiseConfig(epsilon=8.0),
)


def delta_by_integration(epsilon: float, sigma: float, moved: float) -> float:
    """Integral of what one density has above exp(epsilon) times the other's."""

    def excess(x: float) -> float:
        return max(0.0, norm.pdf(x, moved, sigma) - math.exp(epsilon) * norm.pdf(x, 0, sigma))

    start = moved / 2 + epsilon * sigma**2 / moved  # where the ratio is exp(epsilon)
    return quad(excess, start, max(start, moved) + 12 * sigma, epsabs=0, limit=200)[0]


@pytest.mark.parametrize('epsilon', [0.1, 1.0, 8.0, 32.0])
@pytest.mark.parametrize('delta', [1e-3, 1e-6])
@pytest.mark.parametrize(('k', 'groups'), [(5, 1), (20, 2)])
def test_the_noise_is_the_least_that_keeps_epsilon_and_delta(epsilon, delta, k, groups):
    noise = noise_of(NoiseConfig(epsilon, delta, 1.5), rank=4, k=k, groups_per_person=groups)
    moved = 2 * 1.5 / k * math.sqrt(groups)
    assert delta_by_integration(epsilon, noise.sigma, moved) <= delta * (1 + 1e-6)
    assert delta_by_integration(epsilon, 0.999 * noise.sigma, moved) > delta


def test_no_noise_without_an_epsilon():
    assert noise_of(NoiseConfig(), rank=4, k=5, groups_per_person=1) is None


NOISE = Noise(8.0, 1e-5, 1.5, 3, 1, 0.4)


@pytest.fixture(scope='module')
def teller():
    return Teller(small_engine().psp.decoder, NOISE, b'k' * 32, 'networks')


def draws(teller, n, seed=0):
    """Latents [n, L, D] along the generator's directions, three deviations long and more."""
    rng = np.random.default_rng(seed)
    lead = teller._leading
    codes = torch.from_numpy(3 * rng.standard_normal((n, NOISE.directions)))
    w = (lead.middle + codes * lead.deviations @ lead.directions).float()
    return w[:, None].repeat(1, teller._styles, 1)


def test_one_person_moves_a_group_by_no_more_than_stated(teller):
    """Whoever comes in place of whoever, with photographs as many and as far out as they like."""
    people = [0, 0, 1, 2, 3, 3, 3, 4]
    ws, furthest = draws(teller, 8), 0.0
    for seed in range(200):
        other = ws.clone()
        rows = [i for i, p in enumerate(people) if p == seed % 5]
        other[rows] = draws(teller, len(rows), seed) * 10 ** (seed % 4)
        moved = np.linalg.norm(teller.code(other, people) - teller.code(ws, people))
        furthest = max(furthest, moved)
    assert 0.8 * 2 * NOISE.clip / 5 < furthest <= 2 * NOISE.clip / 5 + 1e-9


def test_people_count_the_same_however_many_photographs_they_have(teller):
    a, b, c = draws(teller, 3, seed=1)
    once = teller.code(torch.stack([a, b, c]), ['a', 'b', 'c'])
    often = teller.code(torch.stack([a, a, b, a, c]), ['a', 'a', 'b', 'a', 'c'])
    assert np.allclose(once, often, atol=1e-6)
    near = 0.1 * (a - teller._leading.middle) + teller._leading.middle  # inside the clip
    alone = teller.code(near[None], ['a'])
    lead = teller._leading
    code = ((near[0] - lead.middle).double() @ lead.directions.T / lead.deviations).numpy()
    assert np.allclose(alone, code, atol=1e-5) and np.linalg.norm(code) < NOISE.clip
    assert np.linalg.norm(teller.code(a[None], ['a'])) == pytest.approx(NOISE.clip)


def test_noise_has_the_stated_deviation_and_depends_on_everything():
    normals = secret_normals(b'k' * 32, b'x', 20_000)
    assert normals.std() == pytest.approx(1, abs=0.02) and abs(normals.mean()) < 0.03
    for key, context in ((b'j' * 32, b'x'), (b'k' * 32, b'y')):
        other = secret_normals(key, context, 20_000)
        assert abs(np.corrcoef(normals, other)[0, 1]) < 0.03
    assert np.array_equal(normals, secret_normals(b'k' * 32, b'x', 20_000))


def test_a_group_is_told_in_its_noisy_code_alone(teller):
    ws, ids, people = draws(teller, 4), list('abcd'), list('wxyz')
    told = teller.tell(ids, ws, people)
    lead = teller._leading
    away = (told - lead.middle).double()
    assert torch.allclose(away, away @ lead.directions.T @ lead.directions, atol=1e-5)
    assert torch.equal(told, told[:1].expand_as(told))
    code = (away[0] @ lead.directions.T / lead.deviations).numpy() / teller.scale
    assert np.allclose(1024 * code, np.rint(1024 * code), atol=0.1)  # rounded
    # Whatever else is told, it has noise of its own: the difference is not that of the codes.
    nudged = ws.clone()
    nudged[0, 0, 0] += 1e-6
    for other in (teller.tell(ids, nudged, people), teller.tell(list('abce'), ws, people)):
        moved = (other - told)[0].double() @ lead.directions.T / lead.deviations
        assert moved.norm() > 0.1 * NOISE.sigma
    order = [2, 0, 3, 1]
    again = teller.tell([ids[i] for i in order], ws[order], [people[i] for i in order])
    assert torch.allclose(again, told, atol=1e-3)


def test_noisy_codes_have_the_deviation_of_the_generators_own(teller):
    own = np.stack([teller.code(w[None], ['a']) for w in draws(teller, 5)])
    assert own.shape == (5, 3)
    lead, rng = teller._leading, np.random.default_rng(0)
    codes = lead.codes.numpy()
    short = codes * np.minimum(1, NOISE.clip / np.linalg.norm(codes, axis=1, keepdims=True))
    noisy = short + NOISE.sigma * rng.standard_normal(short.shape)
    assert np.sqrt((teller.scale**2 * noisy**2).mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'optimize': OptimizeConfig(n_steps=0)}, '`epsilon` needs `latent_rank`'),
        ({'optimize': OptimizeConfig(n_steps=3, latent_rank=2)}, '`epsilon` needs `n_steps` 0'),
        ({'start_noise': 0.5}, '`epsilon` and `start_noise`'),
        ({'noise': NoiseConfig(clip=1.0)}, '`clip`.*`epsilon`'),
        ({'noise': NoiseConfig(delta=0.1)}, '`delta`.*`epsilon`'),
        ({'noise': NoiseConfig(epsilon=0.0)}, '`epsilon`: want'),
        ({'noise': NoiseConfig(epsilon=1.0, delta=1.0)}, '`delta`: want'),
        ({'clustering': 'random', 'grade_penalty': 1.0}, '`grade_penalty` has no effect'),
    ],
)
def test_what_would_break_the_guarantee_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SETTINGS, **changes).check()


def test_groups_that_are_dealt_out_do_not_depend_on_photographs():
    rng = np.random.default_rng(0)
    patients = [f'p{i // 2}' for i in range(40)]
    for policy in ('distinct', 'together'):
        found = [
            assign_groups(
                rng.standard_normal((40, 6)), 4, patients=patients, method='random', policy=policy
            ).numbers
            for _ in range(2)
        ]
        other = assign_groups(
            np.zeros((40, 6)), 4, patients=patients, method='random', policy=policy, seed=1
        ).numbers
        assert np.array_equal(*found) and not np.array_equal(found[0], other)


def test_a_person_in_several_groups():
    assert most_groups([['a', 'b', 'b'], ['a', 'c']]) == 2


# -- a whole run ----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inputs')
    save_networks(folder)
    save_photographs(folder / 'data', 14, patients=[f'p{i // 2}' for i in range(14)])
    return folder


@pytest.fixture(scope='module')
def made(inputs, tmp_path_factory):
    run = tmp_path_factory.mktemp('made') / 'run'
    make(inputs, run, SETTINGS)
    return run


def table_of(inputs):
    return read_table(inputs / 'data/labels.csv')


def make(inputs, run, settings):
    networks = Networks(inputs / 'psp.pt', inputs / 'content.pt')
    anonymize(table_of(inputs), networks, settings, run, workers=0)
    return run


def audited(inputs, run):
    return audit_release(
        run / 'release', private=run / 'private', source_table=table_of(inputs), recompute_n=None
    )


def test_a_run_is_repeated_with_its_key_alone(inputs, made, tmp_path):
    key = made / 'private' / KEY
    again = make(inputs, tmp_path / 'again', dataclasses.replace(SETTINGS, start_key=str(key)))
    other = make(inputs, tmp_path / 'other', SETTINGS)
    assert tree_bytes(again / 'release') == tree_bytes(made / 'release')
    pictures, others = (tree_bytes(run / 'release/images') for run in (made, other))
    assert not set(pictures.values()) & set(others.values())
    assert not set(pictures) & set(others)  # the seed and a table do not give the names
    released = b''.join(tree_bytes(made / 'release').values())
    assert key.read_text().strip().encode() not in released
    with pytest.raises(UserError, match='epsilon'):
        make(inputs, made, dataclasses.replace(SETTINGS, noise=NoiseConfig(epsilon=9.0)))
    with pytest.raises(UserError, match='`delta` 0.5: one of .* people may be given away'):
        loose = NoiseConfig(epsilon=9.0, delta=0.5)
        make(inputs, tmp_path / 'loose', dataclasses.replace(SETTINGS, noise=loose))
    (tmp_path / 'bad.key').write_text('hello')
    with pytest.raises(UserError, match='`start_key`.*not a file of 64'):
        make(
            inputs,
            tmp_path / 'bad',
            dataclasses.replace(SETTINGS, start_key=str(tmp_path / 'bad.key')),
        )
    assert not (tmp_path / 'loose').exists() and not (tmp_path / 'bad').exists()


def test_the_release_says_what_holds(inputs, made):
    manifest = json.loads((made / 'release/manifest.json').read_text())
    noise = manifest['noise']
    assert (noise['epsilon'], noise['delta'], noise['directions']) == (8, 1e-5, 4)
    assert noise['clip'] == pytest.approx(1.5) and noise['groups_per_person'] == 1
    for page in ('DATASHEET.md', 'report.html', 'README.md'):
        text = (made / 'release' / page).read_text()
        assert '(8.0, 1e-05)-differentially private' in text, page
        assert 'Given who is in which group' in text and 'is not claimed' not in text
    audit = audited(inputs, made)
    assert audit.passed, [c for c in audit.checks if not c.passed]
    assert any('noise of the key' in check.name for check in audit.checks)


def test_groups_that_are_dealt_out_need_no_given_groups(inputs, tmp_path):
    settings = dataclasses.replace(SETTINGS, clustering='random', policy='distinct')
    run = make(inputs, tmp_path / 'run', settings)
    text = (run / 'release/DATASHEET.md').read_text()
    assert 'dealt out by chance' in text and 'Given who is in which group' not in text
    assert 'enough for a person in 2 groups' in text
    assert audited(inputs, run).passed


def _options(run, **changes):
    path = run / 'private/options.json'
    record = json.loads(path.read_text())
    record['options'] |= changes
    path.write_text(json.dumps(record))


def _manifest(run, **changes):
    path = run / 'release/manifest.json'
    manifest = json.loads(path.read_text())
    manifest['noise'] |= changes
    path.write_text(json.dumps(manifest, indent=2) + '\n')


def _key(run):
    path = run / 'private' / KEY
    path.write_text('00' * 32 + '\n')
    path.with_name(f'{KEY}.sha256').write_text(f'{sha256_file(path)}  {KEY}\n')


def _latents(run):
    path = run / 'private/group_latents.npy'
    latents = np.load(path)
    latents[1] += 0.3
    np.save(path, latents)
    path.with_name(f'{path.name}.sha256').write_text(f'{sha256_file(path)}  {path.name}\n')


@pytest.mark.parametrize(
    'spoil',
    [
        lambda run: _manifest(run, epsilon=1.0),
        lambda run: _manifest(run, sigma=3.0),
        lambda run: _options(run, epsilon=1.0),
        lambda run: _options(run, epsilon=None),
        lambda run: (run / 'private' / KEY).unlink(),
        _key,
        _latents,
    ],
    ids=['epsilon', 'sigma', 'record', 'no epsilon', 'no key', 'other key', 'latents'],
)
def test_the_audit_fails(inputs, made, tmp_path, spoil):
    run = tmp_path / 'run'
    shutil.copytree(made, run)
    spoil(run)
    assert not audited(inputs, run).passed


def test_recipients_see_noise_that_is_too_small(made, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(made, run)
    assert audit_release(run / 'release').passed
    _manifest(run, epsilon=1.0)
    faults = [c.detail for c in audit_release(run / 'release').checks if not c.passed]
    assert any('noise is too small' in text for text in faults), faults
