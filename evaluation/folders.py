"""Two sets of pictures, real and synthetic, compared in every way that needs no people.

Each is a folder (searched recursively) or a ZIP.
"""

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from evaluation.features import Network, picture_names, read_pictures
from evaluation.fidelity import compare_pictures, fidelity, scaled
from evaluation.judges import Judge
from evaluation.probe import pooled_features
from evaluation.spectra import high_frequency_ratio, sharpness
from evaluation.vessel_amount import vessel_ratios
from models.features.pretrained import SMALLEST_SIDE
from utils.errors import UserError, listing

log = logging.getLogger(__name__)

DETAIL = {'area': 'vessel area', 'length': 'vessel length', 'high_frequencies': 'fine texture'}
# What distances on the features of these networks are called; others by the network's name.
LABELS = {'fundus': ('FD-fundus', 'KID-fundus'), 'inception': ('FID', 'KID')}


def picture_side(path: str | Path, *, one_size: bool) -> int:
    """Shorter side of the first picture of a folder or ZIP.

    one_size: UserError when the pictures are not all of one size, as those of a generator or a
    release are; something else lies among them then.
    """
    store, names = picture_names(path)
    sizes = {}
    for name in names:
        with contextlib.suppress(UserError):  # unreadable ones are listed when all are read
            sizes[name] = store.size(name)
    if not sizes:
        raise UserError(f'{path}: none of its {len(names)} images can be read')
    if one_size:
        common, _ = Counter(sizes.values()).most_common(1)[0]
        others = [f'{name}: {w}x{h}' for name, (w, h) in sizes.items() if (w, h) != common]
        if others:
            raise UserError(
                listing(
                    f'{path} holds {len(sizes) - len(others)} pictures of '
                    f'{common[0]}x{common[1]} and {len(others)} of another '
                    'size; give a folder of the synthetic pictures alone',
                    others,
                )
            )
    return min(next(iter(sizes.values())))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How pictures are compared.

    judges: networks whose pooled features are compared. networks: by a name of LABELS. detail:
    whether vessels and power at high frequencies are; spectrum: whether radial spectra are.
    small_too: UserError for pictures that are too small for the judges, which are left out else.
    n_bootstrap: draws for the intervals. batch_size: pictures per pass.
    """

    judges: Sequence[Judge] = ()
    networks: Mapping[str, Network] = dataclasses.field(default_factory=dict)
    detail: bool = True
    spectrum: bool = True
    small_too: bool = True
    n_bootstrap: int = 100
    batch_size: int = 32
    seed: int = 0
    device: torch.device = torch.device('cpu')

    def __call__(self, real: Path, synthetic: Path) -> dict[str, Any]:
        """The statistics of every kind, by the names under which `table` shows them."""
        side = min(picture_side(real, one_size=False), picture_side(synthetic, one_size=True))
        judges, pictures = self._judges(side), []
        if judges or self.detail or self.spectrum:
            pictures = [read_pictures(path, side) for path in (real, synthetic)]
        results = {judge.label: self._judged(judge, pictures) for judge in judges}
        for kind, network in self.networks.items():
            results[kind] = compare_pictures(
                real,
                synthetic,
                network,
                device=self.device,
                n_bootstrap=self.n_bootstrap,
                seed=self.seed,
                batch_size=self.batch_size,
            )
        if self.detail:
            results['detail'] = {
                **vessel_ratios(*pictures, seed=self.seed),
                'high_frequencies': high_frequency_ratio(*pictures, seed=self.seed),
            }
        if self.spectrum:
            results['spectrum'] = sharpness(*pictures)
        return results

    def _judges(self, side: int) -> Sequence[Judge]:
        if not self.judges or side >= SMALLEST_SIDE or self.small_too:
            return self.judges
        labels = ', '.join(judge.label for judge in self.judges)
        log.warning('pictures of %d px are too small for %s: left out', side, labels)
        return []

    def _judged(
        self, judge: Judge, pictures: Sequence[UInt8[np.ndarray, '_ 3 S S']]
    ) -> dict[str, Any]:
        real, synthetic = (
            scaled(
                pooled_features(judge.network, u8, device=self.device, batch_size=self.batch_size)
            )
            for u8 in pictures
        )
        return fidelity(real, synthetic, n_bootstrap=self.n_bootstrap, seed=self.seed)


def table(results: dict[str, Any]) -> str:
    """Printable rows: statistic, value, interval, real against real."""
    lines = [f'{"statistic":<24}{"value":>10}  {"95 % interval":<22}{"real split":>10}']
    for kind, found in results.items():
        if kind == 'detail':
            for name, title in DETAIL.items():
                score = found[name]
                lines.append(
                    f'{title:<24}{score["value"]:>10.4f}  {score["low"]:.4f} to {score["high"]:.4f}'
                )
            continue
        if kind == 'spectrum':
            for name in ('high_frequency_ratio', 'log_spectrum_rmse'):
                lines.append(f'{name:<24}{found[name]:>10.4f}')
            continue
        split = found['real_split'] or {}
        fd, kid = LABELS.get(kind, (f'FD-{kind}', f'KID-{kind}'))
        names = {
            'fd': fd,
            'kid': kid,
            **{n: f'{n} ({kind})' for n in ('precision', 'recall', 'density', 'coverage')},
        }
        for key, name in names.items():
            score = found[key]
            yardstick = f'{split[key]:.4f}' if key in split else ''
            interval = f'{score["low"]:.4f} to {score["high"]:.4f}'
            lines.append(f'{name:<24}{score["value"]:>10.4f}  {interval:<22}{yardstick:>10}')
        lines.append(
            f'  n = {found["n_real"]} real, {found["n_fake"]} synthetic, '
            f'{found["dim"]} dimensions'
            + (', fewer pictures than dimensions' if found['rank_deficient'] else '')
        )
        if split:
            lines.append(f'  real split: {split["n_reference"]} against {split["n_sample"]}')
    return '\n'.join(lines)
