"""What shapes the training of an encoder, and its optimisers."""

import dataclasses

import torch
from torch import nn

from utils.kinds import (
    boolean,
    choice,
    fraction,
    nonnegative_float,
    nonnegative_int,
    positive_float,
    positive_int,
)
from utils.options import option

# Headings of the flags.
DATA, NETWORKS, LOSSES, TRAINING, RECORDS = 'data', 'networks', 'losses', 'training', 'records'
AMP_DTYPES = {'no': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


@dataclasses.dataclass(frozen=True)
class CoachConfig:
    """What shapes an encoder training; intervals in optimiser steps.

    batch_size counts the images of one step over all processes; `accumulate` splits a process's
    share into that many passes. save_interval None: only the last step is exported.
    half_export: the exported encoder's weights as float16, which halves its size.
    """

    max_steps: int = option(
        100_000, positive_int, 'optimiser steps', group=TRAINING, metavar='STEPS', free=True
    )
    batch_size: int = option(
        8,
        positive_int,
        'images per optimiser step, all processes together',
        group=TRAINING,
        metavar='N',
    )
    test_batch_size: int = option(
        8,
        positive_int,
        'images per validation batch and process',
        group=TRAINING,
        metavar='N',
        free=True,
    )
    accumulate: int = option(
        1,
        positive_int,
        "split each process's share of a batch to save memory",
        group=TRAINING,
        metavar='PASSES',
    )
    n_iters: int = option(
        5,
        positive_int,
        'refinements per batch',
        group=TRAINING,
        metavar='N',
        flag='n_iters_per_batch',
    )
    learning_rate: float = option(
        1e-4, positive_float, 'constant learning rate', group=TRAINING, metavar='RATE'
    )
    optim_name: str = option('ranger', choice('ranger', 'adam'), 'optimiser', group=TRAINING)
    amp: str = option(
        'no',
        choice(*sorted(AMP_DTYPES)),
        'mixed precision: bf16 (CPU or GPU) or fp16 (GPU)',
        group=TRAINING,
    )
    seed: int = option(0, nonnegative_int, 'random seed', group=TRAINING, metavar='INT')
    mirror: bool = option(
        True,
        boolean,
        'mirror half of the training photographs (default: as the entry says)',
        group=DATA,
    )
    train_decoder: bool = option(
        False, boolean, 'train the generator too', group=NETWORKS, metavar='BOOL', bare=True
    )
    synthetic: float = option(
        0.0,
        fraction,
        'share of every batch that the generator draws, with known latents: 1 to '
        'pretrain, then 0.5 with --checkpoint_path',
        group=NETWORKS,
        metavar='SHARE',
    )
    latent_lambda: float = option(
        0.1,
        nonnegative_float,
        'weight of the distance from the known latents of --synthetic',
        group=LOSSES,
        metavar='WEIGHT',
    )
    image_interval: int = option(
        100, positive_int, 'training sample sheets', group=RECORDS, metavar='STEPS', free=True
    )
    board_interval: int = option(
        50, positive_int, 'training losses', group=RECORDS, metavar='STEPS', free=True
    )
    val_interval: int = option(
        1000,
        positive_int,
        'validation, best_model.pt and resumable state',
        group=RECORDS,
        metavar='STEPS',
    )
    save_interval: int | None = option(
        None,
        positive_int,
        'iteration_<step>.pt (default: only the last step)',
        group=RECORDS,
        metavar='STEPS',
        free=True,
    )
    half_export: bool = option(
        False,
        boolean,
        "store the encoder's weights in best_model.pt and iteration_<step>.pt as float16",
        group=RECORDS,
    )


def build_optimizer(name: str, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """'adam', or 'ranger': RAdam, Lookahead and gradient centralisation as published.

    Below the rectification threshold (steps 1 to 5) the published Ranger takes plain momentum
    steps, which the library calls degenerating to SGD.
    """
    if name == 'adam':
        return torch.optim.Adam(parameters, lr=lr)
    if name == 'ranger':
        from pytorch_optimizer import Ranger  # slow to import, rarely needed elsewhere

        return Ranger(
            parameters,
            lr=lr,
            betas=(0.95, 0.999),
            eps=1e-5,
            alpha=0.5,
            k=6,
            n_sma_threshold=5,
            degenerated_to_sgd=True,
            use_gc=True,
        )
    raise ValueError(f'optimizer {name!r}, want adam or ranger')
