"""Trains a grader of diabetic retinopathy on synthetic pictures and tests it on real eyes.

    python classification/main.py -config aptos.yaml --release RUN/release \\
        --labels_test test.csv --test_images_path test_images --out_dir runs/grader

    python classification/main.py -config aptos.yaml --k k5 --crop crop4 --lambda1 1e2 \\
        --lambda2 1e-6 --images_path RESULT_FOLDER --df k5_nearest_df.csv \\
        --labels_train aptos_val_3000.csv --labels_test val_splited.csv \\
        --test_images_path aptos_images

Several seeds are trained; results.json holds every seed's scores, their mean and spread, beside
pictures of the confusion matrix and the ROC curve. The epoch is chosen on a validation set that
is split off the training pictures; the test set is only scored. The same command goes on where
an interrupted run stopped.
"""
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging

import yaml

from classification.data import (
    graded_groups,
    photograph_set,
    pixel_average_set,
    published_set,
    release_set,
    without_known_patients,
)
from classification.experiment import run_seeds
from classification.metrics import check_test_labels
from classification.settings import LABELS, PRECISIONS, TARGETS, load_config
from datasets.pictures import load_pictures
from datasets.table import read_table
from models.resnet import ARCHS
from utils.cli import boolean, nonnegative_int, parser, positive_int, resolve_device, run
from utils.errors import UserError
from utils.io import write_json, write_text
from utils.logs import setup_logging
from utils.runs import RECORD_NAME, run_record, start_run

log = logging.getLogger(__name__)


def build_parser():
    p = parser(__doc__.splitlines()[0], epilog='\n'.join(__doc__.splitlines()[1:]))
    g = p.add_argument_group('published flags')
    g.add_argument('-config', default='aptos.yaml', metavar='YAML',
                   help='configuration: a path, or a file name in classification/configs')
    g.add_argument('-overwrite', action='store_true',
                   help='replace the run in the output folder instead of resuming it')
    g.add_argument('-print_config', action='store_true', help='print the configuration')
    for name, default in (('k', 'k5'), ('crop', 'crop4'), ('lambda1', '1e2'),
                          ('lambda2', '1e-6')):
        g.add_argument(f'--{name}', default=default, metavar='TEXT',
                       help='part of the default output folder\'s name')
    g.add_argument('--images_path', type=Path, metavar='DIR', help='synthetic pictures')
    g.add_argument('--test_images_path', type=Path, metavar='DIR', help='real test photographs')
    g.add_argument('--df', type=Path, metavar='CSV',
                   help='groups: id_code, centers (and release_name)')
    g.add_argument('--labels_train', type=Path, metavar='CSV',
                   help='grades of the source photographs')
    g.add_argument('--labels_test', type=Path, metavar='CSV',
                   help='grades of the test photographs')
    g.add_argument('--is_centroid', type=boolean, default=False, metavar='BOOL',
                   help='read <id>_centroids.png, the plain latent averages')
    g = p.add_argument_group('training data')
    g.add_argument('--release', type=Path, metavar='DIR',
                   help='release folder of a k-SALSA run (instead of --images_path and --df)')
    g.add_argument('--baseline', metavar='WHAT',
                   help='train on: real, real-same-n (as many as there are groups), '
                        'pixel-average, or a folder of <id>.png with the grades of '
                        '--labels_train (e.g. reconstructions)')
    g.add_argument('--train_images_path', type=Path, metavar='DIR',
                   help='source photographs for the baselines (default: beside --labels_train)')
    g.add_argument('--n_train', type=positive_int, metavar='INT',
                   help='number of pictures for real-same-n')
    g.add_argument('--train_split', metavar='NAME', help='rows of --labels_train with that split')
    g.add_argument('--test_split', metavar='NAME', help='rows of --labels_test with that split')
    g = p.add_argument_group('training (each overrides the configuration)')
    g.add_argument('--target', choices=TARGETS, help='what the grader predicts')
    g.add_argument('--labels', choices=LABELS, help='majority grade, or shares of the grades')
    g.add_argument('--arch', choices=ARCHS, help='network')
    g.add_argument('--image_size', type=positive_int, metavar='PX', help='side of the pictures')
    g.add_argument('--epochs', type=positive_int, metavar='INT', help='epochs')
    g.add_argument('--batch_size', type=positive_int, metavar='INT', help='pictures per step')
    g.add_argument('--precision', choices=PRECISIONS, help='of the network')
    g.add_argument('--seed', '--seeds', dest='seeds', type=nonnegative_int, nargs='+',
                   metavar='INT', help='one training per seed')
    g.add_argument('--imagenet_weights', type=Path, metavar='FILE',
                   help='ResNet weights to start from: torchvision\'s, or a content encoder '
                        '(default: random weights)')
    g = p.add_argument_group('general')
    g.add_argument('--device', default='auto', help='cpu, cuda, cuda:N or auto')
    g.add_argument('--out_dir', type=Path, metavar='DIR',
                   help='output folder (default: save_path of the configuration and the '
                        'published suffix)')
    return p


def required(opts, *names):
    missing = [f'--{n}' for n in names if getattr(opts, n) is None]
    if missing:
        raise UserError(f'{", ".join(missing)} needed; see --help')


def source_table(opts, *, ids_only=True):
    return read_table(opts.labels_train, opts.train_images_path, require_label=True,
                      ids_only=ids_only, split=opts.train_split)


def training_set(opts):
    """(TrainingSet, source Table or None, number of pictures to draw or None)."""
    if opts.release is not None:
        if opts.images_path or opts.baseline:
            raise UserError('--release goes without --images_path and --baseline')
        return release_set(opts.release), source_table(opts) if opts.labels_train else None, None
    required(opts, 'labels_train')
    if opts.baseline is None:
        if opts.images_path is None:
            raise UserError('give --release, --images_path with --df, or --baseline')
        required(opts, 'df')
        table = source_table(opts)
        grades = dict(zip(table.ids, table.labels))
        return published_set(graded_groups(opts.df, grades), grades, opts.images_path,
                             centroid=opts.is_centroid), table, None
    if opts.baseline in ('real', 'real-same-n'):
        table = source_table(opts, ids_only=False)
        n = number_of_groups(opts, table) if opts.baseline == 'real-same-n' else None
        return photograph_set(table), table, n
    if opts.baseline == 'pixel-average':
        required(opts, 'df')
        table = source_table(opts, ids_only=False)
        grades = dict(zip(table.ids, table.labels))
        return pixel_average_set(graded_groups(opts.df, grades), grades,
                                 dict(zip(table.ids, table.paths))), table, None
    folder = Path(opts.baseline)
    if not folder.is_dir():
        raise UserError(f'--baseline {opts.baseline}: neither real, real-same-n, pixel-average '
                        'nor a folder')
    if (folder / 'labels.csv').is_file():
        return release_set(folder), source_table(opts), None
    table = read_table(opts.labels_train, folder, require_label=True, split=opts.train_split)
    return photograph_set(table), table, None


def number_of_groups(opts, table):
    if opts.n_train is not None:
        n = opts.n_train
    else:
        if opts.df is None:
            raise UserError('--baseline real-same-n needs --n_train, or --df to count groups')
        n = len(graded_groups(opts.df, dict(zip(table.ids, table.labels))))
    if n > len(table):
        raise UserError(f'--n_train {n}: {opts.labels_train} has only {len(table)} photographs')
    return n


def test_table(opts, source, positive_from):
    """The test Table without people of the source table, and how many rows that dropped."""
    required(opts, 'labels_test')
    table = read_table(opts.labels_test, opts.test_images_path, require_label=True,
                       split=opts.test_split)
    dropped = 0
    if source is not None:
        table, dropped = without_known_patients(table, source)
    if dropped:
        log.warning('%d test photographs left out: they or their patients are in '
                    '--labels_train', dropped)
    check_test_labels(table.labels, positive_from=positive_from)
    return table, dropped


def output_folder(opts, config):
    """--out_dir, or save_path with the published suffix (and what a baseline is called)."""
    if opts.out_dir is not None:
        return opts.out_dir
    parts = [config.save_path, opts.k, opts.crop, opts.lambda1, opts.lambda2]
    if opts.baseline:
        parts.append(Path(opts.baseline).name)
    elif opts.is_centroid:
        parts.append('centroid')
    return Path('_'.join(parts))


def remove_run(folder):
    """Deletes a run of this tool; UserError when the folder holds anything else."""
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / RECORD_NAME).exists():
        raise UserError(f'-overwrite: {folder} holds no run of this tool, so it is left alone; '
                        'choose another --out_dir')
    shutil.rmtree(folder)


def results_table(results):
    """Printable mean and spread of every score."""
    lines = [f'{"score":<20}{"mean":>8}{"std":>8}   seeds']
    for name, score in results['summary'].items():
        std = '-' if score['std'] is None else f'{score["std"]:.3f}'
        lines.append(f'{name:<20}{score["mean"]:>8.3f}{std:>8}   '
                     + ' '.join(f'{v:.3f}' for v in score['values']))
    return '\n'.join(lines)


def main(argv=None):
    opts = build_parser().parse_args(argv)
    config = load_config(opts.config, target=opts.target, labels=opts.labels, arch=opts.arch,
                         image_size=opts.image_size, epochs=opts.epochs,
                         batch_size=opts.batch_size, precision=opts.precision, seeds=opts.seeds)
    if opts.print_config:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end='')
    setup_logging()
    device = resolve_device(opts.device)
    data, source, n_draw = training_set(opts)
    data.targets(config.labels)
    test, dropped = test_table(opts, source, config.settings.positive_from)
    log.info('%d training pictures, %d test photographs', n_draw or len(data), len(test))
    if opts.imagenet_weights is None:
        log.info('starting from random weights; --imagenet_weights starts from a file')

    out_dir = output_folder(opts, config)
    if opts.overwrite:
        remove_run(out_dir)
    inputs = {name: getattr(opts, name) for name in ('labels_train', 'labels_test', 'df',
                                                     'imagenet_weights')}
    if opts.release is not None:
        inputs['release'] = opts.release / 'labels.csv'
    options = {'config': config.to_dict(), **{name: getattr(opts, name) for name in (
        'release', 'images_path', 'test_images_path', 'train_images_path', 'baseline', 'n_train',
        'is_centroid', 'train_split', 'test_split')}}
    start_run(out_dir, run_record(options, inputs=inputs), resume=True)
    write_text(out_dir / 'config.yaml', yaml.safe_dump(config.to_dict(), sort_keys=False))
    setup_logging(out_dir / 'log.txt')

    size = config.settings.image_size
    results = run_seeds(data, load_pictures(data.sources, size), test,
                        load_pictures([[p] for p in test.paths], size), config=config,
                        out_dir=out_dir, device=device, n_draw=n_draw,
                        imagenet_weights=opts.imagenet_weights)
    results = {'initial_weights': 'file' if opts.imagenet_weights else 'random',
               'test_rows_dropped': dropped, **results}
    write_json(out_dir / 'results.json', results)
    print(results_table(results))
    log.info('results in %s', out_dir)
    return 0


if __name__ == '__main__':
    run(main)
