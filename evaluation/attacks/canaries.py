"""Canaries: do a generator or its samples give away who it was trained on?

Drawn people are planted in the training photographs, others of the same kind are held back. What
tells the two apart afterwards can only have come through the training. Shapes: p planted and h
held photographs, n samples, uint8 [*, 3, S, S].
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8

from evaluation.attacks.metrics import attack_metrics
from evaluation.attacks.nearest import nearest_attack, not_empty, pixels
from models.psp import PSP, redraw
from models.stylegan2 import Generator
from models.stylegan2.frozen import FrozenSynthesis
from models.stylegan2.sampling import latent_spread, seed_styles
from utils.images import from_uint8, to_uint8

_MEAN_OF = 1000  # latents whose mean a search starts from
_BATCH = 16
_SMALL = 1e-8
_RATE = 0.1  # of the search, in standard deviations of the latents

Embed = Callable[[UInt8[np.ndarray, 'n 3 S S']], Float[np.ndarray, 'n F']]


def sample_attacks(
    planted: UInt8[np.ndarray, 'p 3 S S'],
    held: UInt8[np.ndarray, 'h 3 S S'],
    samples: UInt8[np.ndarray, 'n 3 S S'],
    reference: UInt8[np.ndarray, 'r 3 S S'],
    embeds: dict[str, Embed],
) -> dict[str, dict]:
    """`attack_metrics` by who has samples: nearest in pixels and in each of `embeds`.

    reference: photographs of people who are neither planted nor held, which calibrate. One
    photograph a person. UserError when a set is empty.
    """
    found = {}
    for name, embed in {'pixel': pixels, **embeds}.items():
        scorer = nearest_attack(planted, held, reference, embed)
        found[name] = attack_metrics(*scorer(samples))
    return found


def generator_attack(
    generator: Generator,
    planted: UInt8[np.ndarray, 'p 3 S S'],
    held: UInt8[np.ndarray, 'h 3 S S'],
    *,
    n_steps: int = 100,
) -> dict:
    """`attack_metrics` by who has the generator: how well it can be made to draw a photograph.

    The score is the logarithm of how much smaller the error of the best picture is than that of
    the mean one, since some photographs are easy for every generator. UserError when a set is
    empty.
    """
    not_empty(planted=planted, held=held)
    first, best = drawing_errors(generator, np.concatenate([planted, held]), n_steps=n_steps)
    gain = np.log(first + _SMALL) - np.log(best + _SMALL)
    return attack_metrics(gain[: len(planted)], gain[len(planted) :])


def encoder_attack(
    psp: PSP,
    planted: UInt8[np.ndarray, 'p 3 S S'],
    held: UInt8[np.ndarray, 'h 3 S S'],
    embeds: dict[str, Embed],
    *,
    n_iters: int,
) -> dict[str, dict]:
    """`attack_metrics` by who has encoder and generator: how well they draw a photograph again.

    Photographs of the encoder's size. In pixels and in each of `embeds`, the score is the
    logarithm of how much nearer the reconstruction is to the photograph than the picture of the
    mean latent. UserError when a set is empty.
    """
    not_empty(planted=planted, held=held)
    shown = np.concatenate([planted, held])
    drawn, _ = redraw(psp, shown, n_iters=n_iters)
    average = to_uint8(psp.average_image().clamp(-1, 1)[None]).cpu().numpy()
    found = {}
    for name, embed in {'pixel': pixels, **embeds}.items():
        there = embed(shown)
        far, near = (np.square(there - embed(p)).mean(1) for p in (average, drawn))
        gain = np.log(far + _SMALL) - np.log(near + _SMALL)
        found[name] = attack_metrics(gain[: len(planted)], gain[len(planted) :])
    return found


def drawing_errors(
    generator: Generator, photographs: UInt8[np.ndarray, 'n 3 S S'], *, n_steps: int
) -> tuple[Float[np.ndarray, ' n'], Float[np.ndarray, ' n']]:
    """Mean squared errors [n] of the mean latent's picture, and of the best of a search from it.

    Photographs in the generator's size; noise maps as stored; range [-1, 1].
    """
    synthesis = FrozenSynthesis(generator)
    device = generator.input.input.device
    start = seed_styles(generator, range(_MEAN_OF)).mean(0, keepdim=True)
    rate = _RATE * latent_spread(generator)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for part in torch.from_numpy(np.ascontiguousarray(photographs)).split(_BATCH):
        wanted = from_uint8(part).to(device)
        ws = start.repeat(len(part), 1, 1).requires_grad_(True)
        adam = torch.optim.Adam([ws], lr=rate)
        first = best = torch.full((len(part),), torch.inf, device=device)
        for step in range(n_steps + 1):
            error = (synthesis(ws) - wanted).square().mean((1, 2, 3))
            first = error.detach() if step == 0 else first
            best = torch.minimum(best, error.detach())
            if step < n_steps:
                (ws.grad,) = torch.autograd.grad(error.sum(), ws)
                adam.step()
        found.append((first.cpu().numpy(), best.cpu().numpy()))
    return np.concatenate([f for f, _ in found]), np.concatenate([b for _, b in found])
