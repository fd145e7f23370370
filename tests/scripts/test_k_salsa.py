"""The main job end to end on tiny networks: promises, resume after a kill, processes, bad input."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load_script
from PIL import Image
from release_fixture import arguments, save_networks, save_photographs, tree_bytes

from anonymization import grouped, inversion, optimisation, pipeline
from anonymization.photographs import copies
from datasets.people import merge_duplicates
from utils.errors import PrivacyError, UserError
from utils.images import load_rgb

k_salsa = load_script('k-SALSA')


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp('nets')
    save_networks(folder)
    return folder


@pytest.fixture(scope='module')
def thirteen(nets, tmp_path_factory):
    """A finished run with n = 13, k = 5, where the published code breaks its promise."""
    folder = tmp_path_factory.mktemp('thirteen')
    save_photographs(folder / 'data', 13)
    assert (
        k_salsa.main(
            arguments(nets, folder / 'data', folder / 'run') + ['--centroids', '--soft_labels']
        )
        == 0
    )
    return folder


def test_thirteen_images_in_groups_of_five(thirteen):
    groups = pd.read_csv(thirteen / 'run/private/groups.csv')
    assert list(groups.columns[:4]) == ['id_code', 'centers', 'count_centers', 'release_name']
    assert list(groups.id_code) == list(pd.read_csv(thirteen / 'data/labels.csv').id_code)
    sizes = groups.groupby('centers').id_code.nunique()
    assert sizes.min() >= 5 and sizes.sum() == 13
    assert (groups.count_centers == groups.centers.map(sizes)).all()
    images = {p.stem for p in (thirteen / 'run/release/images').iterdir()}
    assert images == set(groups.release_name) and len(images) == len(sizes)


def test_optimisation_starts_from_exactly_the_groups(thirteen, nets):
    """The picture of the mean of the group's own latents is the group's centroid picture."""
    from models.psp import load_psp

    groups = pd.read_csv(thirteen / 'run/private/groups.csv')
    latents = torch.tensor(np.load(thirteen / 'run/private/latents.npy'))
    psp = load_psp(nets / 'psp.pt')
    for name, part in groups.groupby('release_name'):
        mean = latents[part.index.tolist()].mean(0, keepdim=True)
        want = psp.decode(mean)[0].mul(127.5).add(127.5).round().clamp(0, 255)
        got = np.asarray(load_rgb(thirteen / f'run/private/centroids/{name}.png'))
        assert np.abs(got.transpose(2, 0, 1) - want.numpy()).max() <= 1


def test_release_holds_no_trace_of_sources(thirteen):
    for path, data in tree_bytes(thirteen / 'run/release').items():
        assert 'eye0' not in path and b'eye0' not in data, path
        assert str(thirteen).encode() not in data, path
    assert (thirteen / 'run/private').stat().st_mode & 0o077 == 0
    labels = pd.read_csv(thirteen / 'run/release/labels.csv')
    assert list(labels.columns) == ['image', 'label', *(f'p{g}' for g in range(5))]
    assert list(labels.image) == sorted(labels.image)
    groups = pd.read_csv(thirteen / 'run/private/groups.csv').groupby('release_name')
    for row in labels.itertuples():
        counts = np.bincount(groups.get_group(row.image).diagnosis, minlength=5)
        assert row.label == counts.argmax()
        assert row.p0 == pytest.approx(counts[0] / counts.sum(), abs=1e-6)


def test_manifest_and_report(thirteen):
    release = thirteen / 'run/release'
    manifest = json.loads((release / 'manifest.json').read_text())
    assert manifest['k'] == 5 and manifest['unit'] == 'images' and manifest['n_images'] == 2
    assert sum(manifest['patients_per_group'].values()) == 2
    assert manifest['networks']['style'] == 'filters'
    page = (release / 'report.html').read_text()
    assert 'http' not in page.replace('http-equiv', '')  # opens without a network
    assert 'Differential privacy is not claimed' in page
    assert 'no patient column' in (release / 'DATASHEET.md').read_text()
    assert 'photographs are counted' in (thirteen / 'run/private/audit.json').read_text()


def test_second_start_changes_nothing(thirteen, nets, caplog):
    before = tree_bytes(thirteen / 'run')
    command = arguments(nets, thirteen / 'data', thirteen / 'run') + [
        '--centroids',
        '--soft_labels',
    ]
    assert k_salsa.main(command) == 0
    assert tree_bytes(thirteen / 'run') == before
    with pytest.raises(UserError, match='num_steps: was 4, now 7'):
        k_salsa.main([*command, '--num_steps=7'])
    assert tree_bytes(thirteen / 'run') == before


def test_patients_are_counted(nets, tmp_path):
    save_photographs(tmp_path / 'data', 24, patients=[f'person{i // 2}' for i in range(24)])
    k_salsa.main(arguments(nets, tmp_path / 'data', tmp_path / 'run'))
    groups = pd.read_csv(tmp_path / 'run/private/groups.csv')
    people = groups.groupby('centers').patient_id.agg(['nunique', 'size'])
    assert (people['nunique'] >= 5).all() and (people['nunique'] == people['size']).all()


def run_process(command, **options):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'scripts/k-SALSA.py'), *command],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_killed_run_ends_with_the_same_bytes(nets, tmp_path):
    """kill -9 once during inversion and once during optimisation."""
    save_photographs(tmp_path / 'data', 13)
    options = {'test_batch_size': 2, 'num_steps': 60, 'group_batch': 1}
    assert k_salsa.main(arguments(nets, tmp_path / 'data', tmp_path / 'a', **options)) == 0
    command = arguments(nets, tmp_path / 'data', tmp_path / 'b', **options)
    for pattern in ('inversion_000001.pt', 'groups_000000.pt'):
        process = run_process(command)
        while not (tmp_path / 'b/private/work' / pattern).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / 'b/release').exists()
    assert k_salsa.main(command) == 0
    assert tree_bytes(tmp_path / 'b/release') == tree_bytes(tmp_path / 'a/release')


def test_identical_photographs_are_one_person(nets, tmp_path):
    assert merge_duplicates(None, ['a', 'b', 'a']) == [0, 1, 0]
    assert copies(['a', 'b', 'a'], ['z', 'x', 'y']).tolist() == [True, False, False]
    assert merge_duplicates(['p', 'q', 'r', 'p'], ['a', 'b', 'b', 'c']) == [0, 1, 1, 0]
    save_photographs(tmp_path / 'data', 12)
    images = tmp_path / 'data/images'
    # The same picture, in a file of other bytes.
    Image.open(images / 'eye000x.png').save(images / 'eye010x.png', compress_level=1)
    assert (images / 'eye000x.png').read_bytes() != (images / 'eye010x.png').read_bytes()
    k_salsa.main(arguments(nets, tmp_path / 'data', tmp_path / 'run'))
    groups = pd.read_csv(tmp_path / 'run/private/groups.csv').set_index('id_code').centers
    # One photograph in one group, and in one picture.
    assert groups['eye000x'] > 0 and groups['eye010x'] == 0 and (groups == 0).sum() == 1
    manifest = json.loads((tmp_path / 'run/release/manifest.json').read_text())
    assert manifest['n_suppressed'] == 1


def test_reconstructions_of_ids_with_dots(nets, tmp_path):
    table = save_photographs(tmp_path / 'data', 10)
    images = tmp_path / 'data/images'
    names = [f'1.2.840.{i}' for i in range(10)]
    for old, new in zip(table.id_code, names):
        (images / f'{old}.png').rename(images / f'{new}.png')
    table.assign(id_code=names).to_csv(tmp_path / 'data/labels.csv', index=False)
    k_salsa.main([*arguments(nets, tmp_path / 'data', tmp_path / 'run'), '--save_reconstructions'])
    found = {p.name for p in (tmp_path / 'run/private/reconstructions').iterdir()}
    assert found == {f'{n}.png' for n in names}


def test_together_weighs_people(nets, tmp_path):
    """A patient with many photographs counts as much in the average as one with a single one."""
    patients = ['many'] * 9 + [f'person{i}' for i in range(6)]
    save_photographs(tmp_path / 'data', 15, patients=patients)
    k_salsa.main(
        arguments(nets, tmp_path / 'data', tmp_path / 'run', policy='together', num_steps=0)
    )
    groups = pd.read_csv(tmp_path / 'run/private/groups.csv')
    latents = np.load(tmp_path / 'run/private/latents.npy')
    centre = np.load(tmp_path / 'run/private/group_latents.npy')[0]
    members = groups[groups.centers == 1]
    assert len(members) == 15
    want = np.mean([latents[part.index].mean(0) for _, part in members.groupby('patient_id')], 0)
    assert np.allclose(centre, want, atol=1e-6)


def test_other_pictures_are_read(nets, tmp_path):
    """16-bit, greyscale, RGBA and palette files are photographs too."""
    save_photographs(tmp_path / 'data', 10)
    images = tmp_path / 'data/images'
    grey = Image.open(images / 'eye000x.png').convert('L')
    grey.save(images / 'eye000x.png')
    Image.open(images / 'eye001x.png').convert('RGBA').save(images / 'eye001x.png')
    wide = np.asarray(grey).astype(np.uint16) * 257
    Image.fromarray(wide).save(images / 'eye002x.png')
    Image.open(images / 'eye003x.png').convert('P').save(images / 'eye003x.png')
    assert k_salsa.main(arguments(nets, tmp_path / 'data', tmp_path / 'run')) == 0


def spoil(case, nets, data):
    """Makes one input bad; returns changed flags."""
    images, csv = data / 'images', data / 'labels.csv'
    table = pd.read_csv(csv)
    if case == 'no folder':
        return {'data_path': data / 'nowhere'}
    if case == 'no table':
        return {'df': data / 'nowhere.csv'}
    if case == 'no id column':
        table.rename(columns={'id_code': 'picture'}).to_csv(csv, index=False)
    if case == 'ids without files':
        (images / 'eye003x.png').unlink()
        (images / 'eye004x.png').unlink()
    if case == 'duplicate ids':
        pd.concat([table, table.iloc[:1]]).to_csv(csv, index=False)
    if case == 'broken images':
        whole = (images / 'eye001x.png').read_bytes()
        (images / 'eye001x.png').write_bytes(whole[: len(whole) // 2])
        (images / 'eye002x.png').write_text('hello')
    if case == 'not a checkpoint':
        (data / 'x.pt').write_bytes(b'no weights')
        return {'checkpoint_path': data / 'x.pt'}
    if case == 'pickle':
        torch.save({'state_dict': object}, data / 'x.pt')
        return {'checkpoint_path': data / 'x.pt'}
    if case == 'wrong generator':
        state = torch.load(nets / 'psp.pt', weights_only=True)
        from models.stylegan2 import Generator

        large = Generator(
            64, style_dim=16, n_mlp=2, channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 8}
        ).state_dict()
        state['state_dict'] = {
            k: v for k, v in state['state_dict'].items() if k.startswith('encoder.')
        }
        state['state_dict'] |= {f'decoder.{k}': v for k, v in large.items()}
        torch.save(state, data / 'x.pt')
        return {'checkpoint_path': data / 'x.pt'}
    if case == 'k above n':
        return {'same_k': 12}
    if case == 'k of one':
        return {'same_k': 1}
    if case == 'no content network':
        return {'content_weights': data / 'none.pt'}
    if case == 'no style network':
        return {'style_weights': data / 'none.pth'}
    if case == 'too many patches':
        return {'num_crop': 99}
    return {}


@pytest.mark.parametrize(
    ('case', 'message'),
    [
        ('no folder', 'image folder not found(.|\n)*nowhere'),
        ('no table', 'table not found(.|\n)*nowhere.csv'),
        ('no id column', 'has no id column'),
        ('ids without files', '2 of 11 ids(.|\n)*eye003x(.|\n)*eye004x'),
        ('duplicate ids', 'duplicate ids(.|\n)*eye000x'),
        ('broken images', '2 of 11 images(.|\n)*eye001x(.|\n)*eye002x'),
        ('not a checkpoint', 'x.pt is not a ReStyle-pSp checkpoint'),
        ('pickle', 'x.pt is not a ReStyle-pSp checkpoint this tool will load'),
        ('wrong generator', 'does not fit a generator with 10 styles'),
        ('k above n', '--same_k 12: the table has only 11 images'),
        ('k of one', '--same_k 1'),
        ('no content network', 'none.pt(.|\n)*--content_weights'),
        ('no style network', 'none.pth(.|\n)*--style_weights'),
        ('too many patches', '--num_crop 99'),
    ],
)
def test_bad_input(nets, tmp_path, case, message):
    data = tmp_path / 'data'
    save_photographs(data, 11)
    changed = spoil(case, nets, data)
    with pytest.raises(UserError, match=message):
        k_salsa.main(arguments(nets, data, tmp_path / 'run', **changed))
    assert not (tmp_path / 'run/release').exists()
    assert case == 'broken images' or not (tmp_path / 'run').exists()


def test_message_and_exit_code_of_a_bad_run(nets, tmp_path):
    save_photographs(tmp_path / 'data', 11)
    process = run_process(arguments(nets, tmp_path / 'data', tmp_path / 'run', same_k=1))
    assert process.wait() == 2
    assert process.stderr.read().strip().splitlines()[-1].startswith('error: --same_k 1')


def test_full_disk_leaves_nothing_half_written(nets, tmp_path, monkeypatch, thirteen):
    save_photographs(tmp_path / 'data', 13)
    real, calls = optimisation.save_torch, []

    def full(path, obj):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        real(path, obj)

    for module in (inversion, optimisation):
        monkeypatch.setattr(module, 'save_torch', full)
    command = arguments(nets, tmp_path / 'data', tmp_path / 'run') + [
        '--centroids',
        '--soft_labels',
    ]
    with pytest.raises(OSError, match='No space left'):
        k_salsa.main(command)
    assert not (tmp_path / 'run/release').exists()
    for module in (inversion, optimisation):
        monkeypatch.setattr(module, 'save_torch', real)
    assert k_salsa.main(command) == 0
    assert tree_bytes(tmp_path / 'run/release') == tree_bytes(thirteen / 'run/release')


def test_a_broken_grouping_stops_the_run(nets, tmp_path, monkeypatch):
    """A fault in the grouping must not reach the release."""
    save_photographs(tmp_path / 'data', 11)
    real = grouped.assign_groups

    def stolen(*args, **kwargs):
        found = real(*args, **kwargs)
        found.numbers[np.flatnonzero(found.numbers == 1)[:-4]] = 2
        return found

    monkeypatch.setattr(grouped, 'assign_groups', stolen)
    with pytest.raises(PrivacyError, match='fewer than'):
        k_salsa.main(arguments(nets, tmp_path / 'data', tmp_path / 'run'))
    assert not (tmp_path / 'run/release').exists()


def test_a_release_that_fails_verification_is_not_published(nets, tmp_path, monkeypatch):
    save_photographs(tmp_path / 'data', 11)

    def leak(run, groups, n_batches, staging):
        manifest = write(run, groups, n_batches, staging)
        shutil.copy(run.table.paths[0], next((staging / 'images').iterdir()))
        return manifest

    write = pipeline.write
    monkeypatch.setattr(pipeline, 'write', leak)
    with pytest.raises(PrivacyError, match='a picture is not 32 px'):
        k_salsa.main(arguments(nets, tmp_path / 'data', tmp_path / 'run'))
    assert not (tmp_path / 'run/release').exists()


def test_published_flags(nets, tmp_path):
    """The README command of the published code, with paths changed."""
    save_photographs(tmp_path / 'data', 11)
    command = (
        f'--checkpoint_path={nets}/psp.pt --exp_dir={tmp_path}/run --same_k=5 '
        f'--data_path={tmp_path}/data/images --df={tmp_path}/data/labels.csv --data=aptos '
        '--test_batch_size=5 --test_workers=1 --n_iters_per_batch=5 --num_steps=2 '
        '--num_crop=4 --content_weight=1e2 --style_weight=1e-6 --layer_idx=3'
    ).split()
    local = [f'--content_weights={nets}/content.pt', '--style_weights=filters']
    assert k_salsa.main([*command, *local]) == 0
