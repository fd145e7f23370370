"""Reconstruction losses with targets that are computed once per batch.

A term has `targets(x)`, the constant part of photographs x [N, 3, S, S], and
`distance(y, targets)`, the loss of each reconstruction y [N, 3, S, S], as [N].
"""
from criteria.lpips_loss import LPIPSLoss
from models.features.content import load_content_network


class L2Term:
    """Mean squared error over pixels."""

    def targets(self, x):
        return x

    def distance(self, y, targets):
        return (y - targets).square().mean((1, 2, 3))


class ContentTerm:
    """1 - cosine similarity of content features (MoCo v2, or this project's encoder)."""

    def __init__(self, path, device):
        self.network = load_content_network(path).to(device)

    def targets(self, x):
        return self.network.features(x)

    def distance(self, y, targets):
        return 1 - (self.network.features(y) * targets).sum(1)


class LpipsTerm:
    """LPIPS with the AlexNet backbone."""

    def __init__(self, path, device):
        self.network = LPIPSLoss(path).to(device)

    def targets(self, x):
        return self.network.features(x)

    def distance(self, y, targets):
        return self.network.distance(self.network.features(y), targets)
