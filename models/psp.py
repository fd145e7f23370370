"""Encoder and generator joined for ReStyle inversion.

Shapes: N images, L styles, D style dimension, S side the encoder sees, R side of the generator.
Images are float32 in [-1, 1] nominally; generated ones are not clamped.
Source: Alaluf et al. 2021, 'ReStyle', section 3.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from models.encoders import encoder_from_state
from models.loading import named_tensors
from models.stylegan2 import Generator, generator_from_state
from models.stylegan2.frozen import FrozenSynthesis
from utils.errors import UserError
from utils.images import from_uint8, shrink, to_uint8
from utils.io import load_weights

_BATCH = 16  # photographs of a pass of `redraw`
_REMEDY = 'Train one with scripts/train_restyle_psp.py.'


class Inversion(NamedTuple):
    """Result of `invert`."""

    ws: torch.Tensor  # [N, L, D] latents after the last iteration
    recon: torch.Tensor  # [N, 3, S, S] their reconstructions
    iterations: torch.Tensor | None  # [n_iters, N, L, D] latents after each iteration


@runtime_checkable
class Inverter(Protocol):
    """What `invert` and `refine` need: a start, a step of the encoder, a picture of latents."""

    input_size: int
    latent_avg: Float[Tensor, 'L D']
    training: bool

    def step(
        self, x: Float[Tensor, 'N 3 S S'], y: Float[Tensor, 'N 3 S S'], ws: Float[Tensor, 'N L D']
    ) -> Float[Tensor, 'N L D']:
        """One refinement: photographs x and reconstructions y [N, 3, S, S] -> new ws [N, L, D]."""

    def decode(self, ws: Float[Tensor, 'N L D']) -> Float[Tensor, 'N 3 R R']:
        """ws [N, L, D] -> [N, 3, R, R], with stored noise."""

    def pool(self, img: Float[Tensor, 'N 3 R R']) -> Float[Tensor, 'N 3 S S']:
        """[N, 3, R, R] -> [N, 3, S, S], the mean over each cell (published face_pool)."""
        return shrink(img, self.input_size)

    @torch.no_grad()
    def average_image(self) -> Float[Tensor, '3 S S']:
        """The picture of latent_avg as the encoder sees it, [3, S, S]."""
        return self.pool(self.decode(self.latent_avg[None]))[0]


class PSP(nn.Module, Inverter):
    """An encoder that refines latents and the generator that draws them.

    latent_avg: [L, D], or [D] for all layers; where refinement starts. It moves with the module
    but is not part of its state dict, whose keys are those of published checkpoints.
    """

    latent_avg: Float[Tensor, 'L D']

    def __init__(
        self,
        encoder: nn.Module,
        decoder: Generator,
        latent_avg: Float[Tensor, '*L D'],
        input_size: int = 256,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.input_size = encoder, decoder, input_size
        self.register_buffer(
            'latent_avg',
            latent_avg.detach().float().expand(decoder.n_latent, decoder.style_dim).clone(),
            persistent=False,
        )

    def decode(
        self, ws: Float[Tensor, 'N L D'], *, noise: str | Sequence[Tensor | None] = 'stored'
    ) -> Float[Tensor, 'N 3 R R']:
        """ws [N, L, D] -> [N, 3, R, R]; `noise` as in Generator.synthesis."""
        return self.decoder.synthesis(ws, noise=noise)

    def step(
        self, x: Float[Tensor, 'N 3 S S'], y: Float[Tensor, 'N 3 S S'], ws: Float[Tensor, 'N L D']
    ) -> Float[Tensor, 'N L D']:
        """As Inverter.step."""
        return self.encoder(torch.cat([x, y], 1)) + ws


class FrozenPSP(Inverter):
    """A PSP whose weights do not change: the same results for `invert` and `refine`, sooner.

    Takes the present weights of `psp`, on its device. dtype: of the activations of both networks,
    float32 or bfloat16; latents and pictures are float32. With bfloat16 the encoder is copied,
    with float32 it is shared and put into channels-last memory.
    """

    training = False

    def __init__(self, psp: PSP, dtype: torch.dtype = torch.float32) -> None:
        self.input_size, self.latent_avg, self.dtype = psp.input_size, psp.latent_avg, dtype
        encoder = psp.encoder if dtype == torch.float32 else copy.deepcopy(psp.encoder).to(dtype)
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self.synthesis = FrozenSynthesis(psp.decoder, dtype=dtype)

    def decode(self, ws: Float[Tensor, 'N L D']) -> Float[Tensor, 'N 3 R R']:
        """ws [N, L, D] -> [N, 3, R, R], with stored noise."""
        return self.synthesis(ws)

    def step(
        self, x: Float[Tensor, 'N 3 S S'], y: Float[Tensor, 'N 3 S S'], ws: Float[Tensor, 'N L D']
    ) -> Float[Tensor, 'N L D']:
        """As Inverter.step."""
        pair = torch.cat([x, y], 1).to(dtype=self.dtype, memory_format=torch.channels_last)
        return self.encoder(pair).float() + ws


@torch.no_grad()
def invert(
    psp: Inverter, x: Float[Tensor, 'N 3 S S'], *, n_iters: int = 5, keep_iterations: bool = False
) -> Inversion:
    """Finds latents of photographs x [N, 3, S, S] by `n_iters` refinements.

    Starts from the average latent and its picture; stored noise. `psp`: a PSP in eval mode, or a
    FrozenPSP.
    Raises ValueError for x of another size than the encoder's.
    """
    side = psp.input_size
    if x.ndim != 4 or tuple(x.shape[1:]) != (3, side, side):
        raise ValueError(f'images have shape {tuple(x.shape)}, want [N, 3, {side}, {side}]')
    if psp.training:
        raise ValueError('psp is in training mode; call psp.eval() first')
    ws = psp.latent_avg.expand(len(x), -1, -1)
    y = psp.average_image().expand_as(x)
    kept = []
    for _ in range(n_iters):
        ws = psp.step(x, y, ws)
        y = psp.pool(psp.decode(ws))
        if keep_iterations:
            kept.append(ws)
    return Inversion(ws, y, torch.stack(kept) if keep_iterations else None)


def refine(
    psp: Inverter,
    x: Float[Tensor, 'N 3 S S'],
    ws: Float[Tensor, 'N L D'],
    *,
    n_steps: int,
    lr: float = 0.02,
) -> tuple[Float[Tensor, 'N L D'], Float[Tensor, ' N']]:
    """Goes on from latents ws [N, L, D] by gradient descent on the pixels of x [N, 3, S, S].

    Adam, cosine learning rate, mean squared error; every image for itself. Returns the latents
    of the lowest error met, so no image gets worse, and these errors [N].
    """
    best_ws = ws.detach().clone()
    best = torch.full((len(x),), float('inf'), device=x.device)
    ws = best_ws.clone().requires_grad_(True)
    adam = torch.optim.Adam([ws], lr=lr)
    for step in range(n_steps + 1):
        error = (psp.pool(psp.decode(ws)) - x).square().mean((1, 2, 3))
        better = error.detach() < best
        best = torch.where(better, error.detach(), best)
        best_ws = torch.where(better[:, None, None], ws.detach(), best_ws)
        if step < n_steps:
            adam.param_groups[0]['lr'] = lr * (0.5 + 0.5 * math.cos(math.pi * step / n_steps))
            (ws.grad,) = torch.autograd.grad(error.sum(), ws)
            adam.step()
    return best_ws, best


def psp_checkpoint(
    psp: PSP, opts: dict[str, Any], *, half_encoder: bool = False, half_decoder: bool = False
) -> dict[str, Any]:
    """The published checkpoint layout for inference: {state_dict, opts, latent_avg}.

    opts: plain dict; what describes the networks is added under the published names, and the
    device they are on: the published classes put the latents there.
    half_encoder, half_decoder: store the matrices and kernels as float16.
    """
    described = {
        'encoder_type': type(psp.encoder).__name__,
        'output_size': psp.decoder.size,
        'input_nc': 6,
        'encoder_size': psp.input_size,
        'device': psp.latent_avg.device.type,
    }
    state = {k: v.detach().cpu() for k, v in psp.state_dict().items()}
    halved = [n for n, half in (('encoder.', half_encoder), ('decoder.', half_decoder)) if half]
    state = {
        k: v.half() if v.dim() > 1 and k.startswith(tuple(halved)) else v for k, v in state.items()
    }
    return {'state_dict': state, 'opts': {**opts, **described}, 'latent_avg': psp.latent_avg.cpu()}


def psp_from_checkpoint(checkpoint: object, *, source: str | Path = 'checkpoint') -> PSP:
    """A trainable PSP from a loaded {state_dict, opts, latent_avg}; a `D.` part is ignored.

    UserError naming `source` when parts are missing or do not fit each other.
    """
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        raise UserError(
            f'{source} is not a ReStyle-pSp checkpoint: it has no "state_dict". {_REMEDY}'
        )
    state = named_tensors(checkpoint['state_dict'], source=f'{source}: state_dict', remedy=_REMEDY)
    parts = {
        name: {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f'{name}.')}
        for name in ('encoder', 'decoder')
    }
    for name, part in parts.items():
        if not part:
            raise UserError(
                f'{source} is not a ReStyle-pSp checkpoint: no "{name}." weights. {_REMEDY}'
            )
    opts = checkpoint.get('opts')
    if not isinstance(opts, (dict, NoneType)):
        raise UserError(f'{source}: its "opts" are no options by name. {_REMEDY}')
    decoder = generator_from_state(parts['decoder'], source=f'{source}: the decoder weights')
    encoder, input_size = encoder_from_state(
        parts['encoder'],
        n_styles=decoder.n_latent,
        style_dim=decoder.style_dim,
        input_size=(opts or {}).get('encoder_size'),
        encoder_type=(opts or {}).get('encoder_type'),
        source=str(source),
    )
    latent_avg = _start(checkpoint.get('latent_avg'), decoder, source)
    return PSP(encoder, decoder, latent_avg, input_size)


def _start(latent_avg: object, decoder: Generator, source: str | Path) -> Float[Tensor, '*L D']:
    """The latents refinement starts from: those of the file, [L, D] or [D], or the mean ones."""
    if latent_avg is None:
        return decoder.mean_latent()
    want = decoder.n_latent, decoder.style_dim
    if (
        not isinstance(latent_avg, torch.Tensor)
        or latent_avg.shape not in (want, (1, want[1]), want[1:])
        or not latent_avg.is_floating_point()
        or not latent_avg.isfinite().all()
    ):
        raise UserError(
            f'{source}: latent_avg does not hold the {want[0]} x {want[1]} or '
            f'{want[1]} finite numbers its generator takes'
        )
    return latent_avg


def redraw(
    psp: PSP, photographs: UInt8[np.ndarray, 'n 3 S S'], *, n_iters: int
) -> tuple[UInt8[np.ndarray, 'n 3 S S'], Float[Tensor, 'n L D']]:
    """Photographs of the encoder's size as a PSP in eval mode draws them, and their latents."""
    frozen, device = FrozenPSP(psp), psp.latent_avg.device
    parts = torch.from_numpy(np.ascontiguousarray(photographs)).split(_BATCH)
    found = [invert(frozen, from_uint8(part).to(device), n_iters=n_iters) for part in parts]
    drawn = torch.cat([to_uint8(part.recon.clamp(-1, 1)).cpu() for part in found])
    return drawn.numpy(), torch.cat([part.ws.cpu() for part in found])


def load_psp(path: str | Path, device: torch.device | str = 'cpu') -> PSP:
    """Reads a ReStyle-pSp checkpoint for inference: frozen, in eval mode, on `device`."""
    checkpoint = load_weights(path, what='ReStyle-pSp checkpoint', hint=_REMEDY)
    psp = psp_from_checkpoint(checkpoint, source=str(Path(path)))
    return psp.to(device).eval().requires_grad_(False)
