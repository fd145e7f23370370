"""Calibrated noise: is it enough for what is stated, and is it in the latents of the groups?

Own code: the delta of the noise is worked out from its definition, and the groups' means from the
photographs' latents, without what made the run. Shapes: C groups, L styles, D style dimension.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64

from anonymization.audit.checks import Check, Findings
from anonymization.audit.files import Fault, read_regular
from anonymization.audit.records import Run
from anonymization.starts import KEY, secret_normals
from models.psp import PSP
from models.stylegan2.sampling import Leading, leading_directions

TOLD = 'latents of groups are their clipped means with the noise of the key'
_CLIP, _STEP = 0.75, 1024  # of the square root of the directions; parts of a standard deviation
_SLACK = 1e-6  # of delta, for rounding


def noise_suffices(manifest: dict[str, Any]) -> bool:
    """Whether the noise that a manifest names keeps the epsilon and delta beside it."""
    noise = manifest['noise']
    if noise is None:
        return True
    moved = 2 * noise['clip'] / manifest['k'] * math.sqrt(noise['groups_per_person'])
    return _delta(noise['epsilon'], moved / noise['sigma']) <= noise['delta'] * (1 + _SLACK)


def _delta(epsilon: float, moved: float) -> float:
    """How much likelier than exp(epsilon) an event can get when a normal variable moves."""
    middle = epsilon / moved  # where the ratio of the densities is exp(epsilon), less moved / 2
    return _above(middle - moved / 2) - math.exp(epsilon) * _above(middle + moved / 2)


def _above(x: float) -> float:
    return math.erfc(x / math.sqrt(2)) / 2


def derived_noise(run: Run) -> dict[str, Any] | None:
    """What the manifest must say of the noise; its deviation is the run's word."""
    options = run.options
    if options['epsilon'] is None:
        return None
    groups = Counter(p for rows in run.members.values() for p in {run.people[r] for r in rows})
    rank, said = options['latent_rank'], run.facts['noise']
    return {
        'epsilon': float(options['epsilon']),
        'delta': float(options['delta']),
        'clip': round(options['clip'] or _CLIP * math.sqrt(rank), 6),
        'directions': rank,
        'groups_per_person': max(groups.values()),
        'sigma': said.get('sigma') if isinstance(said, dict) else None,
    }


def stored_key(run: Run) -> bytes:
    """The key in private/; nothing where it cannot be read."""
    try:
        return bytes.fromhex(read_regular(run.private / KEY).decode('ascii'))
    except (Fault, ValueError):
        return b''


def check_noise(manifest: dict[str, Any], found: Findings) -> None:
    """Adds to `found` what is wrong with the noise of a derived manifest."""
    noise = manifest['noise']
    if noise is None:
        return
    sigma, settings = noise['sigma'], manifest['settings']
    if not isinstance(sigma, float) or not 0 < sigma < math.inf or not noise_suffices(manifest):
        found.add('the noise of the run is too small for epsilon and delta')
    if not settings['latent_rank'] or settings['n_steps']:
        found.add('the noise of the run does not cover all that the pictures depend on')


def check_told(run: Run, latents: Float32[np.ndarray, 'C L D'], psp: PSP) -> Check:
    """Group latents [C, L, D] are what latents.npy, group table, key and record say."""
    found, noise = Findings(TOLD), derived_noise(run)
    if noise is None or not isinstance(noise['sigma'], float):
        found.add('the record names no noise')
        return found.check('')
    key = stored_key(run)
    if not key:
        found.add(f'private/{KEY} is missing or damaged')
        return found.check('')
    lead = leading_directions(psp.decoder.cpu(), noise['directions'])
    own = np.load(run.private / 'latents.npy', mmap_mode='r')
    draws = np.stack([_shortened(draw, noise['clip']) for draw in lead.codes.numpy()])
    scale = ((draws**2).mean() + noise['sigma'] ** 2) ** -0.5
    allowed = 2 / _STEP * scale * float(lead.deviations.sum())
    off = []
    for number, rows in run.members.items():
        ids = [run.table.ids[r] for r in rows]
        given = np.array(own[rows])
        code = _mean_code(given, [run.people[r] for r in rows], lead, noise['clip'])
        code = code + noise['sigma'] * secret_normals(
            key, _context(run, noise, ids, given), len(code)
        )
        wanted = (
            lead.middle.double()
            + torch.from_numpy(scale * code) * lead.deviations @ lead.directions
        )
        gap = np.abs(latents[number - 1] - wanted.numpy()).max()
        off.append(float(gap))
        if not gap <= allowed:
            found.add(f'group {number} has another latent')
    return found.check(f'{len(off)} groups, furthest {max(off):.4f} (allowed: {allowed:.4f})')


def _context(
    run: Run, noise: dict[str, Any], ids: Sequence[str], latents: Float32[np.ndarray, 'm L D']
) -> bytes:
    """What the noise of a group depends on besides the key."""
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    networks = run.facts['networks']['generator and encoder']
    words = json.dumps([networks, list(noise.values()), [ids[i] for i in order]])
    return words.encode() + latents[order].tobytes()


def _mean_code(
    latents: Float32[np.ndarray, 'm L D'], people: Sequence[int], lead: Leading, clip: float
) -> Float64[np.ndarray, ' R']:
    """Mean over people of their clipped codes."""
    one_style = latents.astype(np.float64).mean(1) - lead.middle.double().numpy()
    along = one_style @ lead.directions.numpy().T / lead.deviations.numpy()
    each = [along[[p == q for q in people]].mean(0) for p in sorted(set(people))]
    return np.mean([_shortened(code, clip) for code in each], axis=0)


def _shortened(code: Float[np.ndarray, ' R'], clip: float) -> Float[np.ndarray, ' R']:
    length = math.hypot(*code)
    return code if length <= clip else code * (clip / length)
