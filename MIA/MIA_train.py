"""Trains the published membership attack on a release whose groups the attacker knows.

    python MIA/MIA_train.py --run RUN --epochs 50
    python MIA/MIA_train.py --train_df_path RUN/private --train_image_path photos/ \\
        --centroid_image_path RUN/release/images --epochs 50

RUN is a run folder of scripts/k-SALSA.py. Attacks the plain averages with --centroid_type centroid
(and their folder, RUN/private/centroids). Folders of the published code work too: k5_nearest_df.csv
in --train_df_path, pictures named after the first member. The same command goes on where an
interrupted training stopped. Test the attack with MIA_test.py on a release of people it has not
seen.
"""

import sys
from pathlib import Path

from jaxtyping import UInt8

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import logging
from collections.abc import Callable, Sequence

import numpy as np

from datasets.groups import find_group_table
from evaluation.attacks.pairs import PAIRS, PRECISIONS, PairAttack, PairConfig, standardisation
from MIA.flags import add_release_flags, read_release, release_files, table_names
from training.checkpoints import latest_checkpoint, save_checkpoint
from utils import cli
from utils.io import save_torch, sha256_bytes
from utils.logs import ScalarLog, setup_logging
from utils.runs import run_record, start_run
from utils.signals import stop_on_signal

log = logging.getLogger(__name__)

_SAVE_EVERY = 10  # epochs
_FREE = (
    'device',
    'out_dir',
    'run',
    'train_df_path',
    'train_image_path',
    'centroid_image_path',
    'imagenet_weights',
)  # of the paths, the contents are compared


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__.splitlines()[0], epilog='\n'.join(__doc__.splitlines()[1:]))
    g = p.add_argument_group('published flags')
    g.add_argument(
        '--lr',
        type=cli.positive_float,
        default=1e-4,
        metavar='FLOAT',
        help='learning rate of Adam; falls along a cosine',
    )
    g.add_argument(
        '--epochs', type=cli.positive_int, default=20, metavar='INT', help='epochs (the paper: 50)'
    )
    g.add_argument(
        '--mult_batch',
        type=cli.positive_int,
        default=5,
        metavar='INT',
        help='photographs drawn per step, in multiples of k',
    )
    add_release_flags(g, 'train')
    g = p.add_argument_group('network')
    g.add_argument(
        '--image_size',
        type=cli.positive_int,
        default=224,
        metavar='PX',
        help='side the pictures are resized to',
    )
    g.add_argument(
        '--pairs',
        choices=PAIRS,
        default=PAIRS[0],
        help='what one step compares: every photograph drawn with its own picture and '
        'another (the stronger attack), or the published choice',
    )
    g.add_argument('--precision', choices=PRECISIONS, default='fp32', help='of the network')
    g.add_argument(
        '--imagenet_weights',
        type=Path,
        metavar='FILE',
        help='torchvision ResNet-18 to start from (default: random weights)',
    )
    g = p.add_argument_group('general')
    g.add_argument(
        '--out_dir',
        type=Path,
        default=Path('checkpoint'),
        metavar='DIR',
        help='folder of the checkpoints',
    )
    return cli.add_common(p)


def begin(
    opts: argparse.Namespace,
    photos: UInt8[np.ndarray, 'n 3 S S'],
    pictures: UInt8[np.ndarray, 'C 3 S S'],
    run_dir: Path,
) -> bool:
    """Opens the run folder, or enters that of an interrupted run of the same training (True)."""
    inputs = {
        'groups': find_group_table(
            release_files(opts, 'train').table, table_names('train', opts.samek)
        ),
        'imagenet_weights': opts.imagenet_weights,
    }
    if opts.imagenet_weights is None:
        log.info('training from random weights; --imagenet_weights starts from a ResNet-18 file')
    record = run_record(vars(opts), inputs=inputs, seed=opts.seed)
    record['inputs'] |= {
        'photographs': sha256_bytes(photos.data),
        'pictures': sha256_bytes(pictures.data),
    }
    return start_run(run_dir, record, resume=True, free_options=_FREE)


def train(
    attack: PairAttack,
    release: tuple[np.ndarray, ...],
    run: Path,
    scalars: ScalarLog,
    stopped: Callable[[], bool],
) -> None:
    """Epochs until the last one, or until `stopped` after one; every state is kept in `run`.

    release: photographs, pictures and group_of. Checkpoints <run>_<epoch>.pth count from 0, as
    published.
    """
    epochs = attack.config.epochs
    while attack.epoch < epochs and not stopped():
        record = attack.train_epoch(*release)
        scalars.log(attack.epoch, record)
        log.info('epoch %(epoch)d  loss %(loss).4f  accuracy %(accuracy).3f', record)
        if attack.epoch % _SAVE_EVERY == 0 or attack.epoch == epochs:
            save_torch(
                run.with_name(f'{run.name}_{attack.epoch - 1}.pth'),
                {k: v for k, v in attack.state().items() if k != 'optimizer'},
            )
        save_checkpoint(run, attack.epoch, attack.state(), prefix='state', keep=2)


def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    device = cli.resolve_device(opts.device)
    name = f'{opts.centroid_type}_{opts.data}_k{opts.samek}'
    config = PairConfig(
        k=opts.samek,
        mult_batch=opts.mult_batch,
        lr=opts.lr,
        epochs=opts.epochs,
        image_size=opts.image_size,
        precision=opts.precision,
        pairs=opts.pairs,
        seed=opts.seed,
    )
    photos, pictures, group_of, _ = read_release(opts, 'train', config.image_size)
    run_dir = opts.out_dir / name
    resuming = begin(opts, photos, pictures, run_dir)
    mean, std = standardisation(photos)
    attack = PairAttack(
        config, mean=mean, std=std, device=device, imagenet_weights=opts.imagenet_weights
    )
    if resuming and (latest := latest_checkpoint(run_dir, 'state')):
        attack.load_state(latest[0])
        log.info('going on after epoch %d', attack.epoch)
    scalars = ScalarLog(run_dir, resume_step=attack.epoch)
    with stop_on_signal() as stopped:
        train(attack, (photos, pictures, group_of), opts.out_dir / name, scalars, stopped)
    scalars.close()
    if attack.epoch < config.epochs:
        log.info('stopped; the same command goes on')
        return 128 + (stopped.number or 0)
    print(f'attack: {opts.out_dir / f"{name}_{config.epochs - 1}.pth"}')
    return 0


if __name__ == '__main__':
    cli.run(main)
