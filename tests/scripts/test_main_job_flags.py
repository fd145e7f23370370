"""Every flag of the main job once, by what it does to a small run."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load_script
from release_fixture import arguments, save_networks, save_photographs

from models.encoders import build_encoder
from models.psp import PSP, psp_checkpoint
from models.stylegan2 import Generator
from utils.errors import UserError
from utils.images import load_rgb
from utils.io import save_torch

k_salsa = load_script('k-SALSA')

# Flags with runs of their own elsewhere, which need larger networks or other photographs.
ELSEWHERE = {
    'style_mode': 'anonymization/test_lite_release.py',
    'guide': 'anonymization/test_lite_release.py',
    'guide_weight': 'anonymization/test_lite_release.py',
    'content_arch': 'anonymization/test_lite_release.py',
    'style_arch': 'anonymization/test_lite_release.py',
    'style_strides': 'anonymization/test_lite_release.py',
}
GIVEN = {'exp_dir', 'checkpoint_path', 'data_path', 'df', 'device', 'help'}
GIVEN |= {'content_weights', 'style_weights'}


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """Twelve photographs of both eyes of six people, and networks."""
    folder = tmp_path_factory.mktemp('inputs')
    save_networks(folder)
    table = save_photographs(folder / 'data', 12, patients=[f'p{i // 2}' for i in range(12)])
    table['diagnosis'] = [0, 2, 0, 2, 2, 0, 0, 2, 2, 0, 2, 0]
    table['eye'] = ['left', 'right'] * 6
    table['split'] = ['train'] * 8 + ['test'] * 4
    table.to_csv(folder / 'data/labels.csv', index=False)
    return folder


class Run:
    """A finished run, and what the tests look at."""

    def __init__(self, inputs: Path, folder: Path, *flags: str, **changes: object) -> None:
        few = {'same_k': 2, 'num_steps': 3, 'n_iters_per_batch': 1, **changes}
        assert k_salsa.main([*arguments(inputs, inputs / 'data', folder, **few), *flags]) == 0
        self.release, self.private = folder / 'release', folder / 'private'
        self.manifest = json.loads((self.release / 'manifest.json').read_text())
        self.options = json.loads((self.private / 'options.json').read_text())['options']
        eyes = pd.read_csv(inputs / 'data/labels.csv')[['id_code', 'eye']]
        self.groups = pd.read_csv(self.private / 'groups.csv').merge(eyes, on='id_code')
        self.labels = pd.read_csv(self.release / 'labels.csv')

    def latents(self) -> np.ndarray:
        return np.load(self.private / 'latents.npy')

    def losses(self) -> np.ndarray:
        return np.load(self.private / 'losses.npy')

    def pictures(self) -> np.ndarray:
        """In the order of the groups' first members; the names are drawn by chance."""
        first = self.groups[self.groups.centers > 0].drop_duplicates('centers')
        files = [self.release / 'images' / f'{name}.png' for name in first.release_name]
        return np.stack([np.asarray(load_rgb(f), np.float32) for f in files])

    def grouping(self) -> set[frozenset[str]]:
        parts = self.groups[self.groups.centers > 0].groupby('centers').id_code
        return {frozenset(ids) for _, ids in parts}

    def values(self, column: str) -> pd.Series:
        """How many different values of a column each group has."""
        return self.groups[self.groups.centers > 0].groupby('centers')[column].nunique()


@pytest.fixture(scope='module')
def plain(inputs, tmp_path_factory):
    return Run(inputs, tmp_path_factory.mktemp('plain') / 'run')


def moved(new: Run, old: Run) -> bool:
    """Whether the same groups have other pictures."""
    return new.grouping() == old.grouping() and not np.array_equal(new.pictures(), old.pictures())


def same(new: Run, old: Run) -> bool:
    return new.grouping() == old.grouping() and np.array_equal(new.pictures(), old.pictures())


# Flags -> what they do, beside a run without them.
EFFECTS = {
    '--same_k=3': lambda new, old: new.values('patient_id').min() >= 3,
    '--policy=together': lambda new, old: (
        (new.groups.groupby('patient_id').centers.nunique() == 1).all()
        and (old.groups.groupby('patient_id').centers.nunique() == 2).all()
    ),
    '--strata label': lambda new, old: (
        (new.values('diagnosis') == 1).all() and (old.values('diagnosis') > 1).any()
    ),
    '--grade_penalty=100': lambda new, old: (
        new.manifest['grade_diversity']['homogeneous']
        > old.manifest['grade_diversity']['homogeneous']
    ),
    '--reduce_dim=1': lambda new, old: new.grouping() != old.grouping(),
    '--sides=apart': lambda new, old: (
        (new.values('eye') == 1).all() and (old.values('eye') > 1).any()
    ),
    '--sides=mixed': lambda new, old: (
        (np.abs(new.latents() - old.latents()).max((1, 2)) > 0).tolist()
        == (new.groups.eye == 'left').tolist()
    ),
    '--num_crop=1': moved,
    '--num_steps=5': lambda new, old: moved(new, old) and new.losses().shape[1] == 5,
    '--content_weight=1': moved,
    '--style_weight=1': moved,
    '--lr=0.01': moved,
    '--latent_rank=2': lambda new, old: (
        new.manifest['settings']['latent_rank'] == 2 and moved(new, old)
    ),
    '--latent_rank=2 --num_steps=0 --epsilon=4 --delta=1e-3 --clip=2': lambda new, old: (
        new.manifest['noise'].items()
        >= {'epsilon': 4.0, 'delta': 1e-3, 'clip': 2.0, 'directions': 2}.items()
        and old.manifest['noise'] is None
        and moved(new, old)
    ),
    '--clustering=random': lambda new, old: (
        new.manifest['clustering'] == 'random' and new.grouping() != old.grouping()
    ),
    '--n_iters_per_batch=2': lambda new, old: not np.allclose(new.latents(), old.latents()),
    '--precision=bf16': lambda new, old: (
        new.manifest['settings']['precision'] == 'bf16' and moved(new, old)
    ),
    '--precision=tf32': lambda new, old: (
        new.manifest['settings']['precision'] == 'tf32' and same(new, old)
    ),
    '--seed=7': lambda new, old: not set(new.labels.image) & set(old.labels.image),
    '--split=train': lambda new, old: len(new.groups) == 8 and len(old.groups) == 12,
    '--n_images=10': lambda new, old: (
        new.groups.id_code.tolist() == old.groups.id_code.tolist()[:10]
    ),
    # What only says how the work is done; on a CPU groups are worked out one by one.
    '--test_batch_size=3 --test_workers=1 --group_batch=1 --deterministic': same,
    '--soft_labels --centroids --save_reconstructions --data=mine': lambda new, old: (
        set(new.labels) - set(old.labels) == {f'p{g}' for g in range(5)}
        and len(list((new.private / 'centroids').iterdir())) == new.manifest['n_images']
        and len(list((new.private / 'reconstructions').iterdir())) == 12
        and new.options['data'] == 'mine'
        and not (old.private / 'centroids').exists()
        and not (old.private / 'reconstructions').exists()
        and same(new, old)
    ),
}


@pytest.mark.parametrize('flags', EFFECTS)
def test_what_a_flag_does(inputs, plain, tmp_path, flags):
    new = Run(inputs, tmp_path / 'run', *flags.replace('=', ' ').split())
    assert EFFECTS[flags](new, plain)


def test_methods_of_grouping(inputs, tmp_path):
    save_photographs(tmp_path / 'data', 30, seed=3)
    few, groupings = {'same_k': 4, 'num_steps': 0, 'n_iters_per_batch': 1}, {}
    for method in ('default', 'published', 'mdav'):
        run = tmp_path / method
        command = arguments(inputs, tmp_path / 'data', run, clustering=method, **few)
        assert k_salsa.main(command) == 0
        assert json.loads((run / 'release/manifest.json').read_text())['clustering'] == method
        groups = pd.read_csv(run / 'private/groups.csv').groupby('centers').id_code
        groupings[method] = {frozenset(ids) for _, ids in groups}
    assert groupings['published'] != groupings['default'] != groupings['mdav']


def test_the_style_ratio_scales_the_automatic_weight(inputs, tmp_path):
    one, two = (
        Run(inputs, tmp_path / ratio, '--style_weight=auto', f'--style_ratio={ratio}')
        for ratio in ('0.05', '0.5')
    )
    assert moved(two, one)


def test_a_key_repeats_the_secret_start(inputs, plain, tmp_path):
    first = Run(inputs, tmp_path / 'first', '--start_noise=1')
    key = first.private / 'start.key'
    again = Run(inputs, tmp_path / 'again', '--start_noise=1', f'--start_key={key}')
    assert same(again, first) and moved(first, plain)


def test_surplus_photographs_are_left_out_on_demand(inputs, tmp_path):
    table = pd.read_csv(inputs / 'data/labels.csv')
    table['patient_id'] = ['many'] * 8 + ['a', 'b', 'c', 'd']
    table.to_csv(tmp_path / 'table.csv', index=False)
    with pytest.raises(UserError, match='--surplus'):
        Run(inputs, tmp_path / 'error', df=tmp_path / 'table.csv')
    run = Run(inputs, tmp_path / 'left', '--surplus=suppress', df=tmp_path / 'table.csv')
    assert run.manifest['n_suppressed'] == (run.groups.centers == 0).sum() > 0
    assert (run.values('patient_id') >= 2).all()


def test_pictures_of_the_size_of_the_encoder(inputs, tmp_path):
    torch.manual_seed(1)
    channels = dict.fromkeys((4, 8, 16, 32, 64), 8)
    psp = PSP(
        build_encoder('LightEncoder', n_styles=10, input_size=32, style_dim=16, width=8),
        Generator(64, style_dim=16, n_mlp=2, channels=channels),
        0.1 * torch.randn(16),
        32,
    )
    save_torch(tmp_path / 'psp.pt', psp_checkpoint(psp, {}))
    for flags, side in (([], 64), (['--resize_outputs'], 32)):
        run = Run(inputs, tmp_path / str(side), *flags, checkpoint_path=tmp_path / 'psp.pt')
        assert run.pictures().shape[1:] == (side, side, 3)


def test_the_card_stands_in_the_readme(inputs, plain, tmp_path):
    (tmp_path / 'card.yaml').write_text('creator: Only for this test\n')
    run = Run(inputs, tmp_path / 'run', f'--card={tmp_path / "card.yaml"}')
    assert 'Only for this test' in (run.release / 'README.md').read_text()
    assert 'Only for this test' not in (plain.release / 'README.md').read_text()


def test_published_flags_without_effect(inputs, plain, tmp_path, capsys):
    flags = [f'--{name}=x' for name in k_salsa._NO_EFFECT]
    assert same(Run(inputs, tmp_path / 'run', *flags), plain)
    said = capsys.readouterr().err
    assert all(f'--{name} has no effect' in said for name in k_salsa._NO_EFFECT)


def test_every_flag_is_tried():
    here = Path(__file__).read_text(encoding='utf-8')
    for action in k_salsa.build_parser()._actions:
        name = action.dest
        if name in ELSEWHERE:
            assert name in (ROOT / 'tests' / ELSEWHERE[name]).read_text(encoding='utf-8'), name
        elif name not in GIVEN | {*k_salsa._NO_EFFECT}:
            assert f'--{name}' in here or f"'{name}'" in here, name
