"""Secret starts: other pictures without the key, the same bytes with it, and what insiders gain."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import load_script
from release_fixture import save_networks, save_photographs, tree_bytes
from small_engine import small_engine, small_groups

from anonymization import Networks, OptimizeConfig, Settings, anonymize
from anonymization.starts import KEY, read_key, start_offset
from datasets.table import read_table
from evaluation.attacks.insiders import replay_ranks, subtraction_ranks
from utils.errors import UserError

SETTINGS = Settings(
    k=3,
    strata=('referable',),
    grade_penalty=0.5,
    start_noise=0.5,
    optimize=OptimizeConfig(n_steps=2, n_crop=2),
)


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('inputs')
    save_networks(folder)
    save_photographs(folder / 'data', 14)
    return folder


def make(inputs, run, settings):
    table = read_table(inputs / 'data/labels.csv', n_images=12)  # two more are left out
    anonymize(table, Networks(inputs / 'psp.pt', inputs / 'content.pt'), settings, run, workers=0)
    return tree_bytes(run / 'release/images'), (run / 'private' / KEY)


def test_a_release_is_repeated_with_its_key_alone(inputs, tmp_path):
    """Groups of one side of the referable line, whose starts are secret; the audit passes."""
    one, key = make(inputs, tmp_path / 'one', SETTINGS)
    other, _ = make(inputs, tmp_path / 'other', SETTINGS)
    again, _ = make(inputs, tmp_path / 'again', dataclasses.replace(SETTINGS, start_key=str(key)))
    assert one == again and one.keys() == other.keys() and one != other
    assert key.read_text().strip().encode() not in b''.join(
        tree_bytes(tmp_path / 'one/release').values()
    )
    insiders = load_script('insiders', 'benchmarks')
    flags = [f'--run={tmp_path / "one"}', f'--out_dir={tmp_path / "insiders"}']
    assert insiders.main([*flags, '--groups=1', '--candidates=2']) == 0
    assert 'replay_first' in (tmp_path / 'insiders/insiders.md').read_text()


def test_keys(tmp_path):
    key = read_key(tmp_path, None)
    assert read_key(tmp_path, tmp_path / KEY) == key and len(key) == 32
    (tmp_path / 'bad').write_text('abc')
    with pytest.raises(UserError, match='not a file of 64 hexadecimal digits'):
        read_key(tmp_path, tmp_path / 'bad')
    (tmp_path / 'new').write_text('00' * 32)
    with pytest.raises(UserError, match='began with another key'):
        read_key(tmp_path, tmp_path / 'new')


def test_offsets_depend_on_key_and_members_alone():
    one = start_offset(b'1' * 32, ['a', 'b'], (40, 50), 0.3)
    assert torch.equal(one, start_offset(b'1' * 32, ['b', 'a'], (40, 50), 0.3))
    assert one.std() == pytest.approx(0.3, rel=0.05) and abs(one.mean()) < 0.03
    for other in (
        start_offset(b'2' * 32, ['a', 'b'], (40, 50), 0.3),
        start_offset(b'1' * 32, ['a', 'c'], (40, 50), 0.3),
    ):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.1


def test_the_start_moves_and_the_centroid_stays():
    engine = small_engine()
    engine.config = OptimizeConfig(n_steps=0)
    (group,) = small_groups(engine, (3,))
    moved = engine.run([group._replace(offset=torch.ones(8, 16))])
    plain = engine.run([group])
    assert torch.allclose(moved.ws, plain.ws + 1)
    assert torch.equal(moved.centroid, plain.centroid)
    assert not torch.equal(moved.image, plain.image)


def test_subtraction_finds_the_last_member_of_a_plain_average():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((40, 4, 8)).astype(np.float32)
    group_of = np.arange(40) // 5
    group_of[-5:] = -1
    means = np.stack([latents[group_of == g].mean(0) for g in range(7)])
    ranks, chance = subtraction_ranks(means, latents, group_of)
    assert (ranks == 1).all() and len(ranks) == 35 and chance == pytest.approx(1 / 36)
    noisy = means + 3 * rng.standard_normal(means.shape)
    assert (subtraction_ranks(noisy, latents, group_of)[0] == 1).mean() < 0.3


def test_replay_finds_whose_picture_comes_out():
    rng = np.random.default_rng(1)
    photographs = rng.integers(0, 255, (20, 3, 8, 8)).astype(float)
    group_of = np.arange(20) // 4

    def remake(rows):
        return photographs[rows].mean(0).astype(np.uint8)

    pictures = np.stack([remake(np.flatnonzero(group_of == g)) for g in range(5)])
    ranks, equal = replay_ranks(remake, pictures, group_of, n_groups=5, n_candidates=6)
    assert ranks.tolist() == [1] * 5 and equal.all()
    other = np.clip(pictures + rng.normal(0, 80, pictures.shape), 0, 255).astype(np.uint8)
    assert not replay_ranks(remake, other, group_of, n_groups=5, n_candidates=6)[1].any()
