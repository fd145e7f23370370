"""Grader runs over several seeds: train, test, record, draw."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8

from classification.data import TrainingSet, split_validation
from classification.grader import metric_options
from classification.metrics import bootstrap_intervals, grading_metrics, summarise
from classification.plots import plot_confusion
from classification.probe import ProbeGrader
from classification.settings import Config
from classification.train import grader_checkpoint, train_grader
from datasets.table import REFERABLE_FROM, Table
from evaluation.plots import plot_roc
from training.curves import Panel, plot_curves
from utils.io import save_torch, write_json
from utils.seeds import numpy_generator

log = logging.getLogger(__name__)

SCORES = ('accuracy', 'balanced_accuracy', 'kappa', 'auc_referable', 'auc')
WEIGHTS = {'best': 'best_validation_weights.pt', 'final': 'final_weights.pt'}
GUIDE = 'guide.pt'
_RESULT = 'result.json'


def run_seeds(
    data: TrainingSet,
    pictures: UInt8[np.ndarray, 'n 3 S S'],
    test: Table,
    test_pictures: UInt8[np.ndarray, 'm 3 T T'],
    *,
    config: Config,
    out_dir: Path,
    device: torch.device,
    n_draw: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict | None:
    """Trains one grader per seed of `config` and tests each; returns the JSON-able results.

    A network or a probe, as `config.grader` says (a probe has no epochs and leaves a guide).
    data: TrainingSet with its pictures uint8 [n, 3, S, S]. test: labelled Table with its
    pictures [m, 3, S, S]. n_draw: train each seed on that many pictures, drawn by the seed.
    `out_dir`/seed_<s> holds the weights, records and checkpoint of a seed; finished seeds are
    read, an interrupted one goes on from its checkpoint. stopped: asked after every epoch and
    seed; None is returned where it was true before the end.
    """
    records, prober = [], None
    if config.grader == 'probe':
        prober = ProbeGrader(data, pictures, test, test_pictures, config=config, device=device)
    for seed in config.seeds:
        folder = out_dir / f'seed_{seed}'
        if (folder / _RESULT).exists():
            log.info('seed %d is finished', seed)
            records.append(json.loads((folder / _RESULT).read_text(encoding='utf-8')))
            continue
        rows = _drawn(len(data), n_draw, seed)
        if prober is not None:
            records.append(prober.record(seed, rows, folder / GUIDE))
            write_json(folder / _RESULT, records[-1])
            continue
        record = _run_seed(
            seed,
            rows,
            folder,
            data,
            pictures,
            test,
            test_pictures,
            config=config,
            device=device,
            stopped=stopped,
        )
        if record is None:
            return None
        records.append(record)
    _draw(records, test, config, out_dir)
    return {
        'n_test': len(test),
        'n_test_people': len(set(test.patients)) if test.patients else None,
        'summary': summarise_seeds(records, 'test_best'),
        **({} if prober else {'summary_final_epoch': summarise_seeds(records, 'test_final')}),
        'seeds': [
            {k: v for k, v in r.items() if k not in ('test_score', 'history')} for r in records
        ],
    }


def summarise_seeds(records: Sequence[dict], part: str) -> dict[str, dict | None]:
    """{score: {'mean', 'std', 'values'}} of the scores that are there."""
    return {
        name: summarise([r[part][name] for r in records])
        for name in SCORES
        if name in records[0][part]
    }


def _drawn(n: int, n_draw: int | None, seed: int) -> Int[np.ndarray, ' r']:
    """All n rows, or `n_draw` of them drawn by the seed, sorted."""
    if n_draw is None:
        return np.arange(n)
    draw = numpy_generator(seed, 'same number of photographs')
    return np.sort(draw.choice(n, n_draw, replace=False))


def _run_seed(
    seed: int,
    rows: Int[np.ndarray, ' r'],
    folder: Path,
    data: TrainingSet,
    pictures: UInt8[np.ndarray, 'n 3 S S'],
    test: Table,
    test_pictures: UInt8[np.ndarray, 'm 3 T T'],
    *,
    config: Config,
    device: torch.device,
    stopped: Callable[[], bool],
) -> dict | None:
    settings = config.settings
    groups = None if data.groups is None else [data.groups[i] for i in rows]
    train, val = split_validation(
        data.labels[rows], fraction=config.validation_fraction, seed=seed, groups=groups
    )
    train, val = rows[train], rows[val]

    result = train_grader(
        pictures[train],
        data.targets(config.labels)[train],
        pictures[val],
        data.labels[val],
        settings=settings,
        seed=seed,
        device=device,
        imagenet_weights=config.initial_weights or None,
        folder=folder,
        label=f'seed {seed}  ',
        stopped=stopped,
    )
    if result is None:
        return None
    best_epoch = result.best_epoch or len(result.history)
    record = {
        'seed': seed,
        'n_train': len(train),
        'n_validation': len(val),
        'best_epoch': best_epoch,
        'validation_kappa': result.history[best_epoch - 1]['kappa'],
        'channel_mean': result.mean.tolist(),
        'channel_std': result.std.tolist(),
    }
    options = metric_options(settings)
    for which in ('final', 'best'):
        found = result.use(which).predict(test_pictures)
        record[f'test_{which}'] = grading_metrics(test.grades, found.grades, found.score, **options)
        save_torch(folder / WEIGHTS[which], getattr(result, f'{which}_state'))
    record['test_best']['interval_95'] = bootstrap_intervals(
        test.grades, found.grades, found.score, groups=test.patients, **options
    )
    record['test_score'] = found.score.tolist()
    record['history'] = result.history
    write_json(folder / _RESULT, record)
    grader_checkpoint(folder).path(settings.epochs).unlink(missing_ok=True)
    return record


def _draw(records: Sequence[dict], test: Table, config: Config, out_dir: Path) -> None:
    settings = config.settings
    binary = settings.target == 'binary' and config.grader == 'network'
    threshold = settings.positive_from if binary else REFERABLE_FROM
    positive = test.grades >= threshold
    scores = {f'seed {r["seed"]}': np.asarray(r['test_score']) for r in records}
    plot_roc(
        {seed: (s[positive], s[~positive]) for seed, s in scores.items()},
        out_dir / 'roc.png',
        title=f'grade {threshold} and more, test set',
    )
    names = [f'< {threshold}', f'{threshold} and more'] if binary else None
    total = np.sum([r['test_best']['confusion'] for r in records], axis=0)
    plot_confusion(
        total,
        out_dir / 'confusion.png',
        names=names,
        title=f'test set, sum of {len(records)} seeds',
    )
    if config.grader == 'network':
        histories = {
            f'seed {r["seed"]}': [{'step': h['epoch'], **h} for h in r['history']] for r in records
        }
        panels = [Panel(('loss',), 'training'), Panel(('kappa',), 'validation')]
        plot_curves(out_dir / 'training.png', histories, panels, unit='epoch')


def results_table(results: dict) -> str:
    """Printable mean and spread of every score."""
    lines = (
        [f'features: {results["seeds"][0]["features"]}']
        if 'features' in results['seeds'][0]
        else []
    )
    lines += [f'{"score":<20}{"mean":>8}{"std":>8}   seeds']
    for name, score in results['summary'].items():
        std = '-' if score['std'] is None else f'{score["std"]:.3f}'
        lines.append(
            f'{name:<20}{score["mean"]:>8.3f}{std:>8}   '
            + ' '.join(f'{v:.3f}' for v in score['values'])
        )
    return '\n'.join(lines)
