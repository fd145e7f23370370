"""Content encoder training: views, InfoNCE, queue, key network, resume, processes, quality."""

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import relative_error
from moco_pictures import generator, pictures
from PIL import Image
from torch import nn
from two_processes import Together
from unit_vectors import people, units

from datasets.pictures import Pictures as TablePictures
from datasets.table import read_table
from models.features.content import load_content_network
from models.resnet import build_resnet
from scripts import train_content_encoder as script
from training.moco import (
    EXPORT_NAME,
    PROJECTION_DIM,
    MoCo,
    MocoConfig,
    MocoTrainer,
    automatic_queue,
    content_run,
    info_nce,
    key_momentum,
    learning_rate,
)
from training.sync_batchnorm import CrossProcessBatchNorm2d, share_batch_statistics
from utils import distributed
from utils.errors import UserError
from utils.images import from_uint8
from utils.io import load_weights
from utils.logs import read_jsonl


class Pictures(torch.utils.data.Dataset):
    """Random uint8 pictures as a dataset of (index, mirrored) items."""

    cached = True

    def __init__(self, n=16, size=32):
        self.names = [str(i) for i in range(n)]
        self.pixels = torch.randint(
            256, (n, 3, size, size), generator=generator(2), dtype=torch.uint8
        )

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, item):
        return self.pixels[item[0]]


def make_trainer(n=16, **settings):
    settings = {
        'arch': 'resnet18',
        'small_stem': True,
        'input_size': 32,
        'batch_size': 4,
        'queue_size': 8,
        'max_steps': 4,
        'log_interval': 1,
        'save_interval': 2,
        'learning_rate': 0.5,
        'key_momentum': 0.9,
        **settings,
    }
    return MocoTrainer(Pictures(n), MocoConfig(**settings), device='cpu')


# --- views ------------------------------------------------------------------------------------


def test_gpus_share_batch_statistics_by_the_fused_module() -> None:
    torch.manual_seed(0)
    net = build_resnet('resnet18', small_stem=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        net.train()(x)  # statistics that are not those of the beginning
        want = net.eval()(x)
        for kind, device in ((nn.SyncBatchNorm, 'cuda'), (CrossProcessBatchNorm2d, 'cpu')):
            shared = share_batch_statistics(copy.deepcopy(net), torch.device(device)).eval()
            kinds = {type(m) for m in shared.modules() if hasattr(m, 'running_mean')}
            assert kinds == {kind} and torch.equal(shared(x), want)


# --- loss, queue, key network ---------------------------------------------------------------


def test_info_nce_is_the_plain_sum():
    q, keys, own = units(5), units(12, seed=1), torch.tensor([3, 0, 11, 7, 7])
    losses, logits = info_nce(q, keys, own, 0.2)
    for i in range(5):
        e = [np.exp(float(q[i] @ keys[j]) / 0.2) for j in range(12)]
        assert losses[i].item() == pytest.approx(-np.log(e[own[i]] / sum(e)), abs=1e-5)
        assert logits[i, 2].item() == pytest.approx(float(q[i] @ keys[2]) / 0.2, abs=1e-5)


def test_queue_replaces_the_oldest():
    moco = MoCo('resnet18', small_stem=True, queue_size=8, generator=generator())
    before = moco.queue.clone()
    assert moco.queue.shape == (8, PROJECTION_DIM)
    assert torch.allclose(before.norm(dim=1), torch.ones(8))
    batches = [units(4, seed=s) for s in (1, 2, 3)]
    assert moco.enqueue(batches[0]).tolist() == [0, 1, 2, 3]
    assert torch.equal(moco.queue, torch.cat([batches[0], before[4:]]))
    assert moco.enqueue(batches[1]).tolist() == [4, 5, 6, 7]
    assert moco.enqueue(batches[2]).tolist() == [0, 1, 2, 3]
    assert torch.equal(moco.queue, torch.cat([batches[2], batches[1]]))


def test_key_network_follows_weights_and_statistics():
    moco = MoCo('resnet18', small_stem=True, queue_size=8, generator=generator()).train()
    assert moco.query.training and not moco.key.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(moco.key.state_dict().values(), moco.query.state_dict().values())
    )
    moco.query(pictures(4))  # moves the running statistics
    with torch.no_grad():
        moco.query.backbone.conv1.weight.add_(1.0)
    old = {k: v.clone() for k, v in moco.key.state_dict().items()}
    moco.follow(0.75)
    for k, q in moco.query.state_dict().items():
        want = 0.75 * old[k] + 0.25 * q if q.dtype.is_floating_point else q
        assert torch.allclose(moco.key.state_dict()[k], want, atol=1e-6), k
    assert not any(p.requires_grad for p in moco.key.parameters())


def test_one_step_by_hand():
    """The step's loss and update from plain calls on a copy of the networks."""
    trainer, other = make_trainer(), make_trainer()
    img = from_uint8(Pictures().pixels[:4])
    views = other.views(img, 0), other.views(img, 1)
    values = trainer.step(img)

    moco = other.moco.train()  # at step 0 the key network equals the query
    with torch.no_grad():
        k = moco.key(views[1])
    q = moco.query(views[0])
    keys = torch.cat([k, moco.queue[4:]])
    logits = q @ keys.T / 0.2
    loss = (logits.logsumexp(1) - logits[range(4), range(4)]).mean()
    assert values['loss'].item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    name, weight = 'backbone.layer1.0.conv1.weight', moco.query.backbone.layer1[0].conv1.weight
    want = weight - learning_rate(other.config, 0) * (weight.grad + 1e-4 * weight)
    assert learning_rate(other.config, 0) == 0.5 * 4 / 256
    got = dict(trainer.moco.query.named_parameters())[name]
    assert relative_error(got - weight, want - weight) < 1e-3
    assert torch.equal(trainer.moco.queue[:4], k)


def test_schedules():
    cfg = MocoConfig(
        batch_size=128, learning_rate=0.06, max_steps=100, warmup_steps=4, key_momentum=0.99
    )
    assert learning_rate(cfg, 0) == pytest.approx(0.03 / 4)
    assert learning_rate(cfg, 50) == pytest.approx(0.015)
    assert learning_rate(cfg, 99) < 1e-4
    assert [key_momentum(cfg, s) for s in (0, 90, 5000)] == [0.1, 0.91, 0.99]
    assert automatic_queue(4000, 64) == 1984
    assert automatic_queue(10**6, 256) == 65536
    assert automatic_queue(70, 64) == 64


# --- runs -------------------------------------------------------------------------------------


def states_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return a == b


def test_resume_is_exact_and_survives_damage(tmp_path, caplog):
    def begun(folder, save_interval=2):
        trainer = make_trainer(max_steps=3, save_interval=save_interval)
        return trainer, content_run(trainer, tmp_path / folder)

    whole, run = begun('whole', 9)
    assert run.to_the_end()
    # Stopped by the clock after one step, then gone on from there.
    first, run = begun('parts')
    assert not run.to_the_end(max_minutes=1e-9) and first.step_count == 1
    second, run = begun('parts')
    assert run.resume() and run.to_the_end()
    assert states_equal(whole.state(), second.state())
    for field in ('loss', 'top1', 'learning_rate'):
        one, two = (
            [r[field] for r in read_jsonl(tmp_path / run / 'stats.jsonl')]
            for run in ('whole', 'parts')
        )
        assert one == two and len(one) == 3
    # The last file is damaged: the one before it serves.
    last = tmp_path / 'parts' / 'checkpoints' / 'state_3.pt'
    last.write_bytes(last.read_bytes()[:1000])
    third, run = begun('parts')
    assert run.resume() and third.step_count == 2
    assert 'falling back' in caplog.text
    with pytest.raises(UserError, match='does not fit'):
        make_trainer(queue_size=12).load_state(whole.state(), source='x.pt')
    with pytest.raises(UserError, match='not a state'):
        whole.load_state({'format': 7})


def two_steps_together(folder):
    distributed.init('cpu')
    two_steps(folder)
    distributed.shutdown()


def test_two_processes_compute_what_one_does(tmp_path):
    """The same global batches by gloo; weights agree to 2e-3 of their update
    (float32 sums in another order, through two steps)."""
    both = Together(2, tmp_path / 'log', two_steps_together, tmp_path / 'two')
    start = two_steps(tmp_path / 'start', max_steps=0).moco.state_dict()
    one = two_steps(tmp_path / 'one').moco.state_dict()
    both.wait()
    two = load_weights(tmp_path / 'two' / 'checkpoints' / 'state_2.pt')['moco']

    def distance(a, b):
        return (
            sum(
                float((a[k].double() - b[k].double()).square().sum())
                for k in start
                if k.startswith('query.')
            )
            ** 0.5
        )

    assert distance(one, two) < 2e-3 * distance(one, start)
    assert (one['queue'] - two['queue']).abs().max() < 1e-3
    assert one['queue_at'] == two['queue_at'] == 0
    losses = [[r['loss'] for r in read_jsonl(tmp_path / n / 'stats.jsonl')] for n in ('one', 'two')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def two_steps(run_dir, max_steps=2):
    trainer = make_trainer(batch_size=8, queue_size=16, max_steps=max_steps, learning_rate=0.1)
    content_run(trainer, Path(run_dir)).to_the_end()
    return trainer


@pytest.mark.parametrize(
    'settings,words',
    [
        ({'batch_size': 32, 'queue_size': 32}, 'fewer than one batch'),
        ({'queue_size': 10}, 'no multiple of `batch_size`'),
        ({'batch_size': 1, 'queue_size': 8}, '2 images per process'),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(UserError, match=words):
        make_trainer(**settings)


# --- the script -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photographs')
    (folder / 'images').mkdir()
    rng = np.random.default_rng(0)
    patients, labels, eyes = people(36)
    ids = [f'{p}_{e}' for p, e in zip(patients, eyes)]
    for name in ids:
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / f'{name}.png')
    pd.DataFrame(
        {
            'id_code': ids,
            'diagnosis': labels,
            'patient_id': patients,
            'eye': eyes,
            'split': ['train'] * 30 + ['test'] * 6,
        }
    ).to_csv(folder / 'labels.csv', index=False)
    return folder


def arguments(data, out_dir, *more):
    return [
        '--data',
        str(data),
        '--out_dir',
        str(out_dir),
        '--arch',
        'resnet18',
        '--small_stem',
        '--input_size',
        '32',
        '--batch_size',
        '8',
        '--max_steps',
        '2',
        '--device',
        'cpu',
        '--log_interval',
        '1',
        *more,
    ]


def test_script_end_to_end(photographs, tmp_path):
    out = tmp_path / 'run'
    command = arguments(photographs / 'labels.csv', out, '--split', 'train', '--amp', 'bf16')
    assert script.main(command) == 0
    for name in ('curves.png', 'views.png', 'log.txt', 'options.json'):
        assert (out / name).stat().st_size > 0
    quality = json.loads((out / 'quality.json').read_text())
    assert quality['trained']['images'] == quality['untrained']['images'] == 36
    assert 0 <= quality['trained']['neighbours']['patient']['share'] <= 1
    assert 'auc' in quality['trained']['linear_probe']

    file = load_weights(out / EXPORT_NAME)
    assert (file['format'], file['arch'], file['input_size'], file['small_stem']) == (
        'k-salsa-content-encoder',
        'resnet18',
        32,
        True,
    )
    assert file['state_dict']['layer1.0.conv1.weight'].dtype == torch.float16
    assert not any(k.startswith(('fc.', 'backbone.', 'head.')) for k in file['state_dict'])
    state = load_weights(out / 'checkpoints' / 'state_2.pt')['moco']
    net = load_content_network(out / EXPORT_NAME)
    for name, value in file['state_dict'].items():
        want = state[f'key.backbone.{name}']
        assert torch.allclose(value.float(), want.float(), atol=1e-6, rtol=2e-3), name
    features = net.features(pictures(3, 48))
    assert features.shape == (3, 512)
    assert torch.allclose(features.norm(dim=1), torch.ones(3), atol=1e-5)

    with pytest.raises(UserError, match='--resume goes on in it'):
        script.main(command)
    with pytest.raises(UserError, match='hue: was 0.01, now 0.02'):
        script.main([*command, '--resume', '--hue', '0.02'])
    assert script.main([*command, '--resume']) == 0  # finished: only reports again


def test_script_takes_folders_with_labels_beside_them(photographs, tmp_path):
    out = tmp_path / 'run'
    assert (
        script.main(
            arguments(
                photographs / 'images',
                out,
                '--labels',
                str(photographs / 'labels.csv'),
                '--quality_images',
                '9',
                '--max_steps',
                '1',
            )
        )
        == 0
    )
    quality = json.loads((out / 'quality.json').read_text())
    assert quality['trained']['images'] == 9


def test_pictures_of_a_table(photographs, tmp_path):
    table = read_table(photographs / 'labels.csv')
    data = TablePictures(table, 16)
    assert len(data) == 36 and data[3].shape == (3, 16, 16) and data.names == table.ids
    assert torch.equal(data[3, True], data[3].flip(2))
    broken = tmp_path / 'images'
    broken.mkdir()
    for name in ('a', 'b'):
        (broken / f'{name}.png').write_bytes(b'nothing')
    (tmp_path / 'labels.csv').write_text('image\na\nb\n')
    with pytest.raises(UserError, match='2 of 2 images') as caught:
        TablePictures(read_table(tmp_path / 'labels.csv'), 16)
    assert 'a.png' in str(caught.value) and 'b.png' in str(caught.value)


@pytest.mark.parametrize(
    'more,words',
    [
        (['--input_size', '16'], 'at least 32 px'),
        (['--small_stem', '0'], 'needs --small_stem'),
        (['--min_area', '0'], '--min_area'),
        (['--split', 'train'], 'goes with a table'),
        (['--labels_image_dir', '.'], 'goes with --labels'),
        (['--batch_size', '64'], 'fewer than one batch'),
        (['--data', 'nowhere'], 'nowhere'),
    ],
)
def test_script_refuses(more, words, photographs, tmp_path):
    with pytest.raises(UserError, match=words):
        script.main(arguments(photographs / 'images', tmp_path / 'run', *more))
    assert not (tmp_path / 'run').exists()
