"""What a grader reads in pooled features: the few directions that carry a disease.

A guide is made of photographs that are not in the release, best of public ones. A picture that is
drawn to the members' mean in its directions keeps what a grader would read in them, and little
else: two numbers a group.

Shapes: F features, D directions.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError
from utils.io import load_weights, save_torch, sha256_file

FORMAT = 'k-salsa-guide'


@dataclasses.dataclass(frozen=True)
class Guide:
    """directions: float32 [F, D], each scaled so that photographs have the spread 1 along it.

    digest: SHA-256 of the guide's file.
    """

    directions: Tensor
    digest: str

    def distance(self, features: Tensor, targets: Tensor) -> Tensor:
        """Mean squared difference along the directions of features and targets [G, F]: [G]."""
        return ((features - targets).float() @ self.directions).square().mean(1)

    def to(self, device: torch.device | str) -> 'Guide':
        return dataclasses.replace(self, directions=self.directions.to(device))


def save_guide(path: Path, directions: Tensor, *, network: str, digest: str) -> None:
    """Writes directions [F, D] in the features of a network, with its name and SHA-256."""
    save_torch(
        path,
        {
            'format': FORMAT,
            'network': network,
            'network_sha256': digest,
            'directions': directions.float(),
        },
    )


def load_guide(path: str | Path, *, n_features: int, digest: str) -> Guide:
    """The guide in a file, for the feature network with that SHA-256.

    UserError when the file is missing, is no guide, or is one of another network.
    """
    remedy = (
        'make one with classification/main.py -config guide.yaml and --features of the network '
        'that `content_weights` names'
    )
    saved = load_weights(path, what='guide', hint=f'To have one, {remedy}.')
    if not isinstance(saved, dict) or saved.get('format') != FORMAT:
        raise UserError(f'{path} is no guide; {remedy}')
    if saved.get('network_sha256') != digest:
        raise UserError(
            f'{path} is a guide for the features of {saved.get("network")}, another network than '
            f'that of `content_weights`; {remedy}'
        )
    directions = saved.get('directions')
    if (
        not isinstance(directions, Tensor)
        or directions.dim() != 2
        or len(directions) != n_features
        or not directions.numel()
        or not directions.isfinite().all()
    ):
        raise UserError(f'{path} holds no directions of {n_features} features; {remedy}')
    return Guide(directions.float(), sha256_file(path))
