"""Trains encoder and generator together, for pictures of mean latents that look like eyes.

    python scripts/new_generator.py --channels 256 256 256 96 48 16 --dest=untrained128.pt
    python scripts/train_restyle_joint.py --exp_dir=runs/joint --train_path=right128.zip \\
        --test_path=right_val/ --stylegan_weights=untrained128.pt --encoder_size=128 \\
        --batch_size=10 --learning_rate=2e-4 --amp=bf16 --no-mirror --max_steps=10000 \\
        --progressive_start=1000000000

The photographs show eyes of one side. With --progressive_start as above one latent serves all
styles. Run folder, resuming and processes are those of scripts/train_restyle_psp.py; the other
scripts use the checkpoints with --n_iters_per_batch=1. The mapping network is not trained, so
samples of a new generator mean nothing.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from criteria.laplacian import N_BANDS, band_variances
from datasets.pictures import Pictures
from models.features.pretrained import load_feature_network
from models.psp import PSP
from scripts import train_restyle_e4e, train_restyle_psp
from training.coach_restyle_joint import JointCoach, JointConfig, JointOptions
from training.picture_game import GameConfig
from training.reconstruction import BandTerm
from utils import cli
from utils.errors import UserError
from utils.images import from_uint8
from utils.options import add_flags, build

DEFAULT_ENCODER = 'LightProgressiveEncoder'
_VARIANCE_IMAGES = 512


def build_parser() -> argparse.ArgumentParser:
    p = train_restyle_e4e.build_parser(__doc__, DEFAULT_ENCODER)
    p.set_defaults(train_decoder=True, n_iters_per_batch=1, l2_lambda=1.0, optim_name='adam')
    add_flags(p, JointOptions)
    return p


def variances(pictures: Pictures) -> list[float]:
    """Of the bands of the first photographs of a set, see criteria.laplacian."""
    some = [np.asarray(pictures[i]) for i in range(min(len(pictures), _VARIANCE_IMAGES))]
    found = band_variances(from_uint8(torch.from_numpy(np.stack(some))))
    if min(found) <= 0:
        raise UserError('`train_path`: the photographs are all the same')
    return found


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)

    def make_coach(psp: PSP, train_set: Pictures, *arguments: Any, **options: Any) -> JointCoach:
        if psp.input_size % 2**N_BANDS:
            raise UserError(f'`encoder_size` {psp.input_size}: not a multiple of {2**N_BANDS}')
        if not opts.checkpoint_path:
            with torch.no_grad():
                encoder: Any = psp.encoder
                encoder.head.weight.mul_(opts.first_spread)
        options['losses']['bands'] = BandTerm(opts.band_lambdas, variances(train_set)), 1.0
        game = build(GameConfig, vars(opts))
        return JointCoach(
            psp,
            train_set,
            *arguments,
            e4e=train_restyle_e4e.e4e_config(opts, psp),
            joint=dataclasses.replace(
                build(JointConfig, vars(opts)), game=game if game.ratio else None
            ),
            features=load_feature_network('lite0').to(options['device']),
            **options,
        )

    return train_restyle_psp.train(opts, make_coach, DEFAULT_ENCODER)


if __name__ == '__main__':
    cli.run(main)
