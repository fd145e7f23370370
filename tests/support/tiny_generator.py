"""A generator training of 32 px, and discs to learn."""

import numpy as np
import torch

from training.augment import PIPES
from training.stylegan2_config import make_config
from training.stylegan2_loop import Trainer

CHANNELS = {4: 8, 8: 8, 16: 8, 32: 8}


def tiny_config(**overrides):
    values = dict(
        batch=4,
        channels=CHANNELS,
        style_dim=16,
        g_reg_interval=2,
        d_reg_interval=2,
        pl_weight=2.0,
        use_noise=True,
    )
    return make_config('small', 32, 1, **{**values, **overrides})


class Discs(torch.utils.data.Dataset):
    """Bright discs of varying place and colour on black."""

    def __init__(self, n):
        rng = np.random.default_rng(0)
        y, x = np.mgrid[:32, :32]
        self.items = []
        for _ in range(n):
            cx, cy = rng.uniform(8, 24, 2)
            inside = (x - cx) ** 2 + (y - cy) ** 2 < 36
            colour = rng.integers(60, 255, 3)
            self.items.append(torch.from_numpy((inside * colour[:, None, None]).astype(np.uint8)))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i], torch.zeros(0)


def tiny_trainer(**options):
    config = options.pop('config', None) or tiny_config()
    return Trainer(
        options.pop('dataset', Discs(12)),
        config,
        device='cpu',
        augment_names=PIPES['bgc'],
        **options,
    )
