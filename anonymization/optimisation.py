"""Stage 3: one latent and one picture for every group, kept batch by batch in private/work/."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from anonymization.calibrated import Teller
from anonymization.context import Context
from anonymization.grouped import GROUP_TABLE
from anonymization.inversion import ANEW, CONTENT, LATENTS
from anonymization.optimize import (
    Group,
    GroupOptimizer,
    Result,
    batch_that_fits,
    equal_shares,
    matmul_precision,
    style_term,
)
from anonymization.records import GroupResult, pixel_digest
from anonymization.starts import KEY, read_key, start_offset
from anonymization.workers import each, memory, run_within_memory, unfinished
from datasets.groups import Groups
from models.stylegan2.sampling import latent_spread
from utils import distributed
from utils.errors import UserError
from utils.images import to_uint8
from utils.io import (
    check_intact,
    has_seal,
    load_intact,
    save_torch,
    sealing,
    sha256_bytes,
    sha256_file,
    write_text,
)
from utils.logs import progress

log = logging.getLogger(__name__)

_FLAT = 0.1  # of the contrast of the centroid's picture: less is no picture


def optimise(run: Context, latents: np.ndarray, content: np.ndarray, groups: Groups) -> int:
    """Computes every batch of groups that has no result yet; returns how many batches there are.

    latents [n, L, D], content [n, F]: of all photographs. UserError where the optimisation
    diverges.
    """
    secret = _secrets(run, groups)
    at_once = _at_once(run, len(groups))
    size = 1 if run.alone else at_once
    batches = [range(i, min(i + size, len(groups))) for i in range(0, len(groups), size)]
    sources = distributed.from_main(lambda: _sources(run))
    todo = unfinished([_batch_file(run, i) for i in range(len(batches))], sources)
    if todo:
        engine = GroupOptimizer(
            run.networks.psp,
            run.networks.content,
            run.networks.style,
            config=run.settings.optimize,
            device=run.device,
            precision=run.settings.precision,
            guide=run.networks.guide,
        )
        steps = run.settings.optimize.n_steps
        log.info('optimising %d groups, %d at a time, %d steps', len(groups), at_once, steps)
        total = steps * sum(len(batches[i]) for i in todo)
        bar = progress(total=total, desc='optimisation', unit='step')

        def one(i: int, check: Callable[[], None]) -> None:
            def on_step(n: int) -> None:
                check()
                bar.update(n)

            members = [groups.members[c] for c in batches[i]]
            batch = [secret(m, _group(run, m, latents, content)) for m in members]
            result = run_within_memory(engine, batch, on_step=on_step)
            _save_batch(run, i, result, sources)

        with matmul_precision(run.settings.precision):  # set once for all threads
            each(one, distributed.handed_out(todo), min(at_once, run.threads))
        bar.close()
    distributed.barrier()
    return len(batches)


def results(run: Context, n_batches: int) -> Iterator[GroupResult]:
    """The results of `optimise` in the order of the groups, a batch in memory at a time."""
    sources = _sources(run)
    for i in range(n_batches):
        part = load_intact(_batch_file(run, i), what='group results', context=sources)
        rows = zip(
            part['image'], part['centroid'], part['ws'], part['losses'].unbind(1), part['pixels']
        )
        yield from (GroupResult(*row) for row in rows)


def _batch_file(run: Context, i: int) -> Path:
    return run.work / f'groups_{i:06d}.pt'


def _sources(run: Context) -> str:
    """One digest of what the optimisation starts from: latents, content features, groups, key."""
    names = [LATENTS, CONTENT, GROUP_TABLE] + [KEY] * run.settings.secret
    files = [run.private / name for name in names]
    return sha256_bytes('\n'.join(sha256_file(f) for f in files).encode())


def _group(run: Context, members: np.ndarray, latents: np.ndarray, content: np.ndarray) -> Group:
    return Group(
        torch.from_numpy(np.array(latents[members])),
        torch.stack([run.photographs[int(i)] for i in members]),
        torch.from_numpy(np.array(content[members])),
        equal_shares([run.people[i] for i in members]),
    )


def _secrets(run: Context, groups: Groups) -> Callable[[np.ndarray, Group], Group]:
    """Gives the group of given rows what the run's key decides of its start, if anything."""
    settings = run.settings
    if not settings.secret:
        return lambda rows, group: group
    key = distributed.from_main(lambda: read_key(run.private, settings.start_key))
    decoder = run.networks.psp.decoder
    noise = run.noise(groups)
    if noise is not None:
        teller = Teller(decoder, noise, key, run.facts['networks']['generator and encoder'])

        def told(rows: np.ndarray, group: Group) -> Group:
            ids, people = [run.table.ids[i] for i in rows], [run.people[i] for i in rows]
            return group._replace(start=teller.tell(ids, group.ws, people))

        return told
    scale = settings.start_noise * latent_spread(decoder)
    shape = decoder.n_latent, decoder.style_dim

    def moved(rows: np.ndarray, group: Group) -> Group:
        ids = [run.table.ids[int(i)] for i in rows]
        return group._replace(offset=start_offset(key, ids, shape, scale))

    return moved


def _save_batch(run: Context, i: int, result: Result, sources: str) -> None:
    def output(image: torch.Tensor) -> torch.Tensor:
        return to_uint8(run.networks.psp.pool(image) if run.settings.resize_outputs else image)

    image, centroid = output(result.image), output(result.centroid)
    _refuse_flat(image, centroid)
    path = _batch_file(run, i)
    with sealing(path, sources):
        save_torch(
            path,
            {
                'ws': result.ws,
                'losses': result.losses,
                'image': image,
                'centroid': centroid,
                'pixels': [pixel_digest(u8) for u8 in image],
            },
        )


def _refuse_flat(image: torch.Tensor, centroid: torch.Tensor) -> None:
    """UserError for pictures uint8 [G, 3, R, R] without the contrast of their centroids."""
    before, after = (u8.float().flatten(1).std(1) for u8 in (centroid, image))
    if (after < _FLAT * before).any():
        raise UserError(
            'the optimisation ended in a blank picture; lower `lr`, `style_weight` or '
            '`content_weight`'
        )


def _at_once(run: Context, n_groups: int) -> int:
    """Groups optimised at a time: on a CPU side by side, on a GPU together in a batch.

    Batches are decided once per run, since a resumed run must cut the same way.
    """
    wanted, precision = run.settings.group_batch, run.settings.precision
    net = run.networks.style
    style = None if net is None else style_term(net, run.settings.optimize)
    world, cpu = distributed.world_size(), run.device.type == 'cpu'
    free = memory(run.device) // (world if cpu else 1)
    most = run.threads if cpu else min(64, -(-n_groups // world))
    size = min(wanted or most, batch_that_fits(run.networks.psp, style, precision, free, most=most))
    if run.alone:
        return size
    path = run.private / 'group_batch.txt'
    if distributed.is_main():
        if not has_seal(path):
            with sealing(path):
                write_text(path, f'{wanted or size}\n')
        check_intact(path, remedy=ANEW)
    distributed.barrier()
    recorded = int(path.read_text())
    if recorded != (wanted or recorded):
        log.warning('going on with %d groups at a time, as this run began', recorded)
    return recorded
