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
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from datasets.groups import find_group_table
from evaluation.attacks.pairs import PAIRS, PRECISIONS, PairAttack, PairConfig, standardisation
from MIA.flags import add_release_flags, read_release, release_files, table_names
from training.checkpoints import Checkpoints
from training.run import Training, TrainingRun, open_folder
from utils import cli
from utils.io import save_torch, sha256_bytes
from utils.logs import setup_logging
from utils.runs import run_record
from utils.signals import stop_on_signal

log = logging.getLogger(__name__)

_EXPORT_EVERY = 10  # epochs
_FREE = (
    'run',
    'train_df_path',
    'train_image_path',
    'centroid_image_path',
    'imagenet_weights',
)  # of the paths, the contents are compared


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
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


def record_of(
    opts: argparse.Namespace,
    photos: UInt8[np.ndarray, 'n 3 S S'],
    pictures: UInt8[np.ndarray, 'C 3 S S'],
) -> dict:
    """The run record: options, and digests of the group table, pictures and weights."""
    inputs = {
        'groups': find_group_table(
            release_files(opts, 'train').table, table_names('train', opts.samek)
        ),
        'imagenet_weights': opts.imagenet_weights,
    }
    record = run_record(vars(opts), inputs=inputs, seed=opts.seed)
    record['inputs'] |= {
        'photographs': sha256_bytes(photos.data),
        'pictures': sha256_bytes(pictures.data),
    }
    return record


class PairTraining(Training):
    """The training of `attack` on a release (photographs, pictures, group_of), by epochs.

    <run folder>_<epoch>.pth is written every 10 epochs and after the last, counted from 0, as
    published.
    """

    unit, means, remedy = 'epoch', False, 'lower --lr'

    def __init__(self, attack: PairAttack, release: tuple[np.ndarray, ...]) -> None:
        self.attack, self.release = attack, release
        self.device, self.images = attack.device, len(release[0])

    @property
    def progress(self) -> int:
        """Epochs done."""
        return self.attack.epoch

    def advance(self) -> dict[str, float]:
        """One epoch."""
        record = self.attack.train_epoch(*self.release)
        return {'loss': record['loss'], 'accuracy': record['accuracy']}

    def facts(self) -> dict[str, float]:
        """The epoch."""
        return {'epoch': self.attack.epoch}

    def describe(self, values: Mapping[str, float]) -> str:
        """Loss and accuracy."""
        return super().describe({k: v for k, v in values.items() if k != 'epoch'})

    def state(self) -> dict:
        """As PairAttack.state."""
        return self.attack.state()

    def load_state(self, state: dict, *, source: str | Path = 'state') -> None:
        """As PairAttack.load_state."""
        self.attack.load_state(state)

    def after_step(self, run: TrainingRun, *, last: bool) -> None:
        """The attack as it stands, for MIA_test.py."""
        if run.due(_EXPORT_EVERY) or last:
            exported = {k: v for k, v in self.state().items() if k != 'optimizer'}
            name = f'{run.folder.name}_{self.progress - 1}.pth'
            save_torch(run.folder.with_name(name), exported)


@cli.names_flags(build_parser)
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
    if opts.imagenet_weights is None:
        log.info('training from random weights; --imagenet_weights starts from a ResNet-18 file')
    record = partial(record_of, opts, photos, pictures)
    resuming = open_folder(run_dir, record, resume=True, free_options=_FREE)
    mean, std = standardisation(photos)
    attack = PairAttack(
        config, mean=mean, std=std, device=device, imagenet_weights=opts.imagenet_weights
    )
    training = PairTraining(attack, (photos, pictures, group_of))
    run = TrainingRun(
        training,
        run_dir,
        Checkpoints(run_dir, keep=2),
        length=config.epochs,
        record_every=1,
        save_every=1,
    )
    if resuming:
        run.resume()
    with stop_on_signal() as stopped:
        done = run.to_the_end(requested=stopped)
    if not done:
        log.info('stopped; the same command goes on')
        return 128 + (stopped.number or 0)
    print(f'attack: {opts.out_dir / f"{name}_{config.epochs - 1}.pth"}')
    return 0


if __name__ == '__main__':
    cli.run(main)
