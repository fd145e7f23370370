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

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path

from jaxtyping import UInt8

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging
from collections.abc import Sequence

import numpy as np
import yaml

from classification.experiment import results_table, run_seeds
from classification.inputs import test_table, training_set
from classification.settings import Config, load_config
from datasets.pictures import load_pictures
from models.features.pretrained import WHEELS, wheel_file
from training.run import open_folder
from utils.cli import (
    boolean,
    names_flags,
    nonnegative_int,
    parser_of,
    positive_int,
    resolve_device,
    run,
)
from utils.errors import UserError
from utils.io import sha256_bytes, write_json, write_text
from utils.logs import setup_logging
from utils.options import add_flags, flag_name
from utils.runs import RECORD_NAME, run_record
from utils.signals import stop_on_signal

log = logging.getLogger(__name__)

# Paths: their contents are compared when a run goes on.
_FREE = ('release', 'images_path', 'test_images_path', 'train_images_path', 'baseline')
# Entries of the configuration that a flag overrides.
_OVERRIDING = (
    'grader',
    'features',
    'features_arch',
    'target',
    'labels',
    'arch',
    'image_size',
    'epochs',
    'batch_size',
    'precision',
    'initial_weights',
)


def build_parser() -> argparse.ArgumentParser:
    p = parser_of(__doc__)
    _add_published(p.add_argument_group('published flags'))
    _add_data(p.add_argument_group('training data'))
    g = p.add_argument_group('training (each overrides the configuration)')
    add_flags(g, Config, names=_OVERRIDING, default=None)
    g.add_argument(
        '--seed',
        '--seeds',
        dest='seeds',
        type=nonnegative_int,
        nargs='+',
        metavar='INT',
        help='one training per seed',
    )
    g = p.add_argument_group('general')
    g.add_argument('--device', default='auto', help='cpu, cuda, cuda:N or auto')
    g.add_argument(
        '--out_dir',
        type=Path,
        metavar='DIR',
        help='output folder (default: save_path of the configuration and the published suffix)',
    )
    return p


def _add_published(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        '-config',
        default='aptos.yaml',
        metavar='YAML',
        help='configuration: a path, or a file name in classification/configs',
    )
    g.add_argument(
        '-overwrite',
        action='store_true',
        help='replace the run in the output folder instead of resuming it',
    )
    g.add_argument('-print_config', action='store_true', help='print the configuration')
    for name, default in (('k', 'k5'), ('crop', 'crop4'), ('lambda1', '1e2'), ('lambda2', '1e-6')):
        g.add_argument(
            f'--{name}',
            default=default,
            metavar='TEXT',
            help="part of the default output folder's name",
        )
    g.add_argument('--images_path', type=Path, metavar='DIR', help='synthetic pictures')
    g.add_argument('--test_images_path', type=Path, metavar='DIR', help='real test photographs')
    g.add_argument(
        '--df',
        '--table',
        type=Path,
        metavar='CSV',
        help='groups: id_code, centers (and release_name)',
    )
    g.add_argument(
        '--labels_train', type=Path, metavar='CSV', help='grades of the source photographs'
    )
    g.add_argument('--labels_test', type=Path, metavar='CSV', help='grades of the test photographs')
    g.add_argument(
        '--is_centroid',
        type=boolean,
        default=False,
        metavar='BOOL',
        help='read <id>_centroids.png, the plain latent averages',
    )


def _add_data(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        '--release',
        type=Path,
        metavar='DIR',
        help='release folder of a k-SALSA run (instead of --images_path and --df)',
    )
    g.add_argument(
        '--baseline',
        metavar='WHAT',
        help='train on: real, real-same-n (as many as there are groups), '
        'pixel-average, random-average (of --group_size people), or a folder '
        'of <id>.png with the grades of --labels_train (e.g. reconstructions)',
    )
    g.add_argument(
        '--train_images_path',
        type=Path,
        metavar='DIR',
        help='source photographs, for the baselines and to notice identical ones among '
        'the test photographs (default: beside --labels_train)',
    )
    g.add_argument(
        '--n_train', type=positive_int, metavar='INT', help='number of pictures for real-same-n'
    )
    g.add_argument(
        '--group_size',
        type=positive_int,
        default=5,
        metavar='INT',
        help='people behind each picture of random-average',
    )
    g.add_argument('--train_split', metavar='NAME', help='rows of --labels_train with that split')
    g.add_argument('--test_split', metavar='NAME', help='rows of --labels_test with that split')


def output_folder(opts: argparse.Namespace, config: Config) -> Path:
    """--out_dir, or save_path with the published suffix (and what a baseline is called)."""
    if opts.out_dir is not None:
        return opts.out_dir
    parts = [config.save_path, opts.k, opts.crop, opts.lambda1, opts.lambda2]
    if opts.baseline:
        parts.append(Path(opts.baseline).name)
    elif opts.is_centroid:
        parts.append('centroid')
    return Path('_'.join(parts))


def remove_run(folder: Path) -> None:
    """Deletes a run of this tool; UserError when the folder holds anything else."""
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / RECORD_NAME).exists():
        raise UserError(
            f'-overwrite: {folder} holds no run of this tool, so it is left alone; '
            'choose another --out_dir'
        )
    shutil.rmtree(folder)


def initial_weights(config: Config) -> str:
    """What a grader starts from, in a word: random, file, or the name of a known network."""
    given = config.features if config.grader == 'probe' else config.initial_weights
    return given if given in WHEELS else 'file' if given else 'random'


def record_of(
    opts: argparse.Namespace,
    config: Config,
    training: UInt8[np.ndarray, 'n 3 S S'],
    test: UInt8[np.ndarray, 'm 3 T T'],
) -> dict:
    """The run record: settings, and digests of tables, pictures and weights."""
    inputs = {name: getattr(opts, name) for name in ('labels_train', 'labels_test', 'df')}
    name = 'features' if config.grader == 'probe' else 'initial_weights'
    if value := getattr(config, name):
        inputs[name] = wheel_file(value) if value in WHEELS else Path(value)
        if not inputs[name].is_file():
            raise UserError(f'{name}: {value} is no file and none of {", ".join(WHEELS)}')
    if opts.release is not None:
        inputs['labels of the release'] = opts.release / 'labels.csv'
    settings = {k: v for k, v in config.to_dict().items() if k != name}  # compared by content
    options = {
        'config': settings,
        **{
            name: getattr(opts, name)
            for name in (
                *_FREE,
                'n_train',
                'group_size',
                'is_centroid',
                'train_split',
                'test_split',
            )
        },
    }
    record = run_record(options, inputs=inputs)
    record['inputs'] |= {
        'training pictures': sha256_bytes(training.data),
        'test photographs': sha256_bytes(test.data),
    }
    return record


@names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    config = load_config(
        opts.config,
        seeds=opts.seeds,
        **{name: getattr(opts, flag_name(Config, name)) for name in _OVERRIDING},
    )
    if opts.print_config:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end='')
    setup_logging()
    device = resolve_device(opts.device)
    data, source, n_draw = training_set(opts)
    data.targets(config.labels)
    test, dropped = test_table(opts, source, config.settings.positive_from)
    log.info('%d training pictures, %d test photographs', n_draw or len(data), len(test))
    if config.grader == 'network' and not config.initial_weights:
        log.info('starting from random weights; --imagenet_weights starts from a file')

    size = config.settings.image_size
    pictures = load_pictures(data.sources, size), load_pictures(test, size)
    out_dir = output_folder(opts, config)
    if opts.overwrite:
        remove_run(out_dir)
    record = partial(record_of, opts, config, *pictures)
    open_folder(out_dir, record, resume=True, free_options=_FREE)
    write_text(out_dir / 'config.yaml', yaml.safe_dump(config.to_dict(), sort_keys=False))
    with stop_on_signal() as stopped:
        results = run_seeds(
            data,
            pictures[0],
            test,
            pictures[1],
            config=config,
            out_dir=out_dir,
            device=device,
            n_draw=n_draw,
            stopped=stopped,
        )
    if results is None:
        log.info('stopped; the same command goes on')
        return 128 + (stopped.number or 0)
    results = {
        'initial_weights': initial_weights(config),
        'test_rows_dropped': dropped,
        'test_people_checked': source is not None,
        **results,
    }
    write_json(out_dir / 'results.json', results)
    print(results_table(results))
    log.info('results in %s', out_dir)
    return 0


if __name__ == '__main__':
    run(main)
