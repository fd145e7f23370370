"""A step of every training on a pretended GPU: nothing mixed, few waits (support/budgets.py)."""

import numpy as np
import pytest
import torch
from budgets import more_within_budget, within_budget
from pretended_device import PretendedGPU
from restyle_nets import make_psp, photographs
from test_content_training import Pictures as Views
from test_e4e_training import E4E, make_e4e_psp
from test_restyle_training import Pictures

from classification.settings import Settings
from classification.train import train_grader
from evaluation.attacks.pairs import PairAttack, PairConfig, standardisation
from training.augment import PIPES
from training.coach_config import CoachConfig
from training.coach_restyle_e4e import E4ECoach
from training.coach_restyle_psp import Coach
from training.moco import MocoConfig, MocoTrainer
from training.reconstruction import L2Term
from training.stylegan2_config import make_config
from training.stylegan2_loop import Trainer


class Labelled(torch.utils.data.Dataset):
    """Random pictures as the generator training takes them."""

    def __init__(self, size: int) -> None:
        self.images = photographs(6, size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], torch.zeros(0)


@pytest.mark.parametrize('precision, pipe', [(None, 'bgcfnc'), ('bf16', 'bgc'), ('fp16', 'bgc')])
def test_generator_training(gpu: PretendedGPU, precision: str | None, pipe: str) -> None:
    config = make_config(
        'auto',
        32,
        1,
        batch=2,
        batch_gpu=2,
        style_dim=16,
        n_mlp=2,
        channels={4: 8, 8: 8, 16: 8, 32: 8},
    )
    trainer = Trainer(
        Labelled(32),
        config,
        device='cuda',
        augment='fixed',
        augment_p=0.6,
        augment_names=PIPES[pipe],
        precision=precision,
    )
    for net in (trainer.g, trainer.d, trainer.g_ema):
        assert all(gpu.tag(t) == 'cuda' for t in net.state_dict().values())
    name = f'generator {precision}' if precision else 'generator'
    gpu.clear()
    trainer.step()
    within_budget(gpu, f'{name}, all penalties')
    trainer.step()
    within_budget(gpu, name)
    trainer.step()
    trainer.step()  # adjusts the strength of the augmentation
    assert gpu.n_waits <= 1 and not gpu.faults, gpu.report()
    trainer.load_state(trainer.state())
    assert not gpu.faults, gpu.report()


def test_projected_generator_training(gpu: PretendedGPU) -> None:
    config = make_config(
        'small',
        64,
        1,
        batch=2,
        batch_gpu=2,
        style_dim=16,
        channels={4: 8, 8: 8, 16: 8, 32: 8, 64: 4},
        discriminator='projected',
    )
    trainer = Trainer(
        Labelled(64),
        config,
        device='cuda',
        augment='fixed',
        augment_p=0.6,
        augment_names=PIPES['diff'],
    )
    trainer.step()
    gpu.clear()
    trainer.step()
    within_budget(gpu, 'projected')


@pytest.mark.parametrize('amp', ['no', 'bf16', 'fp16'])
def test_encoder_training(gpu: PretendedGPU, amp: str) -> None:
    coach = Coach(
        make_psp(),
        Pictures(photographs(4)),
        Pictures(photographs(3)),
        CoachConfig(batch_size=2, test_batch_size=2, n_iters=3, amp=amp, optim_name='adam'),
        device='cuda',
        losses={'l2': (L2Term(), 1.0)},
    )
    x = torch.rand(2, 3, 32, 32, device='cuda')
    coach.step(x)
    gpu.clear()
    coach.step(x)
    within_budget(gpu, 'encoder' if amp == 'no' else f'encoder {amp}')
    coach.validate()
    coach.load_state(coach.state())
    coach.export()
    assert not gpu.faults, gpu.report()


def test_e4e_training(gpu: PretendedGPU) -> None:
    coach = E4ECoach(
        make_e4e_psp(),
        Pictures(photographs(4)),
        Pictures(photographs(3)),
        CoachConfig(batch_size=2, n_iters=2, optim_name='adam', synthetic=0.5),
        device='cuda',
        losses={'l2': (L2Term(), 1.0)},
        e4e=E4E,
    )
    x = torch.rand(2, 3, 32, 32, device='cuda')
    coach.step(x)
    gpu.clear()
    coach.step(x)
    within_budget(gpu, 'e4e')


@pytest.mark.parametrize('amp', ['no', 'bf16'])
def test_content_training(gpu: PretendedGPU, amp: str) -> None:
    config = MocoConfig(
        arch='resnet18', small_stem=True, input_size=32, batch_size=2, queue_size=4, amp=amp
    )
    trainer = MocoTrainer(Views(4), config, device='cuda')
    x = torch.rand(2, 3, 32, 32, device='cuda')
    trainer.step(x)
    gpu.clear()
    trainer.step(x)
    within_budget(gpu, 'content' if amp == 'no' else f'content {amp}')
    trainer.load_state(trainer.state())
    trainer.export()
    assert not gpu.faults, gpu.report()


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
def test_grader_training(gpu: PretendedGPU, precision: str) -> None:
    images, grades = photographs(6).numpy(), np.array([0, 1, 2, 3, 4, 0])
    found = []
    for steps in (3, 6):
        settings = Settings(
            target='5-class',
            arch='resnet18',
            small_stem=True,
            image_size=32,
            epochs=1,
            batch_size=2,
            precision=precision,
            min_steps_per_epoch=steps,
        )
        gpu.clear()
        result = train_grader(images, grades, settings=settings, device='cuda')
        found.append((gpu.n_waits, gpu.n_operations))
        assert not gpu.faults, gpu.report()
    more_within_budget(gpu, found, 'grader' if precision == 'fp32' else f'grader {precision}', 3)
    result.predict(images)
    assert not gpu.faults, gpu.report()


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_pair_attack(gpu: PretendedGPU, precision: str) -> None:
    photos, groups = photographs(12).numpy(), np.repeat(np.arange(4), 3)
    mean, std = standardisation(photos)
    attack = PairAttack(
        PairConfig(k=2, mult_batch=2, epochs=2, image_size=32, precision=precision),
        mean=mean,
        std=std,
        device='cuda',
    )
    gpu.clear()
    attack.train_epoch(photos, photos[:4], groups)
    within_budget(gpu, 'pairs' if precision == 'fp32' else f'pairs {precision}', steps=3)
    attack.scores(photos, photos[:4], batch_size=8)
    attack.load_state(attack.state())
    assert not gpu.faults, gpu.report()
