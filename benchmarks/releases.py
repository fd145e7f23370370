"""The rows of benchmarks/frontier.py: what each asks for, and how its pictures are made.

Shapes: n photographs, G groups, L styles, D style dimension, S side of the pictures.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from anonymization.calibrated import NoiseConfig, Teller, most_groups, noise_of
from anonymization.grouping import DEALT
from anonymization.optimize import Group, GroupOptimizer, OptimizeConfig, equal_shares
from benchmarks.appraisal import MAKER, Photographs
from models.features.guide import load_guide
from models.features.pretrained import load_feature_network
from models.psp import PSP
from models.stylegan2.sampling import seed_latents
from utils.images import to_uint8

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).resolve().parents[1] / 'pretrained_models/demo'
BATCH = 10
AUTO = {'style_weight': 'auto', 'lr': 'auto', 'content_weight': 1.0}
CONTENT_ONLY = {**AUTO, 'style_weight': 0.0}


class Grouping(NamedTuple):
    """Settings of the grouping; by_grade: groups are of one grade."""

    policy: str = 'distinct'
    clustering: str = 'default'
    by_grade: bool = False


APART = Grouping()  # as the main job does unless told otherwise
TOGETHER = Grouping('together')  # each person in one group


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: the size of the groups and the settings; none are baselines.

    independent: samples of the generator stand in the place of the groups' pictures. guided: the
    embedded guide is part of the content loss. epsilon: of calibrated noise. grouping: how people
    are grouped, where that differs from the main job's default.
    """

    k: int = 5
    settings: dict | None = None
    independent: bool = False
    guided: bool = False
    epsilon: float | None = None
    grouping: Grouping = APART


def _told(rank: int, k: int, epsilon: float | None, grouping: Grouping = TOGETHER) -> Row:
    settings = {**AUTO, 'n_steps': 0, 'latent_rank': rank}
    return Row(k, settings, epsilon=epsilon, grouping=grouping)


STRONG = {**AUTO, 'n_steps': 40, 'style_ratio': 3.0}  # both losses of about equal size
ROWS = {
    'photographs': Row(1),
    'samples of the generator': Row(independent=True),
    'pixel average': Row(),
    'centroid': Row(settings={**AUTO, 'n_steps': 0}),
    **{
        f'centroid, 8 leading directions{name}': Row(k, {**AUTO, 'n_steps': 0, 'latent_rank': 8})
        for name, k in {'': 5, ', k = 10': 10, ', k = 20': 20}.items()
    },
    **{
        f'people together, {rank} directions, epsilon {epsilon}, k = {k}': _told(rank, k, epsilon)
        for rank, k in ((4, 5), (4, 10), (4, 20), (8, 20))
        for epsilon in (None, 32, 8, 2)
    },
    **{
        f'dealt out within grades, 4 directions, epsilon {epsilon}, k = 10': _told(
            4, 10, epsilon, Grouping('together', DEALT, by_grade=True)
        )
        for epsilon in (None, 8)
    },
    'both eyes apart, 4 directions, epsilon 8, k = 10': _told(4, 10, 8, APART),
    'content and guide, 10 steps': Row(settings={**CONTENT_ONLY, 'n_steps': 10}, guided=True),
    'content only, 40 steps': Row(settings={**CONTENT_ONLY, 'n_steps': 40}),
    'content only, 60 steps': Row(settings={**CONTENT_ONLY, 'n_steps': 60}),
    'content only, 100 steps': Row(settings=CONTENT_ONLY),
    'content and guide, 40 steps': Row(settings={**CONTENT_ONLY, 'n_steps': 40}, guided=True),
    'whole picture, 60 steps': Row(settings={**AUTO, 'n_steps': 60}),
    'whole picture and guide, 40 steps (default)': Row(
        settings={**AUTO, 'n_steps': 40}, guided=True
    ),
    'whole picture, ratio 3, 40 steps': Row(settings=STRONG),
    'whole picture, ratio 3, 100 steps': Row(settings={**STRONG, 'n_steps': 100}),
    'whole picture, ratio 3, stride 8, 40 steps': Row(settings={**STRONG, 'style_strides': (8,)}),
    '4 x 4 patches at one place, ratio 3, 40 steps': Row(
        settings={**STRONG, 'style_mode': 'same_place'}
    ),
    '4 x 4 patches at one place, ratio 3, 100 steps of 0.02': Row(
        settings={**STRONG, 'style_mode': 'same_place', 'n_steps': 100, 'lr': 0.02}
    ),
    '4 x 4 patches, best match, ratio 3, 40 steps': Row(
        settings={**STRONG, 'style_mode': 'best_match'}
    ),
    'content only, 100 steps, k = 10': Row(10, CONTENT_ONLY),
    'whole picture, 100 steps, k = 10': Row(10, AUTO),
    'whole picture and guide, 40 steps, k = 10': Row(10, {**AUTO, 'n_steps': 40}, guided=True),
    **{
        f'whole picture and guide of {weight}, {steps} steps, k = 10': Row(
            10, {**AUTO, 'n_steps': steps, 'guide_weight': weight}, guided=True
        )
        for weight, steps in ((0.1, 60), (0.1, 80), (0.2, 40), (0.2, 60))
    },
    'whole picture, ratio 3, 40 steps, k = 10': Row(10, STRONG),
}


def release(
    row: Row,
    groups: list[Int[np.ndarray, ' _']],
    members: Photographs,
    ws: Float[torch.Tensor, 'n L D'],
    psp: PSP,
    *,
    seed: int,
    device: torch.device,
    precision: str,
) -> UInt8[np.ndarray, 'G 3 S S']:
    """The groups' pictures, uint8 [G, 3, S, S], of rows of members with latents ws [n, L, D].

    seed: of the generator's samples. precision: of the optimisation.
    """
    if row.independent:
        return samples(len(groups), psp, seed, device)
    if row.settings is None:
        return np.stack([np.rint(members.pictures[g].mean(0)).astype(np.uint8) for g in groups])
    net = load_feature_network(MAKER)
    guide = None
    if row.guided:
        guide = load_guide(WEIGHTS / 'guide.pt', n_features=net.n_features, digest=net.digest)
    engine = GroupOptimizer(
        psp,
        net,
        net,
        config=OptimizeConfig(**row.settings),
        device=device,
        precision=precision,
        guide=guide,
    )
    pooled = torch.from_numpy(members.features[MAKER]['pooled'])
    tell, made = _telling(row, groups, members, ws, psp, seed), []
    for start in range(0, len(groups), BATCH):
        batch = [
            Group(
                ws[g],
                torch.from_numpy(members.pictures[g]),
                pooled[g],
                equal_shares(members.people[g].tolist()),
                start=tell(g),
            )
            for g in groups[start : start + BATCH]
        ]
        made.append(to_uint8(engine.psp.pool(engine.run(batch).image)))
    return torch.cat(made).numpy()


def _telling(
    row: Row,
    groups: list[Int[np.ndarray, ' _']],
    members: Photographs,
    ws: Float[torch.Tensor, 'n L D'],
    psp: PSP,
    seed: int,
) -> Callable[[Int[np.ndarray, ' _']], torch.Tensor | None]:
    """The latent of given rows with the noise of a row of the table, None where it has none."""
    if row.epsilon is None or row.settings is None:
        return lambda rows: None
    people = [members.people[g].tolist() for g in groups]
    noise = noise_of(
        NoiseConfig(row.epsilon),
        rank=row.settings['latent_rank'],
        k=row.k,
        groups_per_person=most_groups(people),
    )
    assert noise is not None  # there is an epsilon
    log.info('%s', noise)
    key = hashlib.sha256(f'benchmark {seed}'.encode()).digest()  # to be repeated, not secret
    teller = Teller(psp.decoder, noise, key, '')
    return lambda rows: teller.tell([str(r) for r in rows], ws[rows], members.people[rows].tolist())


@torch.no_grad()
def samples(n: int, psp: PSP, seed: int, device: torch.device) -> UInt8[np.ndarray, 'n 3 S S']:
    """n pictures of the generator that depend on nobody, uint8 [n, 3, S, S]."""
    psp = psp.to(device)
    draws = seed_latents(range(seed, seed + n), psp.decoder.style_dim).to(device)
    made = [to_uint8(psp.pool(psp.decoder(z))).cpu() for z in draws.split(BATCH)]
    return torch.cat(made).numpy()
