"""Makes pictures from a generator: samples, truncation sweeps, style mixing, interpolation."""

import argparse
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from models.stylegan2.checkpoint import load_generator
from models.stylegan2.model import Generator
from models.stylegan2.sampling import NOISE_MODES, loop_styles, mix_styles, render, seed_styles
from utils import cli
from utils.errors import UserError
from utils.images import CONTACT_SHEET, grid, save_png, tensor_to_pil
from utils.io import atomic_path
from utils.logs import progress, setup_logging

_MAX_LATENTS = 2**30  # bytes

EPILOG = """examples:
  python scripts/generate.py --network generator.pt --outdir out --seeds 0-35 --trunc 0.7
  python scripts/generate.py --network generator.pt --outdir sweep --seeds 1-4 --trunc 0,0.5,0.7,1
  python scripts/generate.py --network generator.pt --outdir mix --rows 1-4 --cols 5-9 --styles 0-4
  python scripts/generate.py --network generator.pt --outdir walk --seeds 1,2,3 --interpolate webp

Samples are seedNNNN.png and a contact sheet grid.png; a mixing grid holds the rows' pictures on
the left and the columns' on top; an interpolation is interpolation.webp, .gif, or frameNNNNN.png.
"""


def number_list(text: str) -> list[int]:
    """'0,3,5-7' -> [0, 3, 5, 6, 7]."""
    numbers: list[int] = []
    for part in text.split(','):
        first, dash, last = part.partition('-')
        if not first.isdigit() or (dash and not last.isdigit()):
            raise argparse.ArgumentTypeError(f'{text!r} is not a list such as 0,3,5-7')
        if dash and int(last) < int(first):
            raise argparse.ArgumentTypeError(f'{part!r} runs backwards; the smaller number first')
        numbers += range(int(first), int(last if dash else first) + 1)
    if not numbers or max(numbers) >= 2**32:
        raise argparse.ArgumentTypeError(f'{text!r} holds no number, or one above 2^32 - 1')
    return numbers


def psi_list(text: str) -> list[float]:
    """'0.5,1' -> [0.5, 1.0]."""
    try:
        values = [float(part) for part in text.split(',')]
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not a list such as 0.5,0.7,1') from None
    if not all(-5 <= v <= 5 for v in values):
        raise argparse.ArgumentTypeError(f'{text!r}: truncation values lie between -5 and 5')
    return values


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__, EPILOG)
    p.add_argument('--network', required=True, metavar='FILE', help='generator .pt file')
    p.add_argument(
        '--outdir', '--out_dir', required=True, metavar='DIR', help='where the pictures go'
    )
    p.add_argument('--seeds', type=number_list, metavar='LIST', help='e.g. 0,3,5-9')
    p.add_argument(
        '--trunc',
        type=psi_list,
        default='1',
        metavar='PSI',
        help='truncation; several values (0.5,0.7,1) make a sweep',
    )
    p.add_argument(
        '--noise_mode',
        '--noise-mode',
        choices=sorted(NOISE_MODES),
        default='const',
        help='const: the stored noise maps; random: drawn from the seed',
    )
    p.add_argument(
        '--projected_w',
        '--projected-w',
        metavar='FILE',
        help='.npz ("w") or .npy latents [N, L, D] to render in place of seeds',
    )
    p.add_argument('--rows', type=number_list, metavar='LIST', help='style mixing: row seeds')
    p.add_argument('--cols', type=number_list, metavar='LIST', help='style mixing: column seeds')
    p.add_argument(
        '--styles',
        type=number_list,
        default='0-6',
        metavar='LIST',
        help='style mixing: layers taken from the column',
    )
    p.add_argument(
        '--interpolate', choices=['webp', 'gif', 'frames'], help='a closed loop through the seeds'
    )
    p.add_argument(
        '--frames',
        type=cli.positive_int,
        default=60,
        metavar='N',
        help='interpolation: frames from one seed to the next',
    )
    p.add_argument(
        '--fps',
        type=cli.positive_int,
        default=30,
        metavar='N',
        help='interpolation: frames per second',
    )
    p.add_argument(
        '--batch', type=cli.positive_int, default=8, metavar='N', help='pictures computed at once'
    )
    p.add_argument('--overwrite', action='store_true', help='replace existing pictures')
    return cli.add_common(p)


def check_options(args: argparse.Namespace) -> None:
    """UserError for flags that do not go together."""
    mixing = args.rows is not None or args.cols is not None
    kinds = [
        name
        for name, given in (
            ('--seeds', args.seeds is not None),
            ('--projected_w', args.projected_w is not None),
            ('--rows with --cols', mixing),
        )
        if given
    ]
    if len(kinds) != 1:
        raise UserError(
            'give exactly one of --seeds, --projected_w, or --rows with --cols'
            + (f' (given: {", ".join(kinds)})' if kinds else '')
        )
    if mixing and (args.rows is None or args.cols is None):
        raise UserError('style mixing needs both --rows and --cols')
    if args.interpolate and (args.seeds is None or len(args.seeds) < 2):
        raise UserError('--interpolate needs --seeds with at least two seeds')
    if len(args.trunc) > 1 and (mixing or args.interpolate):
        raise UserError('a truncation sweep (several --trunc values) works with --seeds alone')
    if args.projected_w is not None and args.trunc != [1]:
        raise UserError('--projected_w latents are rendered as they are; leave --trunc out')


def read_latents(path: str, net: Generator) -> Float32[Tensor, 'N L D']:
    """float32 [N, L, D] of an .npz ("w") or .npy file; UserError when it holds none."""
    try:
        with open(path, 'rb') as start:
            is_archive = start.read(2) == b'PK'
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                if archive.getinfo('w.npy').file_size > _MAX_LATENTS:
                    raise UserError(f'--projected_w {path}: its array "w" is too large')
                with archive.open('w.npy') as file:
                    w = np.lib.format.read_array(file, allow_pickle=False)
        else:  # mapped: a short file cannot claim an array of any size
            w = np.load(path, mmap_mode='r', allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f'--projected_w {path}: no such file') from None
    except UserError:
        raise
    except Exception as error:  # random bytes make the reader fail in any way
        raise UserError(
            f'--projected_w {path} is no .npy file of an array, and no .npz file with an array "w"'
        ) from error
    if w.dtype.kind not in 'fiu':
        raise UserError(f'--projected_w {path} does not hold numbers')
    want = (net.n_latent, net.style_dim)
    if w.ndim not in (2, 3) or w.shape[-2:] != want:
        raise UserError(
            f'--projected_w {path} has shape {list(w.shape)}; this generator takes '
            f'[N, {want[0]}, {want[1]}]'
        )
    if not np.isfinite(w).all():
        raise UserError(f'--projected_w {path} holds values that are not finite')
    return torch.from_numpy(w.reshape(-1, *want).astype(np.float32))


def guard(paths: Iterable[Path], overwrite: bool) -> None:
    """UserError when one of the pictures exists."""
    existing = [p for p in paths if p.exists()]
    if existing and not overwrite:
        raise UserError(
            f'{existing[0]} already exists (and {len(existing) - 1} more); choose '
            'another --outdir or give --overwrite'
        )


def save_samples(
    images: Iterable[Float[Tensor, '3 R R']], names: Sequence[str], out: Path, n_cols: int
) -> None:
    """Writes every picture and, for up to 400, a contact sheet."""
    kept = []
    for name, image in zip(progress(names, desc='pictures'), images):
        save_png(image, out / name)
        if len(names) <= 400:
            kept.append(image.cpu())
    if kept:
        save_png(grid(torch.stack(kept), n_cols), out / CONTACT_SHEET)


def sample(
    args: argparse.Namespace,
    net: Generator,
    styles: Callable[[Sequence[int], float], Tensor],
    out: Path,
) -> str:
    """--seeds: one picture per seed and truncation; returns what was made."""
    one = len(args.trunc) == 1
    names = [
        f'seed{s:04d}.png' if one else f'seed{s:04d}-trunc{psi:.2f}.png'
        for s in args.seeds
        for psi in args.trunc
    ]
    if len(set(names)) < len(names):
        raise UserError(
            '--seeds or --trunc holds a value twice (truncations count to two decimals)'
        )
    guard([out / n for n in [*names, CONTACT_SHEET]], args.overwrite)
    ws = torch.stack([styles(args.seeds, psi) for psi in args.trunc], 1).flatten(0, 1)
    seeds = [s for s in args.seeds for _ in args.trunc]
    images = render(net, ws, noise=args.noise_mode, seeds=seeds, batch=args.batch)
    save_samples(images, names, out, min(8, len(names)) if one else len(args.trunc))
    return f'{len(names)} pictures'


def project(args: argparse.Namespace, net: Generator, device: torch.device, out: Path) -> str:
    """--projected_w: one picture per latent; returns what was made."""
    ws = read_latents(args.projected_w, net).to(device)
    names = [f'latent{i:04d}.png' for i in range(len(ws))]
    guard([out / n for n in [*names, CONTACT_SHEET]], args.overwrite)
    save_samples(
        render(net, ws, noise=args.noise_mode, batch=args.batch), names, out, min(8, len(names))
    )
    return f'{len(names)} pictures'


def mix(
    args: argparse.Namespace,
    net: Generator,
    styles: Callable[[Sequence[int], float], Tensor],
    out: Path,
) -> str:
    """--rows and --cols: a sheet with the sources on its rim; returns what was made."""
    if max(args.styles) >= net.n_latent:
        raise UserError(f'--styles: this generator has the layers 0-{net.n_latent - 1}')
    guard([out / CONTACT_SHEET], args.overwrite)
    psi = args.trunc[0]
    rows, cols = styles(args.rows, psi), styles(args.cols, psi)
    n_rows, n_cols = len(rows), len(cols)
    mixed = mix_styles(rows.repeat_interleave(n_cols, 0), cols.repeat(n_rows, 1, 1), args.styles)
    seeds = [*args.cols, *args.rows, *(s for s in args.rows for _ in args.cols)]
    images = torch.stack(
        [
            image.cpu()
            for image in render(
                net,
                torch.cat([cols, rows, mixed]),
                noise=args.noise_mode,
                seeds=seeds,
                batch=args.batch,
            )
        ]
    )
    sheet = [torch.full_like(images[0], -1), *images[:n_cols]]
    for i in range(n_rows):
        first = n_cols + n_rows + i * n_cols
        sheet += [images[n_cols + i], *images[first : first + n_cols]]
    save_png(grid(torch.stack(sheet), n_cols + 1), out / CONTACT_SHEET)
    return f'a grid of {n_rows} x {n_cols} mixtures'


def interpolate(
    args: argparse.Namespace,
    net: Generator,
    styles: Callable[[Sequence[int], float], Tensor],
    out: Path,
) -> str:
    """--interpolate: numbered frames or one animated file; returns what was made."""
    ws = loop_styles(styles(args.seeds, args.trunc[0]), args.frames)
    # One noise for the whole film: fresh noise per frame would flicker.
    images = render(net, ws, noise=args.noise_mode, seeds=[args.seed] * len(ws), batch=args.batch)
    images = progress(images, total=len(ws), desc='frames')
    if args.interpolate == 'frames':
        names = [out / f'frame{i:05d}.png' for i in range(len(ws))]
        guard(names, args.overwrite)
        for path, image in zip(names, images):
            save_png(image, path)
        return f'{len(ws)} frames'
    path = out / f'interpolation.{args.interpolate}'
    guard([path], args.overwrite)
    frames = (tensor_to_pil(image) for image in images)
    with atomic_path(path) as temp:
        next(frames).save(
            temp,
            format=args.interpolate.upper(),
            save_all=True,
            append_images=frames,
            duration=round(1000 / args.fps),
            loop=0,
        )
    return f'{path.name}, {len(ws)} frames,'


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    setup_logging()
    check_options(args)
    device = cli.resolve_device(args.device)
    net, latent_avg = load_generator(args.network, device)
    if latent_avg is None and args.trunc != [1]:
        latent_avg = net.mean_latent(seed=args.seed)
    out = Path(args.outdir)

    def styles(seeds: Sequence[int], psi: float) -> Float[Tensor, 'N L D']:
        return seed_styles(net, seeds, psi=psi, latent_avg=latent_avg)

    if args.interpolate:
        made = interpolate(args, net, styles, out)
    elif args.rows is not None:
        made = mix(args, net, styles, out)
    elif args.projected_w is not None:
        made = project(args, net, device, out)
    else:
        made = sample(args, net, styles, out)
    print(f'{made} of {net.size} px in {out}')
    return 0


if __name__ == '__main__':
    cli.run(main)
