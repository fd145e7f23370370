"""Plants drawn people in a generator's training photographs, and later looks for them.

    python benchmarks/canaries.py plant --image_dir=cropped --out_dir=runs/canaries --n=100
    python scripts/dataset_tool.py --source=runs/canaries/train --dest=train.zip --width=64 \\
        --height=64
    python scripts/train_stylegan2_ada.py --outdir=runs/gan --data=train.zip --cfg=small
    python benchmarks/canaries.py attack --out_dir=runs/canaries --generator=generator.pt

plant copies the photographs of --image_dir and --copies of each of --n phantoms into train/; as
many phantoms of other people are held back, and as many again serve as reference (canaries/, with
vessel masks in canaries/masks). attack asks who has samples (nearest in pixels, in features of
--network and in its identity head's), who has the generator (how well it can be made to draw a
photograph) and, with --encoder=restyle.pt, who has encoder and generator (how well they draw it
again) whether planted people can be told from those held back; writes attack-NAME.json and .md,
NAME that of the weights. An AUC of 0.5 with an interval around it: nothing was found.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import logging
import shutil
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8

from benchmarks.machine import describe
from datasets.phantoms import make_dataset
from datasets.pictures import load_pictures
from datasets.table import read_table
from evaluation.attackers import eyes_of
from evaluation.attacks.canaries import encoder_attack, generator_attack, sample_attacks
from evaluation.attacks.identity import fit_identity, grid_features
from evaluation.registry import interval
from models.features.pretrained import WHEELS, load_feature_network
from models.psp import load_psp
from models.stylegan2 import Generator
from models.stylegan2.checkpoint import load_generator
from stages.training import refinements
from utils import cli
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, to_uint8
from utils.io import write_json, write_text
from utils.logs import setup_logging
from utils.seeds import torch_generator

log = logging.getLogger(__name__)

_TEACHERS = 100  # people who teach the identity head


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument('what', choices=('plant', 'attack'))
    p.add_argument('--out_dir', type=Path, required=True, metavar='DIR', help='run folder')
    p.add_argument('--image_dir', type=Path, metavar='DIR', help='plant: training photographs')
    p.add_argument(
        '--n', type=cli.positive_int, default=100, metavar='INT', help='plant: people on each side'
    )
    p.add_argument(
        '--copies', type=cli.positive_int, default=1, metavar='INT', help='plant: of each canary'
    )
    p.add_argument(
        '--size', type=cli.positive_int, default=64, metavar='PX', help='plant: side of canaries'
    )
    p.add_argument('--generator', type=Path, metavar='FILE', help='attack: generator.pt')
    p.add_argument(
        '--encoder',
        type=Path,
        metavar='FILE',
        help='attack: restyle.pt, whose generator is taken unless --generator is given',
    )
    p.add_argument(
        '--n_samples', type=cli.positive_int, default=1000, metavar='INT', help='attack: samples'
    )
    p.add_argument(
        '--n_steps',
        type=cli.nonnegative_int,
        default=100,
        metavar='INT',
        help='attack: of a search',
    )
    p.add_argument('--network', choices=tuple(WHEELS), default='lite0', help='attack: features')
    return cli.add_common(p)


def plant(opts: argparse.Namespace) -> None:
    """Draws three times n people, one photograph each, and plants the first n."""
    if opts.image_dir is None or not opts.image_dir.is_dir():
        raise UserError('plant needs --image_dir, the folder of training photographs')
    train, canaries = opts.out_dir / 'train', opts.out_dir / 'canaries'
    if train.exists():
        raise UserError(f'{train} exists; choose another --out_dir')
    make_dataset(
        canaries, n_patients=3 * opts.n, size=opts.size, seed=opts.seed, eyes=('left',), masks=True
    )
    make_dataset(
        opts.out_dir / 'teachers',
        n_patients=_TEACHERS,
        size=opts.size,
        seed=opts.seed + 1,
        visits=2,
    )
    train.mkdir()
    for file in sorted(opts.image_dir.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            shutil.copy(file, train / f'photograph_{file.name}')
    for path in read_table(canaries / 'labels.csv').paths[: opts.n]:
        for copy in range(opts.copies):
            shutil.copy(path, train / f'canary_{path.stem}_{copy}.png')
    log.info('%d files in %s', len(list(train.iterdir())), train)


@torch.no_grad()
def samples(generator: Generator, n: int, seed: int) -> UInt8[np.ndarray, 'n 3 R R']:
    z = torch.randn(n, generator.style_dim, generator=torch_generator(seed, 'canaries'))
    return torch.cat([to_uint8(generator(part)) for part in z.split(16)]).numpy()


def attack(opts: argparse.Namespace) -> dict:
    """Results of all attacks, by who has what."""
    psp = load_psp(opts.encoder) if opts.encoder else None
    if opts.generator is not None:
        generator, _ = load_generator(opts.generator)
    elif psp is not None:
        generator = psp.decoder
    else:
        raise UserError('attack needs --generator, --encoder or both')
    paths = read_table(opts.out_dir / 'canaries/labels.csv').paths
    planted, held, reference = _canaries(paths, generator.size)
    network = load_feature_network(opts.network)
    teachers = read_table(opts.out_dir / 'teachers/labels.csv')
    taught = load_pictures([[p] for p in teachers.paths], generator.size)
    head = fit_identity(grid_features(network, taught), eyes_of(teachers))
    embeds = {
        'features': lambda pictures: grid_features(network, pictures),
        'identity': lambda pictures: head(grid_features(network, pictures)),
    }
    drawn = samples(generator, opts.n_samples, opts.seed)
    found = {
        f'samples, {name}': result
        for name, result in sample_attacks(planted, held, drawn, reference, embeds).items()
    }
    found['generator'] = generator_attack(generator, planted, held, n_steps=opts.n_steps)
    if psp is not None:
        inside, outside, _ = _canaries(paths, psp.input_size)
        n_iters = refinements(opts.encoder)
        by = encoder_attack(psp, inside, outside, embeds, n_iters=n_iters)
        found |= {f'encoder, {name}': result for name, result in by.items()}
    return found


def _canaries(paths: Sequence[Path], side: int) -> list[UInt8[np.ndarray, 'n 3 S S']]:
    """Planted, held back, and reference."""
    return np.split(load_pictures([[p] for p in paths], side), 3)


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    if opts.what == 'plant':
        plant(opts)
        return 0
    found = attack(opts)
    name = f'attack-{(opts.encoder or opts.generator).stem}'
    write_json(
        opts.out_dir / f'{name}.json', {'attacks': found, 'machine': describe(torch.device('cpu'))}
    )
    lines = ['| attack | AUC | TPR at 1 % FPR |', '|---|---|---|']
    for attacker, r in found.items():
        rate = interval(r['tpr_at_1pct_fpr'], '.2f')
        lines.append(f'| {attacker} | {interval(r["auc"], ".2f")} | {rate} |')
    write_text(opts.out_dir / f'{name}.md', '\n'.join(lines) + '\n')
    print('\n'.join(lines))
    return 0


if __name__ == '__main__':
    cli.run(main)
