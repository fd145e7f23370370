"""Membership attacks: metrics against scikit-learn, controls, the published commands."""

import json
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from datasets.phantoms import render_phantom
from evaluation.attacks.groups import ReleaseFiles, pair_results, read_known_release
from evaluation.attacks.metrics import attack_metrics
from evaluation.attacks.nearest import nearest_attack, pixels, reidentification_ranks
from evaluation.attacks.pairs import PairAttack, PairConfig, standardisation, step_pairs
from evaluation.attacks.vessels import VesselAttack, best_correlations, vessel_maps
from evaluation.splits import check_roles, split_by_patient
from MIA import MIA_test, MIA_train
from MIA.MIA_split import main as split_main
from utils.errors import UserError


def phantoms(patients, size, visit=0):
    return np.stack(
        [
            np.asarray(
                render_phantom(
                    seed=3, patient=p, eye='left', visit=visit, grade=p % 3, size=size
                ).image
            ).transpose(2, 0, 1)
            for p in patients
        ]
    )


@pytest.fixture(scope='module')
def people():
    """64-px phantoms of 90 people."""
    return phantoms(range(90), 64)


# -- attacks without training -------------------------------------------------------------------


@pytest.mark.parametrize('attack', ['pixel', 'vessel'])
def test_controls(people, attack):
    """A release of reconstructions is caught; one of other people gives nothing away."""
    members, others, reference, strangers = np.split(people, [25, 50, 70])
    blurred = np.stack(
        [
            np.asarray(
                Image.fromarray(p.transpose(1, 2, 0)).resize((40, 40)).resize((64, 64))
            ).transpose(2, 0, 1)
            for p in members
        ]
    )

    def run(release):
        if attack == 'vessel':
            scores = VesselAttack(members, others, reference).scores(release)
        else:
            scores = nearest_attack(members, others, reference, pixels)(release)
        return attack_metrics(*scores, level=0.99)['auc']

    leaking, clean = run(blurred), run(strangers)
    assert leaking['value'] > 0.95 and leaking['low'] > 0.8
    assert clean['low'] <= 0.5 <= clean['high']
    assert abs(clean['value'] - 0.5) < 0.2


def test_later_photographs_lead_to_the_release_of_one_person():
    first, later = phantoms(range(16), 96), phantoms(range(16), 96, visit=1)
    ranks = reidentification_ranks(later, np.arange(16), first, vessel_features)
    assert np.median(ranks) <= 8  # a plain distance of unregistered maps is a weak attack
    similarity = best_correlations(vessel_maps(later), vessel_maps(first))
    assert (similarity.argmax(1) == np.arange(16)).mean() >= 0.8  # registration finds them


def vessel_features(u8):
    return vessel_maps(u8).reshape(len(u8), -1)


def test_nothing_to_attack(people):
    with pytest.raises(UserError, match='no release'):
        nearest_attack(people[:5], people[5:9], people[9:], pixels)(people[:0])
    flat = np.full((2, 3, 64, 64), 90, np.uint8)
    assert np.isfinite(VesselAttack(flat, flat, flat).scores(flat)[0]).all()


# -- splits -------------------------------------------------------------------------------------


def test_split_keeps_patients_together():
    patients = [f'p{i // 3}' for i in range(60)]
    roles = split_by_patient(patients, 0.5, seed=4)
    assert roles.count('member') == 30
    check_roles(patients, roles)
    assert roles == split_by_patient(patients, 0.5, seed=4) != split_by_patient(patients, 0.5)
    roles[0] = 'other' if roles[0] == 'member' else 'member'
    with pytest.raises(UserError, match='1 patients are members and others'):
        check_roles(patients, roles)
    with pytest.raises(UserError, match='empty'):
        split_by_patient(patients, 0.0)


# -- the pair attack ----------------------------------------------------------------------------


def test_standardisation_is_exact_in_little_memory() -> None:
    photos = np.random.default_rng(0).integers(0, 256, (64, 3, 64, 64), dtype=np.uint8)
    photos[:, 1] //= 7
    tracemalloc.start()
    mean, std = standardisation(photos)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    x = photos.astype(np.float64) / 127.5 - 1
    assert np.allclose(mean.flatten(), x.mean((0, 2, 3)), rtol=1e-6)
    assert np.allclose(std.flatten(), x.std((0, 2, 3)), rtol=1e-6)
    assert mean.shape == (1, 3, 1, 1) and peak < photos.nbytes  # float64 copies take 8 times it


def test_pairs_of_a_step():
    group_of = np.repeat(np.arange(6), 3)
    rng = np.random.default_rng(0)
    for _ in range(30):
        drawn = rng.permutation(18)[:6]
        rows, shown, same = step_pairs(group_of, drawn, 'published', rng)
        anchor = group_of[drawn[0]]
        assert (shown == anchor).all()
        # All members of the anchor's group, and the others as drawn, members or not.
        assert rows.tolist() == [*np.flatnonzero(group_of == anchor), *drawn[1:]]
        assert (same == (group_of[rows] == anchor)).all()
        rows, shown, same = step_pairs(group_of, drawn, 'mixed', rng)
        assert ((group_of[rows] == shown) == (same == 1)).all()
        assert same.sum() == 6 and len(rows) == 12 and (np.bincount(rows)[rows] == 2).all()


def test_an_epoch_is_a_permutation(monkeypatch):
    seen = []

    def record(group_of, drawn, pairs, rng):
        seen.append(drawn)
        return step_pairs(group_of, drawn, pairs, rng)

    monkeypatch.setattr('evaluation.attacks.pairs.step_pairs', record)
    photos = np.zeros((12, 3, 16, 16), np.uint8)
    config = PairConfig(k=2, mult_batch=2, epochs=1, image_size=16)
    attack = PairAttack(
        config, mean=torch.zeros(1, 3, 1, 1), std=torch.ones(1, 3, 1, 1), device='cpu'
    )
    attack.train_epoch(photos, photos[:4], np.arange(12) % 4)
    assert len(seen) == 3 and sorted(np.concatenate(seen)) == list(range(12))


def make_study(folder, *, published=False, n_groups=8, k=2, start=0):
    """Groups of coloured discs; each release picture is its group's mean (a release that leaks)."""
    rng = np.random.default_rng(start)
    (folder / 'photos').mkdir(parents=True)
    rows = []
    for c in range(n_groups):
        colours = rng.uniform(40, 230, (1, 3)) + rng.normal(0, 4, (k, 3))
        ids = [f'{start}_{c}_{j}' for j in range(k)]
        for i, colour in zip(ids, colours):
            Image.fromarray(
                np.broadcast_to(colour, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            ).save(folder / f'photos/{i}.png')
        mean = Image.fromarray(np.broadcast_to(colours.mean(0), (32, 32, 3)).astype(np.uint8))
        names = {
            'ours': ids[0] if published else f'ksalsa_{c:03d}',
            'centroids': f'{ids[0]}_centroids' if published else f'ksalsa_{c:03d}',
        }
        for kind, name in names.items():
            (folder / kind).mkdir(exist_ok=True)
            mean.save(folder / kind / f'{name}.png')
        rows += [(i, c + 1, k) + (() if published else (names['ours'],)) for i in ids]
    columns = ['id_code', 'centers', 'count_centers'] + ([] if published else ['release_name'])
    table = f'k{k}_nearest_df.csv' if published else 'groups.csv'
    pd.DataFrame(rows, columns=columns).to_csv(folder / table, index=False)
    return folder


def train_flags(study, kind, out, *extra):
    return [
        f'--train_df_path={study}',
        f'--train_image_path={study / "photos"}',
        f'--centroid_image_path={study / ("ours" if kind == "centroid_ours" else "centroids")}',
        f'--centroid_type={kind}',
        '--samek=2',
        f'--out_dir={out}',
        '--image_size=32',
        '--device=cpu',
        *extra,
    ]


@pytest.mark.parametrize('published', [True, False])
@pytest.mark.parametrize('kind', ['centroid_ours', 'centroid'])
def test_published_commands(tmp_path, kind, published, capsys):
    train = make_study(tmp_path / 'train', published=published, n_groups=6)
    test = make_study(tmp_path / 'test', published=published, n_groups=6, start=100)
    assert MIA_train.main(train_flags(train, kind, tmp_path / 'ck', '--epochs=2')) == 0
    checkpoint = tmp_path / 'ck' / f'{kind}_aptos_k2_1.pth'
    flags = [
        f'--test_df_path={test}',
        f'--test_image_path={test / "photos"}',
        '--samek=2',
        f'--centroid_image_path={test / ("ours" if kind == "centroid_ours" else "centroids")}',
        f'--centroid_type={kind}',
        f'--ckpt_path={checkpoint}',
        '--topk=2',
        f'--out_dir={tmp_path / "out"}',
        '--device=cpu',
    ]
    assert MIA_test.main(flags) == 0
    assert 'precision at 2' in capsys.readouterr().out
    name = f'{kind}k2_aptos_val_score_matrices49'
    scores = np.load(tmp_path / 'out' / f'{name}.npy')
    assert scores.shape == (3, 12, 2) and np.allclose(scores.sum(2), 1, atol=1e-5)
    found = json.loads((tmp_path / 'out' / f'{name}.json').read_text())
    assert found['membership']['n_members'] == 6 and found['pairs']['n_members'] == 6
    assert (tmp_path / 'out' / f'{name}_roc.png').stat().st_size > 0
    with pytest.raises(UserError, match='exists'):
        MIA_test.main(flags)


def test_the_pair_attack_learns_and_resumes_exactly(tmp_path):
    """It learns which colours belong together, also of photographs it has not seen."""
    rng = np.random.default_rng(0)
    colours = rng.uniform(40, 230, (6, 3))

    def draw(n):
        u8 = np.repeat(colours, n, 0) + rng.normal(0, 3, (n * 6, 3))
        return np.broadcast_to(u8[..., None, None], (*u8.shape, 32, 32)).astype(np.uint8)

    photos, pictures, group_of = draw(3), draw(1), np.repeat(np.arange(6), 3)
    config = PairConfig(k=3, mult_batch=4, lr=1e-3, epochs=20, image_size=32, precision='bf16')

    def new():
        mean, std = standardisation(photos)
        return PairAttack(config, mean=mean, std=std, device='cpu')

    attack = new()
    for _ in range(config.epochs):
        attack.train_epoch(photos, pictures, group_of)
        if attack.epoch == 2:
            torch.save(attack.state(), tmp_path / 'state.pt')
        if attack.epoch == 3:
            again = new()
            again.load_state(torch.load(tmp_path / 'state.pt', weights_only=True))
            again.train_epoch(photos, pictures, group_of)
            for a, b in zip(attack.net.state_dict().values(), again.net.state_dict().values()):
                assert torch.equal(a, b)
    scores = attack.scores(draw(3), pictures)[..., 1]
    own = group_of[None] == np.arange(6)[:, None]
    assert attack_metrics(scores[own], scores[~own], n_bootstrap=50)['auc']['value'] > 0.8


def test_a_person_behind_a_target_is_no_stranger():
    """Groups 0 and 1 of four are targets; the people of 2 are also in 0, those of 3 nowhere else.

    An attacker who never errs about people must reach 1.
    """
    group_of = np.repeat(np.arange(4), 5)
    people = [f'p{i}' for i in [*range(10), *range(5), *range(20, 25)]]
    member = np.isin(people, people[:10])
    scores = np.where(member, 0.9, 0.1) + np.zeros((2, 1))
    found, curves = pair_results(scores, group_of, people, 2, seed=0)
    assert found['membership']['auc']['value'] == 1
    assert found['membership']['n_others'] == 5 and found['n_neither'] == 5
    assert len(curves['in the release at all'][1]) == 5


def test_people_come_from_the_group_table_and_the_files(tmp_path):
    study = make_study(tmp_path, n_groups=4)
    table = pd.read_csv(study / 'groups.csv')
    table['patient_id'] = ['a', 'b', 'c', 'd', 'a', 'f', 'g', 'h']
    table.to_csv(study / 'groups.csv', index=False)
    shutil.copy(study / 'photos/0_1_1.png', study / 'photos/0_3_1.png')  # d and h
    files = ReleaseFiles(study, study / 'photos', study / 'ours')
    found = read_known_release(files, ['groups.csv'], 'centroid_ours', 32, ['--a', '--b', '--c'])
    assert found.people == ['a', 'b', 'c', 'd', 'a', 'f', 'g', 'd']


@pytest.fixture
def run_folder(tmp_path):
    """A study in the layout of a run of scripts/k-SALSA.py."""
    study = make_study(tmp_path / 'study', n_groups=4)
    private = tmp_path / 'run/private'
    private.mkdir(parents=True)
    shutil.move(study / 'groups.csv', private / 'groups.csv')
    shutil.move(study / 'centroids', private / 'centroids')
    shutil.move(study / 'ours', tmp_path / 'run/release/images')
    (private / 'options.json').write_text(
        json.dumps({'options': {'data_path': str(study / 'photos')}})
    )
    return tmp_path / 'run'


def test_a_run_folder_in_place_of_three_flags(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = [f'--run={run_folder}', '--samek=2', '--device=cpu']
    for kind in ('centroid_ours', 'centroid'):
        assert (
            MIA_train.main([*common, '--epochs=1', '--image_size=32', f'--centroid_type={kind}'])
            == 0
        )
        # The checkpoint is found under its published name.
        assert (
            MIA_test.main([*common, '--topk=2', '--ckpt_epochs=0', f'--centroid_type={kind}']) == 0
        )
    with pytest.raises(UserError, match='not the folder of a finished run'):
        MIA_train.main(['--run=study', '--samek=2'])


@pytest.mark.parametrize('module, part', [(MIA_train, 'train'), (MIA_test, 'test')])
def test_published_lines_get_one_hint(module, part, tmp_path, monkeypatch):
    """The published defaults are its authors' paths; what is needed is said at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        MIA_test,
        'load_pair_attack',
        lambda *_: PairAttack(
            PairConfig(image_size=32),
            mean=torch.zeros(1, 3, 1, 1),
            std=torch.ones(1, 3, 1, 1),
            device='cpu',
        ),
    )
    with pytest.raises(
        UserError,
        match=f'--{part}_df_path, --{part}_image_path, --centroid_image_path needed.*--run',
    ):
        module.main(['--samek=5', '--data=aptos', '--device=cpu'])
    assert not list(tmp_path.iterdir())


def test_resuming_compares_contents_not_paths(tmp_path, monkeypatch):
    study = make_study(tmp_path / 'train', n_groups=4)
    flags = train_flags(study, 'centroid_ours', tmp_path / 'ck', '--epochs=2')
    MIA_train.main(flags)
    study.rename(tmp_path / 'moved')
    monkeypatch.chdir(tmp_path)
    moved = [f.replace(str(study), 'moved') for f in flags]
    assert MIA_train.main(moved) == 0
    Image.new('RGB', (32, 32)).save(tmp_path / 'moved/photos/0_0_0.png')
    with pytest.raises(UserError, match='photographs: was'):
        MIA_train.main(moved)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda s: (s / 'photos/0_0_1.png').unlink(), 'have no image'),
        (lambda s: (s / 'ours/ksalsa_001.png').unlink(), 'have no picture'),
        (lambda s: (s / 'groups.csv').unlink(), 'no group table'),
        (
            lambda s: pd.read_csv(s / 'groups.csv').iloc[:2].to_csv(s / 'groups.csv', index=False),
            'at least 2',
        ),
    ],
)
def test_bad_input(tmp_path, change, message):
    study = make_study(tmp_path / 'train', n_groups=3)
    change(study)
    with pytest.raises(UserError, match=message):
        MIA_train.main(train_flags(study, 'centroid_ours', tmp_path / 'ck'))
    assert not (tmp_path / 'ck').exists()


def test_split_command(tmp_path):
    (tmp_path / 'images').mkdir()
    frame = pd.DataFrame(
        {'id_code': [f'a{i}' for i in range(12)], 'patient_id': [f'p{i // 2}' for i in range(12)]}
    )
    for shade, i in enumerate(frame.id_code):
        Image.new('RGB', (8, 8), (shade, 0, 0)).save(tmp_path / f'images/{i}.png')
    frame.to_csv(tmp_path / 'labels.csv', index=False)
    flags = [f'--df={tmp_path / "labels.csv"}', f'--out_dir={tmp_path / "split"}']
    assert split_main(flags) == 0
    parts = [pd.read_csv(tmp_path / 'split' / f'{r}.csv') for r in ('members', 'others')]
    assert sorted(pd.concat(parts).id_code) == sorted(frame.id_code)
    assert not set(parts[0].patient_id) & set(parts[1].patient_id)
    with pytest.raises(UserError, match='already'):
        split_main(flags)


@pytest.mark.parametrize('module', [MIA_train, MIA_test])
def test_help_reads_well(module, capsys):
    with pytest.raises(SystemExit):
        module.main(['--help'])
    assert '(default: centroid_ours)' in capsys.readouterr().out
