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
from jaxtyping import Float
from torch import Tensor

from criteria.laplacian import N_BANDS, band_variances, fine_deviations
from datasets.pictures import Pictures
from models.encoders import LightPooledEncoder
from models.encoders.pooled_encoder import read_at
from models.features.guide import load_guide
from models.features.pretrained import FeatureNetwork, load_feature_network
from models.psp import PSP
from scripts import train_restyle_e4e, train_restyle_psp
from training.coach_restyle_joint import JointCoach, JointConfig, JointOptions
from training.picture_game import GameConfig
from training.reconstruction import BandTerm
from utils import cli
from utils.errors import UserError
from utils.images import from_uint8
from utils.options import add_flags, build

DEFAULT_ENCODER = 'LightPooledEncoder'
_MEASURED_IMAGES = 512
_BATCH = 64


def build_parser() -> argparse.ArgumentParser:
    p = train_restyle_e4e.build_parser(__doc__, DEFAULT_ENCODER)
    p.set_defaults(train_decoder=True, n_iters_per_batch=1, l2_lambda=1.0, optim_name='adam')
    add_flags(p, JointOptions)
    return p


def first_photographs(pictures: Pictures) -> Float[Tensor, 'N 3 S S']:
    """The first photographs of a set, by which losses and features are scaled."""
    some = [np.asarray(pictures[i]) for i in range(min(len(pictures), _MEASURED_IMAGES))]
    return from_uint8(torch.from_numpy(np.stack(some)))


def measured(photographs: Float[Tensor, 'N 3 S S']) -> tuple[list[float], list[float]]:
    """Variances of all bands, and deviations of the two finest, see criteria.laplacian."""
    variances, deviations = band_variances(photographs), fine_deviations(photographs)
    if min(*variances, *deviations) <= 0:
        raise UserError('`train_path`: the photographs are all the same')
    return variances, deviations


def _pooled(net: FeatureNetwork, pictures: Float[Tensor, 'N 3 S S']) -> Float[Tensor, 'N F']:
    return torch.cat([net.pooled(part) for part in pictures.split(_BATCH)])


@torch.no_grad()
def prepare_encoder(encoder: Any, pooled: Float[Tensor, 'N F'], spread: float) -> None:
    """A new encoder's first latents differ enough to be told apart; its features are scaled."""
    encoder.head.weight.mul_(spread)
    if isinstance(encoder, LightPooledEncoder):
        encoder.standardise_by(pooled)


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)

    features = load_feature_network('lite0')
    guide = None
    if opts.guide is not None:
        n, digest = features.n_features, features.digest
        guide = load_guide(opts.guide, n_features=n, digest=digest)

    def make_coach(psp: PSP, train_set: Pictures, *arguments: Any, **options: Any) -> JointCoach:
        if psp.input_size % 2**N_BANDS:
            raise UserError(f'`encoder_size` {psp.input_size}: not a multiple of {2**N_BANDS}')
        first = first_photographs(train_set)
        variances, deviations = measured(first)
        pooled = _pooled(features, first)
        if not opts.checkpoint_path:
            small = read_at(first)
            read = pooled if small.shape == first.shape else _pooled(features, small)
            prepare_encoder(psp.encoder, read, opts.first_spread)
        options['losses']['bands'] = BandTerm(opts.band_lambdas, variances), 1.0
        game = build(GameConfig, vars(opts))
        centre: Tensor | float = 0.0
        if guide is not None:
            centre = (pooled @ guide.directions).mean(0)
        return JointCoach(
            psp,
            train_set,
            *arguments,
            e4e=train_restyle_e4e.e4e_config(opts, psp),
            joint=dataclasses.replace(
                build(JointConfig, vars(opts)), game=game if game.ratio else None
            ),
            features=features.to(options['device']),
            deviations=deviations,
            guide=guide,
            centre=centre,
            **options,
        )

    return train_restyle_psp.train(opts, make_coach, DEFAULT_ENCODER)


if __name__ == '__main__':
    cli.run(main)
