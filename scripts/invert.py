"""Finds the latents of a folder of photographs with a trained encoder, and says how well.

    python scripts/invert.py --checkpoint_path=runs/restyle/checkpoints/best_model.pt \\
        --data_path=photos/ --out_dir=runs/inverted --refine=100

In --out_dir: latents.npy [n, L, D], reconstructions/, quality.csv (one row per photograph, in the
order of latents.npy: mean square error after every refinement, and after --refine), sheet.png of
the worst and best. All of it shows or rebuilds photographs: keep it private. The same command goes
on where a run stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import logging
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from datasets.digests import read_digests
from models.psp import FrozenPSP, Inverter, invert, load_psp, refine
from utils import cli
from utils.images import find_images, grid, load_tensor, png_names, save_png
from utils.io import is_intact, load_weights, save_npy, save_torch, sealing, sha256_bytes, write_csv
from utils.logs import progress, setup_logging
from utils.runs import run_record, start_run

log = logging.getLogger(__name__)

_SHEET_ROWS = 8
_FREE = ('out_dir', 'device', 'data_path', 'checkpoint_path')


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument(
        '--checkpoint_path',
        '--checkpoint',
        type=Path,
        required=True,
        metavar='FILE',
        help='ReStyle-pSp checkpoint',
    )
    p.add_argument(
        '--data_path',
        '--image_dir',
        type=Path,
        required=True,
        metavar='DIR',
        help='photographs, searched recursively',
    )
    p.add_argument('--out_dir', type=Path, required=True, metavar='DIR', help='output folder')
    p.add_argument(
        '--n_iters_per_batch',
        '--n_iters',
        type=cli.positive_int,
        default=5,
        metavar='N',
        help='refinements by the encoder',
    )
    p.add_argument(
        '--test_batch_size',
        '--batch_size',
        type=cli.positive_int,
        default=8,
        metavar='N',
        help='photographs inverted together',
    )
    p.add_argument(
        '--refine',
        type=cli.nonnegative_int,
        default=0,
        metavar='STEPS',
        help='go on by optimisation for poor reconstructions',
    )
    p.add_argument(
        '--refine_above',
        type=cli.nonnegative_float,
        metavar='MSE',
        help='poor means a mean square error above this, range [-1, 1] (default: the '
        'worst quarter)',
    )
    p.add_argument(
        '--refine_lr',
        type=cli.positive_float,
        default=0.02,
        metavar='RATE',
        help='learning rate of --refine',
    )
    return cli.add_common(p)


def encode(
    psp: Inverter, paths: Sequence[Path], work: Path, opts: argparse.Namespace, device: torch.device
) -> tuple[Float[Tensor, 'N L D'], Float[Tensor, 'N T']]:
    """One file per batch in `work`: latents and the error after each refinement."""
    bar = progress(total=len(paths), desc='inversion', unit='img')
    for i in range(0, len(paths), opts.test_batch_size):
        part, file = paths[i : i + opts.test_batch_size], work / f'batch_{i:07d}.pt'
        if not is_intact(file):
            x = torch.stack([load_tensor(p, psp.input_size) for p in part]).to(device)
            found = invert(psp, x, n_iters=opts.n_iters_per_batch, keep_iterations=True)
            assert found.iterations is not None  # they are kept
            with torch.no_grad():
                errors = torch.stack(
                    [
                        (psp.pool(psp.decode(ws)) - x).square().mean((1, 2, 3))
                        for ws in found.iterations
                    ],
                    1,
                )
            with sealing(file):
                save_torch(file, {'ws': found.ws.cpu(), 'errors': errors.cpu()})
        bar.update(len(part))
    bar.close()
    files = [load_weights(f, what='inversion batch') for f in sorted(work.glob('batch_*.pt'))]
    return torch.cat([f['ws'] for f in files]), torch.cat([f['errors'] for f in files])


def improve(
    psp: Inverter,
    paths: Sequence[Path],
    ws: Float[Tensor, 'N L D'],
    errors: Float[Tensor, ' N'],
    work: Path,
    opts: argparse.Namespace,
    device: torch.device,
) -> tuple[Float[Tensor, 'N L D'], Float[Tensor, ' N']]:
    """Refined copies of the latents and errors; rows that were good enough stay as they are."""
    ws, errors = ws.clone(), errors.clone()
    limit = opts.refine_above
    if limit is None:
        limit = float(errors.quantile(0.75))
    poor = torch.nonzero(errors > limit).flatten().tolist()
    log.info('optimising %d of %d latents with an error above %.4f', len(poor), len(paths), limit)
    bar = progress(total=len(poor), desc='optimisation', unit='img')
    for i in range(0, len(poor), opts.test_batch_size):
        rows, file = poor[i : i + opts.test_batch_size], work / f'refined_{i:07d}.pt'
        if not is_intact(file):
            x = torch.stack([load_tensor(paths[j], psp.input_size) for j in rows]).to(device)
            better, error = refine(
                psp, x, ws[rows].to(device), n_steps=opts.refine, lr=opts.refine_lr
            )
            with sealing(file):
                save_torch(file, {'ws': better.cpu(), 'errors': error.cpu()})
        part = load_weights(file, what='refined batch')
        ws[rows], errors[rows] = part['ws'], part['errors']
        bar.update(len(rows))
    bar.close()
    return ws, errors


@torch.no_grad()
def draw(psp: Inverter, ws: Float[Tensor, 'L D'], device: torch.device) -> Float[Tensor, '3 S S']:
    """The picture of one latent [L, D] at the encoder's size, on the CPU."""
    return psp.pool(psp.decode(ws[None].to(device)))[0].clamp(-1, 1).cpu()


def write_pictures(
    psp: Inverter,
    paths: Sequence[Path],
    names: Sequence[str],
    ws: Float[Tensor, 'N L D'],
    errors: Float[Tensor, ' N'],
    out_dir: Path,
    device: torch.device,
) -> None:
    """reconstructions/, latents.npy, and sheet.png of the worst and best."""
    for name, w in zip(png_names(names), ws):
        save_png(draw(psp, w, device), out_dir / 'reconstructions' / name)
    save_npy(out_dir / 'latents.npy', ws.numpy())
    order = np.argsort(-errors.numpy())
    shown = [*order[: _SHEET_ROWS // 2], *order[-_SHEET_ROWS // 2 :]][: len(order)]
    cells = [
        c for i in shown for c in (load_tensor(paths[i], psp.input_size), draw(psp, ws[i], device))
    ]
    save_png(grid(torch.stack(cells), 4), out_dir / 'sheet.png')


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    device = cli.resolve_device(opts.device)
    paths = find_images(opts.data_path)
    contents = read_digests(paths).files
    psp = FrozenPSP(load_psp(opts.checkpoint_path, device))
    names = [p.relative_to(opts.data_path).as_posix() for p in paths]
    options = {**vars(opts), 'images': sha256_bytes('\n'.join([contents, *names]).encode())}
    start_run(
        opts.out_dir,
        run_record(options, inputs={'checkpoint': opts.checkpoint_path}, seed=opts.seed),
        resume=True,
        free_options=_FREE,
    )
    if (opts.out_dir / 'quality.csv').exists():
        log.info('%s is complete; choose another --out_dir for another run', opts.out_dir)
        return 0
    work = opts.out_dir / 'work'
    ws, errors = encode(psp, paths, work, opts, device)
    columns = {
        'image': names,
        **{f'mse_{t + 1}': errors[:, t].numpy() for t in range(errors.shape[1])},
    }
    log.info(
        'mean square error after each refinement: %s',
        ' > '.join(f'{e:.4f}' for e in errors.mean(0)),
    )
    last = errors[:, -1]
    if opts.refine:
        ws, last = improve(psp, paths, ws, last, work, opts, device)
        columns['mse_refined'] = last.numpy()
        columns['gain'] = (1 - last / errors[:, -1]).numpy()
        changed = last < errors[:, -1]
        log.info(
            '%d latents improved; their mean square error fell from %.4f to %.4f',
            int(changed.sum()),
            *(float(e[changed].mean()) if changed.any() else 0.0 for e in (errors[:, -1], last)),
        )
    write_pictures(psp, paths, names, ws, last, opts.out_dir, device)
    write_csv(opts.out_dir / 'quality.csv', pd.DataFrame(columns))
    for file in work.iterdir():
        file.unlink()
    work.rmdir()
    log.info('latents, reconstructions and quality.csv in %s', opts.out_dir)
    return 0


if __name__ == '__main__':
    cli.run(main)
