"""Fidelity statistics against torch-fidelity's own functions, and the promises around them."""

import json
import logging
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import load_script
from PIL import Image, ImageFilter
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from two_processes import run_in_one_and_two

from datasets.archive import ArchiveWriter, ImageArchive
from datasets.phantoms import render_phantom
from evaluation.features import InceptionNetwork, extract_features, read_pictures
from evaluation.fidelity import (
    feature_statistics,
    fidelity,
    frechet_distance,
    kernel_distance,
    neighbourhood_scores,
)
from evaluation.snapshots import training_metric
from evaluation.spectra import radial_spectrum, sharpness
from models.features.content import content_checkpoint, load_content_network
from models.features.pretrained import load_feature_network
from models.resnet import build_resnet
from models.stylegan2.model import Generator
from utils.errors import UserError
from utils.io import save_torch
from utils.logs import read_jsonl


def samples(n_real, n_fake, dim, shift=0.3):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(dim, dim)) / dim**0.5
    return (
        rng.normal(size=(n_real, dim)) @ mix,
        rng.normal(size=(n_fake, dim)) @ mix * 1.2 + shift,
    )


@pytest.fixture(scope='module')
def content_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('content') / 'content.pt'
    net = build_resnet('resnet18', small_stem=True)
    save_torch(path, content_checkpoint(net, arch='resnet18', input_size=32, small_stem=True))
    return path


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Noise pictures of 40 px, and blurred ones."""
    root = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for kind in ('real', 'fake'):
        (root / kind).mkdir()
        for i in range(14):
            image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            if kind == 'fake':
                image = image.filter(ImageFilter.GaussianBlur(1))
            image.save(root / kind / f'{i:02d}.png')
    return root / 'real', root / 'fake'


@pytest.mark.parametrize('n_real,n_fake', [(200, 150), (20, 30)])
def test_frechet_distance_agrees_with_the_library(n_real, n_fake):
    real, fake = samples(n_real, n_fake, 24)
    a, b = feature_statistics(real), feature_statistics(fake)
    want = fid_statistics_to_metric(
        {'mu': a[0], 'sigma': a[1]}, {'mu': b[0], 'sigma': b[1]}, False
    )['frechet_inception_distance']
    assert frechet_distance(*a, *b) == pytest.approx(want, rel=1e-6)
    assert fidelity(real, fake, n_bootstrap=2)['fd']['value'] == pytest.approx(want, rel=1e-6)


def test_frechet_distance_of_equal_statistics_is_zero():
    a = feature_statistics(samples(50, 50, 8)[0])
    assert frechet_distance(*a, *a) == pytest.approx(0, abs=1e-10)


def test_kernel_distance_agrees_with_the_library():
    real, fake = samples(60, 60, 12)
    want = kid_features_to_metric(
        torch.from_numpy(real),
        torch.from_numpy(fake),
        kid_subsets=1,
        kid_subset_size=60,
        verbose=False,
    )
    assert kernel_distance(real, fake) == pytest.approx(
        want['kernel_inception_distance_mean'], rel=1e-9
    )


def test_precision_and_recall_agree_with_the_library():
    real, fake = samples(80, 50, 6, shift=0.8)
    precision, recall = calculate_precision_recall_full(
        torch.from_numpy(fake), torch.from_numpy(real)
    )
    terms = neighbourhood_scores(real, fake)
    assert terms['precision'].mean() == pytest.approx(precision)
    assert terms['recall'].mean() == pytest.approx(recall)
    assert 0 < precision < 1 and 0 < recall < 1


def test_density_and_coverage_of_the_same_and_of_far_pictures():
    real, fake = samples(100, 100, 4, shift=0)
    near, far = neighbourhood_scores(real, real), neighbourhood_scores(real, fake + 100)
    assert near['coverage'].mean() == 1 and near['density'].mean() > 0.9
    assert far['coverage'].mean() == 0 and far['density'].mean() == 0


def test_fidelity_does_not_depend_on_the_order():
    real, fake = samples(60, 40, 10)
    rng = np.random.default_rng(1)
    a = fidelity(real, fake, n_bootstrap=20)
    b = fidelity(rng.permutation(real), rng.permutation(fake), n_bootstrap=20)
    assert a == b


def test_intervals_and_yardstick():
    real, fake = samples(120, 60, 5, shift=1.0)
    found = fidelity(real, fake, n_bootstrap=50)
    for name in ('fd', 'kid', 'precision', 'recall', 'density', 'coverage'):
        assert found[name]['low'] <= found[name]['value'] <= found[name]['high']
    assert found['fd']['low'] > found['real_split']['fd']
    assert found['kid']['low'] > found['real_split']['kid']
    assert (found['real_split']['n_reference'], found['real_split']['n_sample']) == (60, 60)
    assert fidelity(real, real[:60], n_bootstrap=5)['fd']['value'] < found['fd']['value']


def test_few_pictures_for_the_dimension_warn(caplog):
    real, fake = samples(30, 20, 25)
    with caplog.at_level(logging.WARNING):
        assert fidelity(real, fake, n_bootstrap=2)['rank_deficient']
    assert '20 synthetic pictures for 25 feature dimensions' in caplog.text


def test_too_few_pictures():
    real, fake = samples(30, 5, 4)
    with pytest.raises(UserError, match='5 synthetic pictures are too few'):
        fidelity(real, fake)


def test_features_do_not_depend_on_the_batch(content_file, folders):
    network = load_content_network(content_file)
    pictures = read_pictures(folders[0], 40)
    one, all_at_once = (extract_features(network, pictures, batch_size=b) for b in (1, 32))
    assert one.shape == (14, 512)
    np.testing.assert_allclose(one, all_at_once, atol=1e-5)


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / 'stripes.png')
    assert np.abs(read_pictures(tmp_path, 16).astype(int) - 128).max() < 40


def test_sharpness_tells_blur(folders):
    real, fake = (read_pictures(f, 40) for f in folders)
    assert sharpness(real, real)['high_frequency_ratio'] == pytest.approx(1)
    assert sharpness(real, fake)['high_frequency_ratio'] < 0.1
    assert sharpness(real, real)['log_spectrum_rmse'] == 0


def test_contact_sheets_do_not_count(folders, tmp_path):
    command = load_script('calc_metrics').main
    folders = [shutil.copytree(f, tmp_path / f.name) for f in folders]
    out = tmp_path / 'scores.jsonl'
    sheet = Image.new('RGB', (100, 100), 'red')
    sheet.save(folders[1] / 'grid.png')
    assert command([*map(str, folders), '--out', str(out)]) == 0
    (folders[1] / 'grid.png').unlink()
    assert command([*map(str, folders), '--out', str(out)]) == 0
    first, second = read_jsonl(out)
    assert first == second and first['n_synthetic'] == len(list(folders[1].iterdir()))
    sheet.save(folders[1] / 'overview.png')
    with pytest.raises(UserError, match='alone(.|\n)*overview.png: 100x100'):
        command([*map(str, folders)])


def test_spectrum_peaks_at_the_frequency_of_a_wave():
    wave = 127 + 100 * np.sin(2 * np.pi * 5 * np.arange(32) / 32)
    picture = np.broadcast_to(wave, (1, 3, 32, 32)).astype(np.uint8)
    assert radial_spectrum(picture).argmax() == 5


def test_calc_metrics_command(content_file, folders, tmp_path, capsys):
    script = load_script('calc_metrics')
    out = tmp_path / 'metrics.jsonl'
    arguments = [
        *map(str, folders),
        '--content_weights',
        str(content_file),
        '--device',
        'cpu',
        '--n_bootstrap',
        '3',
        '--out',
        str(out),
    ]
    assert script.main(arguments) == 0
    assert script.main([*arguments, '--batch_size', '5']) == 0
    printed = capsys.readouterr().out
    assert 'FD-fundus' in printed and 'n = 14 real, 14 synthetic' in printed
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first['fundus']['fd']['value'] == pytest.approx(
        second['fundus']['fd']['value'], rel=1e-3
    )
    assert first['spectrum']['high_frequency_ratio'] < 0.1


def test_distances_without_further_files(tmp_path, capsys):
    for seed, name in enumerate(('real', 'release/images')):
        (tmp_path / name).mkdir(parents=True)
        for p in range(8):
            eye = render_phantom(seed=seed, patient=p, eye='left', visit=0, grade=0, size=64)
            Image.fromarray(eye.image).save(tmp_path / name / f'{p}.png')
    script = load_script('calc_metrics')
    flags = [
        str(tmp_path / 'real'),
        str(tmp_path / 'release/images'),
        '--device=cpu',
        '--n_bootstrap=3',
        f'--out={tmp_path / "out.jsonl"}',
    ]
    assert script.main(flags) == 0
    printed = capsys.readouterr().out
    for word in ('FD-lite1', 'KID-lite1', 'coverage (lite1)', 'vessel length', 'fine texture'):
        assert word in printed
    (found,) = read_jsonl(tmp_path / 'out.jsonl')
    assert 0.5 < found['detail']['area']['value'] < 2 and found['lite1']['fd']['value'] > 0
    (tmp_path / 'release' / 'manifest.json').write_text(
        json.dumps({'networks': {'style': f'lite1 {load_feature_network("lite1").digest}'}})
    )
    with pytest.raises(UserError, match='made with lite1, which may not judge it alone'):
        script.main(flags)
    assert script.main([*flags, '--metrics=features', '--features', 'lite1', 'lite0']) == 0
    assert "FD-lite1, the maker's" in capsys.readouterr().out


def test_missing_weights_name_the_file_and_the_flag(folders, tmp_path):
    script = load_script('calc_metrics')
    with pytest.raises(UserError, match='--content_weights'):
        script.main([*map(str, folders), '--metrics', 'fundus'])
    with pytest.raises(UserError, match='pt_inception.*--inception_weights'):
        script.main([*map(str, folders), '--metrics', 'inception'])
    with pytest.raises(UserError, match='not found.*pt_inception'):
        InceptionNetwork(tmp_path / 'missing.pth')
    save_torch(tmp_path / 'other.pth', {'a': torch.zeros(1)})
    with pytest.raises(UserError, match='Inception network of FID'):
        InceptionNetwork(tmp_path / 'other.pth')
    with pytest.raises(UserError, match='choose from'):
        script.main([*map(str, folders), '--metrics', 'fvd'])


def test_training_metric(content_file, folders, tmp_path, monkeypatch):
    with ArchiveWriter(tmp_path / 'data.zip') as writer:
        for picture in read_pictures(folders[0], 32):
            writer.add(Image.fromarray(picture.transpose(1, 2, 0)))
    torch.manual_seed(0)
    generator = Generator(32, channels={4: 8, 8: 8, 16: 8, 32: 8}, n_mlp=2, style_dim=16).eval()
    metric = training_metric(
        ['fd_fundus', 'kid_fundus'],
        ImageArchive(tmp_path / 'data.zip'),
        n_images=10,
        content_weights=content_file,
    )
    values = metric(generator, torch.device('cpu'))
    assert values == metric(generator, torch.device('cpu'))
    assert set(values) == {'fd_fundus', 'kid_fundus'} and values['fd_fundus'] > 0

    # With a folder, another process reads no picture again; mirror images never count.
    def build() -> Callable:
        mirrored = ImageArchive(tmp_path / 'data.zip', mirror=True)
        return training_metric(
            ['fd_fundus', 'kid_fundus'], mirrored, n_images=10, content_weights=content_file
        )

    assert build()(generator, torch.device('cpu'), tmp_path / 'run') == values
    (kept,) = (tmp_path / 'run').iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(ImageArchive, 'images', None)
        assert build()(generator, torch.device('cpu'), tmp_path / 'run') == values
    kept.write_bytes(kept.read_bytes()[:100])
    assert build()(generator, torch.device('cpu'), tmp_path / 'run') == values
    with pytest.raises(UserError, match='unknown metric'):
        training_metric(['is'], None, n_images=1)
    with pytest.raises(UserError, match='`inception_weights`'):
        training_metric(['fid'], None, n_images=1)


METRIC = """
import json, torch
from pathlib import Path
from datasets.archive import ImageArchive
from evaluation import snapshots
from models.stylegan2 import Generator
from utils import distributed

device = distributed.init('cpu')
torch.manual_seed(0)
generator = Generator(32, channels={4: 8, 8: 8, 16: 8, 32: 8}, n_mlp=2, style_dim=16).eval()
out = Path(sys.argv[1])
snapshots._PART, counts = 4, [0]
images = ImageArchive.images
def counted(self, part):
    counts[0] += len(part)
    return images(self, part)
ImageArchive.images = counted
for _ in range(2):
    metric = snapshots.training_metric(
        ['fd_fundus', 'kid_fundus'],
        ImageArchive(out.parent / 'data.zip'),
        n_images=10,
        content_weights=Path((out.parent / 'weights').read_text()),
        batch_size=2,
    )
    values = metric(generator, device, out)
    assert bool(values) == distributed.is_main()
read = distributed.all_gather_object(counts[0])
if distributed.is_main():
    (out / 'found.json').write_text(json.dumps([read, values]))
distributed.shutdown()
"""


def test_processes_share_the_metric_of_a_snapshot(content_file, folders, tmp_path):
    with ArchiveWriter(tmp_path / 'data.zip') as writer:
        for picture in read_pictures(folders[0], 32):
            writer.add(Image.fromarray(picture.transpose(1, 2, 0)))
    (tmp_path / 'weights').write_text(str(content_file))
    for n in '12':
        (tmp_path / n).mkdir()
    run_in_one_and_two(METRIC, tmp_path)
    one, two = (json.loads((tmp_path / n / 'found.json').read_text()) for n in '12')
    assert two[1] == one[1]
    assert len(two[0]) == 2 and min(two[0]) > 0 and sum(two[0]) == one[0][0]  # once, and kept


def test_people_are_the_unit_of_the_photographs():
    """Six like photographs of everybody are no more evidence than one, and split no better."""
    rng = np.random.default_rng(5)
    single, fake = rng.normal(size=(60, 4)), rng.normal(0.3, 1, (200, 4))
    real = single.repeat(6, 0) + rng.normal(0, 1e-3, (360, 4))
    people = np.repeat(np.arange(60), 6)
    blind, aware = (fidelity(real, fake, real_people=p) for p in (None, people))
    assert aware['fd']['value'] == blind['fd']['value']
    for name in ('fd', 'kid', 'recall'):
        width = [r[name]['high'] - r[name]['low'] for r in (blind, aware)]
        assert width[1] > 1.3 * width[0], name
    # With the same people on both sides the halves look more alike than people are.
    assert aware['real_split']['fd'] > 1.3 * blind['real_split']['fd']
    shuffled = rng.permutation(360)
    assert fidelity(real[shuffled], fake, real_people=people[shuffled]) == aware
