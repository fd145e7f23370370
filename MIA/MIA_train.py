"""Trains the published membership attack on a release whose groups the attacker knows.

    python MIA/MIA_train.py --train_df_path RUN/private --train_image_path photos/ \\
        --centroid_image_path RUN/release/images --epochs 50

Attacks the plain averages with --centroid_type centroid and their folder (RUN/private/centroids).
Folders of the published code work too: k5_nearest_df.csv in --train_df_path, pictures named after
the first member. The same command goes on where an interrupted training stopped. Test the attack
with MIA_test.py on a release of people it has not seen.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging

import numpy as np

from datasets.groups import find_group_table, group_pictures, read_groups
from datasets.pictures import load_pictures
from datasets.table import read_table
from evaluation.attacks.pairs import PAIRS, PRECISIONS, PairAttack, PairConfig, standardisation
from utils import cli
from utils.errors import UserError
from utils.io import load_weights, save_torch
from utils.logs import ScalarLog, setup_logging
from utils.runs import run_record, start_run

log = logging.getLogger(__name__)

TYPES = ('centroid_ours', 'centroid')
_SAVE_EVERY = 10    # epochs


def build_parser():
    p = cli.parser(__doc__.splitlines()[0], epilog='\n'.join(__doc__.splitlines()[1:]))
    g = p.add_argument_group('published flags')
    g.add_argument('--lr', type=cli.positive_float, default=1e-4, metavar='FLOAT',
                   help='learning rate of Adam; falls along a cosine')
    g.add_argument('--epochs', type=cli.positive_int, default=20, metavar='INT',
                   help='epochs (the paper: 50)')
    g.add_argument('--samek', type=cli.positive_int, default=5, metavar='INT',
                   help='group size k of the release')
    g.add_argument('--mult_batch', type=cli.positive_int, default=5, metavar='INT',
                   help='photographs drawn per step, in multiples of k')
    g.add_argument('--train_df_path', type=Path, required=True, metavar='PATH',
                   help='group table, or the folder that holds k<k>_nearest_df.csv or groups.csv')
    g.add_argument('--train_image_path', type=Path, required=True, metavar='DIR',
                   help='the source photographs, <id>.png or another suffix')
    g.add_argument('--centroid_image_path', type=Path, required=True, metavar='DIR',
                   help='pictures of the release')
    g.add_argument('--centroid_type', choices=TYPES, default=TYPES[0],
                   help='k-SALSA pictures, or plain averages (<id>_centroids.png)')
    g.add_argument('--data', default='aptos', metavar='TEXT', help='part of the file names')
    g = p.add_argument_group('network')
    g.add_argument('--image_size', type=cli.positive_int, default=224, metavar='PX',
                   help='side the pictures are resized to')
    g.add_argument('--pairs', choices=PAIRS, default=PAIRS[0],
                   help='what one step compares: every photograph drawn with its own picture and '
                        'another (the stronger attack), or the published choice')
    g.add_argument('--precision', choices=PRECISIONS, default='fp32', help='of the network')
    g.add_argument('--imagenet_weights', type=Path, metavar='FILE',
                   help='torchvision ResNet-18 to start from (default: random weights)')
    g = p.add_argument_group('general')
    g.add_argument('--out_dir', type=Path, default=Path('checkpoint'), metavar='DIR',
                   help='folder of the checkpoints')
    return cli.add_common(p)


def load_release(df_path, tables, images, centroid_images, centroid_type, size, flags):
    """(photographs, release pictures, group_of, ids): what both attack scripts work on.

    flags: names of the flags of the table, the photographs and the pictures, for messages.
    """
    path = find_group_table(df_path, tables, flag=flags[0])
    groups = read_groups(path, flag=flags[0])
    if len(groups) < 2:
        raise UserError(f'{flags[0]} {path}: {len(groups)} groups; the attack needs at least 2')
    if not images.is_dir():
        raise UserError(f'{flags[1]} {images}: no such folder')
    pictures = group_pictures(groups, centroid_images, centroid=centroid_type == 'centroid',
                              flag=flags[2])
    table = read_table(path, images)
    own = {i: c for c, group in enumerate(groups) for i in group.members}
    table = table.subset([n for n, i in enumerate(table.ids) if i in own])
    return (load_pictures([[p] for p in table.paths], size),
            load_pictures([[p] for p in pictures], size),
            np.array([own[i] for i in table.ids]), table.ids)


def main(argv=None):
    opts = build_parser().parse_args(argv)
    setup_logging()
    device = cli.resolve_device(opts.device)
    name = f'{opts.centroid_type}_{opts.data}_k{opts.samek}'
    config = PairConfig(k=opts.samek, mult_batch=opts.mult_batch, lr=opts.lr, epochs=opts.epochs,
                        image_size=opts.image_size, precision=opts.precision, pairs=opts.pairs,
                        seed=opts.seed)
    tables = [f'k{opts.samek}_nearest_df.csv', 'groups.csv']
    photos, pictures, group_of, _ = load_release(
        opts.train_df_path, tables, opts.train_image_path, opts.centroid_image_path,
        opts.centroid_type, config.image_size,
        ('--train_df_path', '--train_image_path', '--centroid_image_path'))
    inputs = {'groups': find_group_table(opts.train_df_path, tables)}
    if opts.imagenet_weights is not None:
        inputs['imagenet_weights'] = opts.imagenet_weights
    else:
        log.info('training from random weights; --imagenet_weights starts from a ResNet-18 file')
    run_dir = opts.out_dir / name
    resuming = start_run(run_dir, run_record(
        {**vars(opts), 'device': str(device)}, inputs=inputs, seed=opts.seed), resume=True,
        free_options=('device', 'out_dir'))
    mean, std = standardisation(photos)
    attack = PairAttack(config, mean=mean, std=std, device=device,
                        imagenet_weights=opts.imagenet_weights)
    state = run_dir / 'state.pt'
    if resuming and state.exists():
        attack.load_state(load_weights(state, what='training state'))
        log.info('going on after epoch %d', attack.epoch)
    scalars = ScalarLog(run_dir, resume_step=attack.epoch)
    while attack.epoch < config.epochs:
        record = attack.train_epoch(photos, pictures, group_of)
        scalars.log(attack.epoch, record)
        log.info('epoch %(epoch)d  loss %(loss).4f  accuracy %(accuracy).3f', record)
        # The published names count epochs from 0.
        if attack.epoch % _SAVE_EVERY == 0 or attack.epoch == config.epochs:
            file = opts.out_dir / f'{name}_{attack.epoch - 1}.pth'
            save_torch(file, {k: v for k, v in attack.state().items() if k != 'optimizer'})
        save_torch(state, attack.state())
    scalars.close()
    print(f'attack: {opts.out_dir / f"{name}_{config.epochs - 1}.pth"}')
    return 0


if __name__ == '__main__':
    cli.run(main)
