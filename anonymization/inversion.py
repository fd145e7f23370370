"""Stage 1: the latent of every photograph, and what the content network sees of it."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from anonymization.context import Context
from anonymization.optimize import ACTIVATIONS, matmul_precision
from anonymization.sharing import RECONSTRUCTIONS, give, take
from anonymization.workers import each, unfinished
from models.features.content import ContentNetwork
from models.features.pretrained import FeatureNetwork
from models.psp import FrozenPSP, invert
from utils import distributed
from utils.errors import UserError
from utils.images import from_uint8, png_names, save_png
from utils.io import (
    append_npy,
    check_intact,
    has_seal,
    load_intact,
    remove_sealed,
    save_torch,
    sealing,
)
from utils.logs import progress

log = logging.getLogger(__name__)

ARRAYS = LATENTS, CONTENT, ERRORS = 'latents.npy', 'content.npy', 'inversion_error.npy'
ANEW = 'remove it and its .sha256 and run the same command again: it is computed anew'


def invert_all(run: Context) -> tuple[np.ndarray, np.ndarray]:
    """Latents of all photographs [n, L, D], content features [n, F] of their pictures.

    Both as memory-mapped files in private/, computed once, in chunks that the processes take as
    they get on, or taken from a run that found the same (see sharing). UserError where a latent is
    not finite, or a file of the run is damaged.
    """
    latents, content = run.private / LATENTS, run.private / CONTENT
    done = has_seal(latents) and has_seal(content)
    distributed.barrier()  # before process 0 can have made them
    done = done or distributed.from_main(lambda: _take(run))
    if not done:
        _invert_chunks(run)
        distributed.barrier()
    if distributed.is_main():
        if not done:
            _collect(run)
            give(run, ARRAYS)
        for path in (latents, content):
            check_intact(path, remedy=ANEW)
    distributed.barrier()
    return np.load(latents, mmap_mode='r'), np.load(content, mmap_mode='r')


def _take(run: Context) -> bool:
    """Whether another run's inversions are in private/ now, sealed as this run's own would be."""
    if not (taken := take(run, ARRAYS)):
        return False
    for name in (LATENTS, CONTENT):
        with sealing(run.private / name):
            pass
    return taken


def _chunks(run: Context) -> list[range]:
    n, size = len(run.table), run.settings.batch_size
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def _chunk_size(run: Context) -> str:
    """What a chunk is sealed with: a run that goes on may have another batch_size."""
    return f'{run.settings.batch_size} photographs'


def _chunk_file(run: Context, i: int) -> Path:
    return run.work / f'inversion_{i:06d}.pt'


def _invert_chunks(run: Context) -> None:
    settings, chunks = run.settings, _chunks(run)
    todo = unfinished([_chunk_file(run, i) for i in range(len(chunks))], _chunk_size(run))
    psp = FrozenPSP(run.networks.psp.to(run.device), ACTIVATIONS[settings.precision])
    net = run.networks.content.to(run.device).to(memory_format=torch.channels_last)
    log.info('inverting %d photographs, %d refinements', len(run.table), settings.n_iters)
    bar = progress(total=sum(len(chunks[i]) for i in todo), desc='inversion', unit='img')
    names = png_names(run.table.ids)

    def one(i: int, check: Callable[[], None]) -> None:
        u8 = torch.stack([run.photographs[j] for j in chunks[i]])
        parts = []
        for x in u8.split(1 if run.alone else len(u8)):
            check()
            parts.append(_invert_batch(run, psp, net, x))
        found = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        recon = found.pop('recon')
        if settings.save_reconstructions:
            for j, y in zip(chunks[i], recon):
                save_png(y, run.private / RECONSTRUCTIONS / names[j])
        with sealing(_chunk_file(run, i), _chunk_size(run)):
            save_torch(_chunk_file(run, i), found)
        bar.update(len(u8))

    with matmul_precision(settings.precision):
        each(one, distributed.handed_out(todo), run.threads)
    bar.close()


def _invert_batch(
    run: Context, psp: FrozenPSP, net: ContentNetwork | FeatureNetwork, u8: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Of photographs uint8 [N, 3, S, S]: ws, recon, content features, error [N], on the CPU."""
    x = from_uint8(u8.to(run.device))
    found = invert(psp, x, n_iters=run.settings.n_iters)
    if not torch.isfinite(found.ws).all():
        raise UserError(
            'the inversion gives numbers that are not finite; is the checkpoint '
            'of `checkpoint_path` a trained one?'
        )
    # A pretrained network sees what the inversion loses, and looks at the photograph.
    seen = x if net.of_photographs else found.recon
    return {
        'ws': found.ws.cpu(),
        'recon': found.recon.cpu(),
        'content': net.features(seen).cpu(),
        'error': (found.recon - x).square().mean((1, 2, 3)).cpu(),
    }


def _collect(run: Context) -> None:
    """One file for all, chunk by chunk; nothing holds all latents."""
    files = [_chunk_file(run, i) for i in range(len(_chunks(run)))]
    errors = []
    with (
        sealing(run.private / LATENTS),
        sealing(run.private / CONTENT),
        append_npy(run.private / LATENTS, len(run.table)) as add_latents,
        append_npy(run.private / CONTENT, len(run.table)) as add_content,
    ):
        for file in files:
            part = load_intact(file, what='inversion chunk', context=_chunk_size(run))
            add_latents(part['ws'].numpy())
            add_content(part['content'].numpy())
            errors.append(part['error'])
    error = torch.cat(errors)
    log.info(
        'reconstruction error (mean square, range [-1, 1]): median %.4f, worst %.4f',
        error.median(),
        error.max(),
    )
    with append_npy(run.private / ERRORS, len(run.table)) as add:
        add(error.numpy())
    for file in files:
        remove_sealed(file)
