"""Pictures synthesised anew from the recorded latents of the groups."""

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8

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
_AXES, _SAMPLE = 64, 256  # main axes, and the latents that they are found from
_SLACK = 1.001  # for rounding
_BLOCK = 128


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
        values = np.load(path, mmap_mode='r', allow_pickle=False)
        if not all(np.isfinite(part).all() for part in _parts(values)):
            raise ValueError('values that are no finite numbers')
        return values
    except (OSError, ValueError, TypeError, EOFError, SyntaxError) as error:
        raise UserError(
            f'{path} is missing or damaged; the pictures cannot be derived again without it'
        ) from error


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows at a time, so that a memory-mapped file is not held as a whole."""
    return (values[i : i + _BLOCK] for i in range(0, len(values), _BLOCK))


def check_one_person(run: Run, latents: Float32[np.ndarray, 'C L D']) -> Check:
    """No group latent lies at the latent of one person, or at the mean over his photographs.

    At: nearer than a twentieth of how far the members of the group lie from their mean.
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
    members = run.members
    reach = np.array([_NEAR * _spread(flat[rows]) for rows in members.values()])
    near = _nearer(np.asarray(latents).reshape(len(latents), -1), reach, flat, candidates)
    for number in members:
        if near[number - 1]:
            found.add(f'group {number} has the latent of one person')
    who = run.table.unit if run.table.patients else 'different photographs'
    return found.check(f'{len(latents)} latents of groups, {len(people)} {who}')


def _spread(members: Float32[np.ndarray, 'm P']) -> float:
    """Median distance from their mean."""
    exact = np.asarray(members, np.float64)
    return float(np.median(np.linalg.norm(exact - exact.mean(0), axis=1)))


def _nearer(
    groups: Float[np.ndarray, 'C P'],
    reach: Float[np.ndarray, ' C'],
    own: Float[np.ndarray, 'n P'],
    candidates: list[list[int]],
) -> Bool[np.ndarray, ' C']:
    """Whether a candidate, a mean over rows of `own`, lies nearer each group than its reach.

    What is that near is so in any projection, too. So those are looked for that can be, along the
    first main axis and then on 64 of them; their own distances decide.
    """
    sample = np.asarray(own[np.linspace(0, len(own) - 1, _SAMPLE).astype(int)], np.float64)
    middle = sample.mean(0)
    axes = np.linalg.svd(sample - middle, full_matrices=False)[2][:_AXES].T
    seen = np.concatenate([(part - middle) @ axes for part in _parts(own)])
    means = np.stack([seen[rows].mean(0) for rows in candidates])
    order = means[:, 0].argsort()
    means = means[order]
    squares, centres = (means**2).sum(1), (groups - middle) @ axes
    found, wide = np.zeros(len(groups), bool), reach * _SLACK
    for block in np.array_split(centres[:, 0].argsort(), -(-len(groups) // _BLOCK)):
        ends = (centres[block, 0] - wide[block]).min(), (centres[block, 0] + wide[block]).max()
        part = slice(*means[:, 0].searchsorted(ends))
        apart = squares[part] - 2 * centres[block] @ means[part].T
        apart += (centres[block] ** 2).sum(1, keepdims=True)
        for i, j in np.argwhere(apart < wide[block, None] ** 2):
            rows, number = candidates[order[part.start + j]], block[i]
            one = np.asarray(own[rows], np.float64).mean(0)
            found[number] |= np.linalg.norm(groups[number] - one) < reach[number]
    return found


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
