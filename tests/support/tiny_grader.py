"""A network in place of a ResNet, and pictures whose brightness is their grade."""

import numpy as np
import torch


def pictures(grades, size=16, seed=0):
    """uint8 [n, 3, S, S]; the brightness of the green channel tells the grade."""
    rng = np.random.default_rng(seed)
    grades = np.asarray(grades)
    base = rng.integers(0, 60, (len(grades), 3, size, size))
    base[:, 1] += 40 * grades[:, None, None]
    return base.astype(np.uint8)


class TinyNet(torch.nn.Module):
    """Stands in for a ResNet where the test is about what surrounds the network."""

    feature_dim = 8

    def __init__(self, *_, **__):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 4, 4),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )

    def forward(self, x):
        return self.fc(self.body(x))
