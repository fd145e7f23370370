"""What shapes the training of an encoder, and its optimisers."""

import dataclasses

import torch
from torch import nn

AMP_DTYPES = {'no': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


@dataclasses.dataclass(frozen=True)
class CoachConfig:
    """What shapes an encoder training; intervals in optimiser steps.

    batch_size counts the images of one step over all processes; `accumulate` splits a process's
    share into that many passes. save_interval None: only the last step is exported.
    half_export: the exported encoder's weights as float16, which halves its size.
    """

    batch_size: int = 8
    test_batch_size: int = 8
    learning_rate: float = 1e-4
    optim_name: str = 'ranger'
    train_decoder: bool = False
    n_iters: int = 5
    max_steps: int = 100_000
    image_interval: int = 100
    board_interval: int = 50
    val_interval: int = 1000
    save_interval: int | None = None
    accumulate: int = 1
    amp: str = 'no'
    mirror: bool = True
    half_export: bool = False
    seed: int = 0
    synthetic: float = 0.0  # share of every batch that the generator draws
    latent_lambda: float = 0.1  # weight of the distance from their known latents


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
