"""Pictures synthesised anew from the recorded latents of the groups."""

import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8

from anonymization.audit.checks import Check, Findings
from anonymization.audit.files import MAX_PICTURE, Fault, read_regular
from anonymization.audit.png import decode
from anonymization.audit.records import Run
from anonymization.optimize import ACTIVATIONS, matmul_precision
from models.psp import PSP, load_psp
from models.stylegan2.frozen import FrozenSynthesis
from utils.errors import UserError
from utils.images import to_uint8
from utils.io import sha256_file
from utils.logs import progress

RECOMPUTED = 'pictures synthesised anew from the latents of their groups are the same'
ONE_PERSON = 'no group latent is the latent of one person'
# Largest and mean difference in grey levels of 255 between machines, by precision.
TOLERANCE = {'fp32': (2, 0.1), 'tf32': (16, 1.0), 'bf16': (32, 3.0)}
_NEAR = 0.05  # of the members' own spread
_DIRECTIONS, _BLOCK = 64, 128


def read_latents(run: Run) -> Float32[np.ndarray, 'C L D']:
    """float32 [C, L, D] of private/group_latents.npy; UserError when they do not fit the groups."""
    path = run.private / 'group_latents.npy'
    latents = _load(path)
    if latents.ndim != 3 or latents.dtype != np.float32 or len(latents) != len(run.members):
        raise UserError(
            f'{path} holds {latents.dtype} {list(latents.shape)}, want float32 '
            f'[{len(run.members)}, styles, dimension], a row for each group'
        )
    return latents


def _load(path: Path) -> np.ndarray:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # a pipe would be waited for
            raise ValueError('not a regular file')
        return np.load(path, mmap_mode='r', allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise UserError(
            f'{path} is missing or damaged; the pictures cannot be derived again without it'
        ) from error


def check_one_person(run: Run, latents: Float32[np.ndarray, 'C L D']) -> Check:
    """No group latent lies at the latent of one person, or at the mean over his photographs.

    Measured against how far the members of the group lie from their mean.
    """
    found = Findings(ONE_PERSON)
    path = run.private / 'latents.npy'
    own = _load(path)
    if own.shape != (len(run.table), *latents.shape[1:]):
        raise UserError(f'{path} does not fit the photographs and the latents of the groups')
    flat = own.reshape(len(own), -1)
    people: dict[int, list[int]] = {}
    for row, person in enumerate(run.people):
        people.setdefault(person, []).append(row)
    candidates = [[row] for row in range(len(own))] + [r for r in people.values() if len(r) > 1]
    nearest = _nearest(np.asarray(latents).reshape(len(latents), -1), flat, candidates)
    for number, rows in run.members.items():
        group = np.asarray(latents[number - 1], np.float64).ravel()
        members = np.asarray(flat[rows], np.float64)
        spread = np.median(np.linalg.norm(members - members.mean(0), axis=1))
        one = np.asarray(flat[candidates[nearest[number - 1]]], np.float64).mean(0)
        if np.linalg.norm(group - one) < _NEAR * spread:
            found.add(f'group {number} has the latent of one person')
    return found.check(f'{len(latents)} latents of groups, {len(people)} people')


def _nearest(
    groups: Float[np.ndarray, 'C P'], own: Float[np.ndarray, 'n P'], candidates: list[list[int]]
) -> Int[np.ndarray, ' C']:
    """Which candidate, a mean over rows of `own`, lies nearest each group [C].

    Found in 64 random directions, in which what is equal stays equal.
    """
    directions = np.random.default_rng(0).standard_normal((own.shape[1], _DIRECTIONS))
    seen = np.concatenate([own[i : i + _BLOCK] @ directions for i in range(0, len(own), _BLOCK)])
    means = np.stack([seen[rows].mean(0) for rows in candidates])
    squares = (means**2).sum(1)
    return np.concatenate(
        [
            (squares - 2 * (groups[i : i + _BLOCK] @ directions) @ means.T).argmin(1)
            for i in range(0, len(groups), _BLOCK)
        ]
    )


def check_recomputed(
    release: Path,
    run: Run,
    latents: Float32[np.ndarray, 'C L D'],
    how_many: int | None,
    *,
    checkpoint: Path | None,
    device: torch.device | str,
) -> tuple[Check, dict[str, Any]]:
    """Synthesises `how_many` pictures (None: all), spread evenly over the names, one at a time.

    checkpoint: file of the networks, None for the run's own. Exact on the machine and device of
    the run; elsewhere up to TOLERANCE. Returns numbers too.
    UserError when the generator is not the file of the run record.
    """
    path = Path(checkpoint or run.options['checkpoint_path'])
    wanted = run.record['inputs'].get('checkpoint')
    if not path.is_file() or sha256_file(path) != wanted:
        raise UserError(
            f'{path} is not the checkpoint of the run (other SHA-256, or missing); '
            'name it with `checkpoint_path`'
        )
    precision = run.options['precision']
    psp = load_psp(path).to(device).eval()
    synthesis = FrozenSynthesis(psp.decoder, dtype=ACTIVATIONS[precision])
    names = sorted(run.names.items(), key=lambda item: item[1])
    if how_many is not None and how_many < len(names):
        names = [names[int(i)] for i in np.linspace(0, len(names) - 1, how_many)]
    largest, mean = TOLERANCE[precision]
    found, differences, exact = Findings(RECOMPUTED), [], 0
    for number, name in progress(names, total=len(names), desc='recomputing', unit='img'):
        with torch.no_grad(), matmul_precision(precision):
            pixels = _picture(psp, synthesis, latents[number - 1], run, device)
        try:
            data = read_regular(release / 'images' / f'{name}.png', MAX_PICTURE)
            there = decode(data, len(pixels)).astype(int)
        except Fault as fault:
            found.add(f'a picture {fault}', [name])
            continue
        gap = np.abs(there - pixels)
        exact += int(not gap.any())
        differences.append(int(gap.max()))
        if gap.max() > largest or gap.mean() > mean:
            found.add('a picture is not what its latent gives', [name])
    worst = max(differences, default=0)
    return found.check(
        f'{exact} of {len(names)} equal, largest difference {worst} of 255 (allowed: {largest}, '
        f'{mean} on average)'
    ), {'n': len(names), 'equal': exact, 'largest_difference': worst}


def _picture(
    psp: PSP,
    synthesis: FrozenSynthesis,
    latent: Float32[np.ndarray, 'L D'],
    run: Run,
    device: torch.device | str,
) -> UInt8[np.ndarray, 'R R 3']:
    image = synthesis(torch.from_numpy(np.array(latent))[None].to(device))
    if run.options.get('resize_outputs'):
        image = psp.pool(image)
    return to_uint8(image[0]).permute(1, 2, 0).cpu().numpy()
