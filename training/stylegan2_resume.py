"""Where a generator training begins: anew, exactly at a snapshot, or from its networks only."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

from models.loading import named_tensors
from training.stylegan2_config import TrainConfig, check_division, widths
from training.stylegan2_loop import Trainer
from training.stylegan2_run import SNAPSHOT_PREFIX, snapshots
from utils.errors import UserError
from utils.io import load_weights

log = logging.getLogger(__name__)


class Start(NamedTuple):
    """What a run begins from: a weight file's contents (empty: anew), and whether exactly there."""

    weights: dict[str, Any] = {}
    path: Path = Path()
    exact: bool = False
    same_folder: bool = False

    def settings(self) -> dict:
        """What shaped an exactly continued run beside its configuration, its seed included."""
        if not self.exact:
            return {}
        return {'seed': self.weights['seed'], **self.weights.get('settings', {})}


def read_start(path: Path | None, *, transfer: bool = False, freezed: int = 0) -> Start:
    """Reads the run folder, snapshot or generator file `path` (None: begin anew).

    transfer: take only the networks of a snapshot. freezed: discriminator layers to be frozen.
    UserError when it holds no networks, or no discriminator to freeze.
    """
    if path is None:
        return Start()
    if path.is_dir():
        found = snapshots(path).latest()
        if found is None:
            raise UserError(
                f'`resume` {path}: no loadable {SNAPSHOT_PREFIX}*.pt in it; begin '
                'anew, with a lower `snap` for snapshots more often'
            )
        return Start(found[0], found[1], True, True)
    weights = load_weights(path, what='generator file or training snapshot')
    if not isinstance(weights, dict) or 'g_ema' not in weights:
        raise UserError(f'`resume` {path}: neither a training snapshot nor a generator file')
    for name in ('g_ema', 'g', 'd'):
        if name in weights:
            named_tensors(
                weights[name],
                source=f'`resume` {path}: {name}',
                what='discriminator' if name == 'd' else 'generator',
            )
    if not isinstance(weights.get('config', {}), dict):
        raise UserError(f'`resume` {path}: its "config" is none')
    if freezed and 'd' not in weights:
        raise UserError(
            f'`freezed`: {path} holds no discriminator; give a snapshot '
            f'({SNAPSHOT_PREFIX}*.pt) with `transfer`=1, or a converted .pkl'
        )
    return Start(weights, path, 'g_optim' in weights and 'n_img' in weights and not transfer)


def check_flags(start: Start, given: dict[str, object]) -> None:
    """UserError when the flags `given` contradict the snapshot that is gone on from exactly."""
    if not start.exact or start.same_folder:  # a folder's record has been compared already
        return
    try:
        changes = contradictions(start.weights['config'], start.settings(), given)
    except ValueError as error:
        raise UserError(str(error)) from error
    if changes:
        raise UserError(
            f'{start.path} would go on exactly, but its training had other settings '
            f'({"; ".join(changes)}); leave those flags out, or give `transfer`=1 to '
            'begin anew from its networks'
        )


def load_start(trainer: Trainer, start: Start) -> None:
    """Fills `trainer` from `start`; UserError when it does not fit."""
    if not start.weights:
        return
    if not start.exact:
        trainer.transfer(start.weights, source=start.path)
        log.info('transfer learning from %s', start.path)
        return
    if not start.same_folder and start.weights['n_img'] >= trainer.config.kimg * 1000:
        raise UserError(
            f'{start.path} is at {start.weights["n_img"] / 1000:g} kimg already, and '
            'would go on exactly; raise `kimg`, or give `transfer`=1 to begin anew '
            'from its networks'
        )
    passes = start.weights['config']['batch_gpu']
    if passes != trainer.config.batch_gpu:
        log.warning(
            '%d images per pass, %d until now: the settings stay, but other random '
            'numbers are drawn',
            trainer.config.batch_gpu,
            passes,
        )
    trainer.load_state(start.weights, source=start.path)
    log.info('going on exactly from %s', start.path)


def resumed_config(
    saved: dict, n_gpus: int, *, kimg: float | None = None, batch_gpu: int | None = None
) -> TrainConfig:
    """The configuration of a training that goes on, from the one its snapshot holds.

    All that shapes what is learnt stays, whatever the number of processes, which `auto` and
    `small` would take into account. kimg: another length. batch_gpu: other passes; None keeps
    them, or takes the largest that divide a process's share of the batch. ValueError when the
    batch cannot be divided among `n_gpus` processes.
    """
    config = TrainConfig(**saved)
    if config.batch % n_gpus:
        raise ValueError(
            f'the training has {config.batch} images per step, which {n_gpus} '
            'processes cannot share; choose `gpus` so that they can'
        )
    share = config.batch // n_gpus
    passes = batch_gpu or max(n for n in range(1, config.batch_gpu + 1) if share % n == 0)
    config = dataclasses.replace(config, kimg=kimg or config.kimg, batch_gpu=passes)
    check_division(config, n_gpus)
    return config


def contradictions(saved: dict, settings: dict, given: dict) -> list[str]:
    """What the flags `given` (name -> value) ask for that a snapshot's training did otherwise.

    saved: the snapshot's configuration; settings: what else it remembers of its run. Lengths,
    passes and flags that neither knows are left out. ValueError for a `cbase` that does not fit.
    """
    config = TrainConfig(**saved).to_dict()
    known = {
        **{k: v for k, v in config.items() if k not in ('kimg', 'batch_gpu', 'channels')},
        'map_depth': config['n_mlp'],
        **settings,
    }
    found = [
        f'`{name}`: was {known[name]}, now {value}'
        for name, value in given.items()
        if name in known and value != known[name]
    ]
    named = {name: given[name] for name in ('cbase', 'cmax') if name in given}
    channels = {int(r): c for r, c in saved['channels'].items()}
    asked = widths(channels, saved['size'], named.get('cbase'), named.get('cmax'))
    if asked != channels:
        found.append(f'{" and ".join(f"`{w}`" for w in named)}: was {channels}, now {asked}')
    return found
