"""The command of the ReStyle training."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from restyle_nets import make_psp, photographs

from datasets import pictures
from models.psp import load_psp
from scripts import train_restyle_psp
from utils.errors import UserError
from utils.io import save_torch


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A generator file and folders of pictures, as a user would have them."""
    root = tmp_path_factory.mktemp('project')
    psp = make_psp()
    save_torch(
        root / 'generator.pt', {'g_ema': psp.decoder.state_dict(), 'latent_avg': psp.latent_avg[0]}
    )
    for part, n in (('train', 8), ('test', 1)):
        (root / part / 'sub').mkdir(parents=True)
        for i, img in enumerate(photographs(n, 40)):
            Image.fromarray(img.permute(1, 2, 0).numpy()).save(root / part / 'sub' / f'{i}.png')
    return root


def command(project, exp_dir, *more):
    return [
        '--exp_dir',
        str(exp_dir),
        '--train_path',
        str(project / 'train'),
        '--test_path',
        str(project / 'test'),
        '--stylegan_weights',
        str(project / 'generator.pt'),
        '--encoder_type',
        'LightEncoder',
        '--light_width',
        '8',
        '--encoder_size',
        '32',
        '--l2_lambda',
        '1',
        '--batch_size',
        '4',
        '--max_steps',
        '2',
        '--n_iters_per_batch',
        '2',
        '--device',
        'cpu',
        *more,
    ]


def test_command_line(project, tmp_path):
    assert train_restyle_psp.main(command(project, tmp_path / 'run', '--val_interval', '1')) == 0
    psp = load_psp(tmp_path / 'run' / 'checkpoints' / 'best_model.pt')
    assert psp.input_size == 32 and psp.decoder.size == 32
    saved = torch.load(tmp_path / 'run' / 'checkpoints' / 'iteration_2.pt')
    assert set(saved) == {'state_dict', 'opts', 'latent_avg'}
    assert not any('/' in str(v) for v in saved['opts'].values())
    record = json.loads((tmp_path / 'run' / 'options.json').read_text())
    assert record['options']['encoder_type'] == 'LightEncoder' and record['inputs']
    with pytest.raises(UserError, match='already holds a run'):
        train_restyle_psp.main(command(project, tmp_path / 'run'))
    with pytest.raises(UserError, match='other settings.*l2_lambda'):
        train_restyle_psp.main(
            command(
                project, tmp_path / 'run', '--resume', '--val_interval', '1', '--l2_lambda', '2'
            )
        )
    longer = command(
        project, tmp_path / 'run', '--resume', '--val_interval', '1', '--max_steps', '3'
    )
    assert train_restyle_psp.main(longer) == 0
    assert (tmp_path / 'run' / 'checkpoints' / 'iteration_3.pt').exists()
    warm = [a for a in command(project, tmp_path / 'warm') if 'generator.pt' not in a]
    warm.remove('--stylegan_weights')
    assert (
        train_restyle_psp.main(
            [
                *warm,
                '--max_steps',
                '1',
                '--checkpoint_path',
                str(tmp_path / 'run/checkpoints/iteration_3.pt'),
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    'more,message',
    [
        (['--id_lambda', '1', '--moco_lambda', '1'], 'exclude each other'),
        (['--id_lambda', '1'], 'identity loss compares faces'),
        (['--l2_lambda', '0'], 'no reconstruction loss'),
        (['--input_nc', '3'], '6 channels'),
        (['--output_size', '64'], '--output_size 64: the generator in .* makes 32 px'),
        (['--batch_size', '9'], '8 training images are fewer than one batch of 9'),
        (['--batch_size', '3', '--accumulate', '2'], 'cannot be divided'),
        (['--amp', 'fp16'], 'needs a GPU'),
        (['--encoder_size', '40'], '--encoder_size: LightEncoder takes'),
        (['--train_path', 'no/such/folder'], 'no/such/folder'),
        (['--stylegan_weights', 'absent.pt'], 'absent.pt'),
        (['--checkpoint_path', 'absent.pt'], 'absent.pt'),
        (['--moco_lambda', '1', '--content_weights', 'absent.pth'], 'absent.pth'),
        (['--lpips_lambda', '1', '--lpips_weights', 'absent.pth'], 'absent.pth'),
        (['--resnet34_weights', 'absent.pth'], 'absent.pth'),
    ],
)
def test_bad_flags_leave_nothing_behind(project, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        train_restyle_psp.main(command(project, tmp_path / 'run', *more))
    assert not (tmp_path / 'run').exists()


def test_unset_data_paths_say_what_to_do(project, tmp_path):
    flags = [
        '--exp_dir',
        str(tmp_path / 'run'),
        '--l2_lambda',
        '1',
        '--stylegan_weights',
        str(project / 'generator.pt'),
        '--dataset_type',
        'eyepacs_encode',
    ]
    with pytest.raises(UserError, match='--train_path.*eyepacs_encode.*paths_config'):
        train_restyle_psp.main(flags)


def test_paths_follow_the_environment():
    code = (
        'from configs.data_configs import DATASETS\n'
        'from configs.paths_config import model_paths\n'
        'print(DATASETS["aptos_encode"]["train_source_root"], model_paths["moco"])'
    )
    env = {**os.environ, 'KSALSA_APTOS_TRAIN': '/data/aptos', 'KSALSA_MOCO': '/w/moco.pt'}
    output = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, env=env, text=True, capture_output=True, check=True
    ).stdout
    assert output.split() == ['/data/aptos', '/w/moco.pt']


def test_all_unreadable_pictures_are_listed(project, tmp_path):
    for i in (3, 5):
        (tmp_path / f'{i}.png').write_bytes(b'not a picture')
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / 'grey.png')
    with pytest.raises(UserError, match='(?s)2 of 3.*3.png.*5.png'):
        pictures.Pictures(tmp_path, 32)
    dataset = pictures.Pictures(project / 'train', 16)
    assert torch.equal(dataset[2, True], dataset[2].flip(2))
