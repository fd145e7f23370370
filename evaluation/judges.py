"""The maker is never its own judge: which networks a release was made with, and who may judge it.

A release is drawn towards what the networks that steered it see. Their own figures of it look
better than anybody else's, so they stand beside those of another network and never alone.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from models.features.pretrained import WHEELS, FeatureNetwork, load_feature_network
from utils.errors import UserError

log = logging.getLogger(__name__)

MAKER = "the maker's"  # what figures of such a network are called


def networks_of(release: Path) -> dict[str, str]:
    """The networks in the manifest of a release: {role: name and SHA-256}.

    release: its folder, or the folder of its pictures; {} where no manifest tells.
    """
    for folder in (release, release.parent):
        try:
            manifest = json.loads((folder / 'manifest.json').read_text(encoding='utf-8'))
            networks = manifest['networks']
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(networks, dict):
            return {str(role): str(name) for role, name in networks.items()}
    return {}


def made(network: FeatureNetwork, networks: dict[str, str]) -> bool:
    """Whether a feature network is among the `networks_of` a release, by its file's digest."""
    return any(network.digest in entry for entry in networks.values())


class Judge(NamedTuple):
    """A network that looks at releases. maker: whether one of them was made with it."""

    network: FeatureNetwork
    maker: bool

    @property
    def label(self) -> str:
        """Its name, marked where it judges its own work."""
        return f'{self.network.name}, {MAKER}' if self.maker else self.network.name


def load_judges(
    names: Sequence[str | dict[str, str]], releases: Iterable[dict[str, str]]
) -> list[Judge]:
    """The networks that judge: independent ones first, makers behind them.

    names: 'lite0', 'lite1', 'lite2', or {weights: file, arch: timm architecture}. releases: the
    `networks_of` each release. UserError where only makers are left, with the remedy.
    """
    releases, judges = list(releases), []
    for given in names:
        weights, arch = (
            (given['weights'], given['arch']) if isinstance(given, dict) else (given, None)
        )
        network = load_feature_network(weights, arch=arch)
        judges.append(Judge(network, any(made(network, used) for used in releases)))
    if all(judge.maker for judge in judges):
        others = [name for name in WHEELS if name not in names]
        raise UserError(
            f'the release was made with {", ".join(j.network.name for j in judges)}, '
            'which may not judge it alone; add another network, such as '
            f'{others[0] if others else "a weight file of your own"}'
        )
    for judge in judges:
        if judge.maker:
            log.warning(
                'a release was made with %s: its figures flatter, read those of %s',
                judge.network.name,
                next(j.network.name for j in judges if not j.maker),
            )
    return sorted(judges, key=lambda judge: judge.maker)
