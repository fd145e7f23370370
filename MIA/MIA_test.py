"""Tests a trained membership attack on the release of people it has not seen.

    python MIA/MIA_test.py --ckpt_path checkpoint/centroid_ours_aptos_k5_49.pth \\
        --test_df_path RUN2/private --test_image_path photos/ \\
        --centroid_image_path RUN2/release/images

The first half of the groups are targets; every photograph is scored against every target picture.
Those of the other half stand for people who are not in the release. Prints and writes the
published number (precision at --topk), and AUC, balanced accuracy and the true positive rate at
1 % and 0.1 % false positives with 95 % intervals; draws the ROC curve on logarithmic axes.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging

import numpy as np

from evaluation.attacks.metrics import attack_metrics, plot_roc, precision_at_k
from evaluation.attacks.pairs import load_pair_attack
from MIA.MIA_train import TYPES, load_release
from utils import cli
from utils.errors import UserError
from utils.io import save_npy, write_json
from utils.logs import setup_logging
from utils.runs import run_record

log = logging.getLogger(__name__)


def build_parser():
    p = cli.parser(__doc__.splitlines()[0], epilog='\n'.join(__doc__.splitlines()[1:]))
    g = p.add_argument_group('published flags')
    g.add_argument('--samek', type=cli.positive_int, default=5, metavar='INT',
                   help='group size k of the release')
    g.add_argument('--ckpt_epochs', type=cli.nonnegative_int, default=49, metavar='INT',
                   help='part of the name of the score file')
    g.add_argument('--topk', type=cli.positive_int, default=5, metavar='INT',
                   help='photographs that the attacker names for every picture')
    g.add_argument('--centroid_type', choices=TYPES, default=TYPES[0],
                   help='k-SALSA pictures, or plain averages (<id>_centroids.png)')
    g.add_argument('--test_df_path', type=Path, required=True, metavar='PATH',
                   help='group table, or the folder that holds TEST_k<k>_nearest_df.csv, '
                        'k<k>_nearest_df.csv or groups.csv')
    g.add_argument('--ckpt_path', type=Path, required=True, metavar='FILE',
                   help='attack of MIA_train.py')
    g.add_argument('--test_image_path', type=Path, required=True, metavar='DIR',
                   help='the photographs of the second release')
    g.add_argument('--centroid_image_path', type=Path, required=True, metavar='DIR',
                   help='pictures of the second release')
    g.add_argument('--data', default='aptos', metavar='TEXT', help='part of the file names')
    g = p.add_argument_group('general')
    g.add_argument('--out_dir', type=Path, default=Path('mia_results'), metavar='DIR',
                   help='folder of the results')
    return cli.add_common(p)


def measure(scores, group_of, topk, *, seed):
    """Results of softmax scores [C, n] against targets 0..C-1 for photographs of all groups.

    `membership` asks whether a photograph stands behind any target picture (its best score
    counts); `pairs` whether it stands behind a given one.
    """
    n_targets = len(scores)
    same = group_of[None] == np.arange(n_targets)[:, None]
    known = group_of < n_targets
    best = scores.max(0)
    found = {'precision_at_k': precision_at_k(scores, same, topk), 'topk': topk,
             'chance_precision': float(same.mean()),
             'n_targets': n_targets, 'n_photographs': scores.shape[1],
             'membership': attack_metrics(best[known], best[~known], seed=seed),
             'pairs': attack_metrics(scores[same], scores[~same], seed=seed)}
    curves = {'in the release at all': (best[known], best[~known]),
              'behind a given picture': (scores[same], scores[~same])}
    return found, curves


def main(argv=None):
    opts = build_parser().parse_args(argv)
    setup_logging()
    name = f'{opts.centroid_type}k{opts.samek}_{opts.data}_val_score_matrices{opts.ckpt_epochs}'
    target = opts.out_dir / f'{name}.npy'
    if target.exists():
        raise UserError(f'{target} exists; choose another --out_dir or --data')
    attack = load_pair_attack(opts.ckpt_path, cli.resolve_device(opts.device))
    tables = [f'TEST_k{opts.samek}_nearest_df.csv', f'k{opts.samek}_nearest_df.csv', 'groups.csv']
    photos, pictures, group_of, _ = load_release(
        opts.test_df_path, tables, opts.test_image_path, opts.centroid_image_path,
        opts.centroid_type, attack.config.image_size,
        ('--test_df_path', '--test_image_path', '--centroid_image_path'))
    n_targets = len(pictures) // 2
    if opts.topk > len(photos):
        raise UserError(f'--topk {opts.topk}: there are only {len(photos)} photographs')
    scores = attack.scores(photos, pictures[:n_targets])
    found, curves = measure(scores[..., 1], group_of, opts.topk, seed=opts.seed)
    found['run'] = run_record(vars(opts), inputs={'ckpt_path': opts.ckpt_path}, seed=opts.seed)
    save_npy(target, scores)
    write_json(opts.out_dir / f'{name}.json', found)
    plot_roc(curves, opts.out_dir / f'{name}_roc.png', title='pair attack')
    print(f'precision at {opts.topk}: {100 * found["precision_at_k"]:.2f} % '
          f'(chance {100 * found["chance_precision"]:.2f} %)')
    for part in ('membership', 'pairs'):
        for metric in ('auc', 'balanced_accuracy', 'tpr_at_1pct_fpr', 'tpr_at_0.1pct_fpr'):
            v = found[part][metric]
            note = '' if v.get('resolved', True) else '  (too few others to resolve this rate)'
            print(f'{part}: {metric} {v["value"]:.3f} [{v["low"]:.3f}, {v["high"]:.3f}]{note}')
    print(f'results: {opts.out_dir / name}.json')
    return 0


if __name__ == '__main__':
    cli.run(main)
