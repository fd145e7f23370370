"""Features by chance."""

import numpy as np
import torch
from moco_pictures import generator

from training.moco import PROJECTION_DIM


def units(n, d=PROJECTION_DIM, seed=0):
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator(seed)), dim=1)


def people(n=60):
    """Two images of each patient, who has one grade."""
    patients = [f'p{i // 2}' for i in range(n)]
    return patients, np.array([(i // 2) % 3 for i in range(n)]), ['left', 'right'] * (n // 2)
