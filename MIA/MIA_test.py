"""Tests a trained membership attack on the release of people it has not seen.

    python MIA/MIA_test.py --ckpt_path checkpoint/centroid_ours_aptos_k5_49.pth --run RUN2
    python MIA/MIA_test.py --ckpt_path checkpoint/centroid_ours_aptos_k5_49.pth \\
        --test_df_path RUN2/private --test_image_path photos/ \\
        --centroid_image_path RUN2/release/images

The first half of the groups are targets; every photograph is scored against every target picture.
The people of the other half who stand behind no target are the non-members. Prints and writes the
published number (precision at --topk), and AUC, balanced accuracy and the true positive rate at
1 % and 0.1 % false positives with 95 % intervals; draws the ROC curve on logarithmic axes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Sequence

from evaluation.attacks.groups import pair_results
from evaluation.attacks.pairs import load_pair_attack
from evaluation.plots import plot_roc
from MIA.flags import add_release_flags, read_release
from utils import cli
from utils.errors import UserError
from utils.io import save_npy, write_json
from utils.logs import setup_logging
from utils.runs import run_record


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    g = p.add_argument_group('published flags')
    g.add_argument(
        '--ckpt_path',
        type=Path,
        metavar='FILE',
        help='attack of MIA_train.py (default: the one of --ckpt_epochs that '
        'MIA_train.py leaves in checkpoint/)',
    )
    g.add_argument(
        '--ckpt_epochs',
        type=cli.nonnegative_int,
        default=49,
        metavar='INT',
        help='part of the names of attack and score file',
    )
    g.add_argument(
        '--topk',
        type=cli.positive_int,
        default=5,
        metavar='INT',
        help='photographs that the attacker names for every picture',
    )
    add_release_flags(g, 'test')
    g = p.add_argument_group('general')
    g.add_argument(
        '--out_dir',
        type=Path,
        default=Path('mia_results'),
        metavar='DIR',
        help='folder of the results',
    )
    return cli.add_common(p)


def report(found: dict) -> str:
    """The results for people to read."""
    lines = [
        f'precision at {found["topk"]}: {100 * found["precision_at_k"]:.2f} % '
        f'(chance {100 * found["chance_precision"]:.2f} %)'
    ]
    for part in ('membership', 'pairs'):
        for metric in ('auc', 'balanced_accuracy', 'tpr_at_1pct_fpr', 'tpr_at_0.1pct_fpr'):
            v = found[part][metric]
            note = '' if v.get('resolved', True) else '  (too few others to resolve this rate)'
            lines.append(
                f'{part}: {metric} {v["value"]:.3f} [{v["low"]:.3f}, {v["high"]:.3f}]{note}'
            )
    return '\n'.join(lines)


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    name = f'{opts.centroid_type}k{opts.samek}_{opts.data}_val_score_matrices{opts.ckpt_epochs}'
    target = opts.out_dir / f'{name}.npy'
    if target.exists():
        raise UserError(f'{target} exists; choose another --out_dir or --data')
    checkpoint = opts.ckpt_path or Path(
        f'checkpoint/{opts.centroid_type}_{opts.data}_k{opts.samek}_{opts.ckpt_epochs}.pth'
    )
    attack = load_pair_attack(checkpoint, cli.resolve_device(opts.device))
    photos, pictures, group_of, people = read_release(opts, 'test', attack.config.image_size)
    if opts.topk > len(photos):
        raise UserError(f'--topk {opts.topk}: there are only {len(photos)} photographs')
    scores = attack.scores(photos, pictures[: len(pictures) // 2])
    found, curves = pair_results(scores[..., 1], group_of, people, opts.topk, seed=opts.seed)
    found['run'] = run_record(vars(opts), inputs={'ckpt_path': checkpoint}, seed=opts.seed)
    save_npy(target, scores)
    write_json(opts.out_dir / f'{name}.json', found)
    plot_roc(curves, opts.out_dir / f'{name}_roc.png', title='pair attack', logarithmic=True)
    print(f'{report(found)}\nresults: {opts.out_dir / name}.json')
    return 0


if __name__ == '__main__':
    cli.run(main)
