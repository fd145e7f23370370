"""Samples of the generator, whose latents are known, as training pictures of the encoder.

Shapes: N images, L styles, D style dimension, S side the encoder sees.
"""

import torch
from torch import Tensor

from models.psp import PSP
from utils.seeds import torch_generator
from utils.transfer import send

_SCALE_SAMPLES = 4096


class KnownLatents:
    """The first `count` pictures of every batch come from the generator of `psp`.

    What is drawn is a function of (seed, step) and belongs to the whole batch, so it depends
    neither on a resume nor on processes and passes. Half of the samples have the styles of a
    second latent from a random layer on, as photographs' latents differ between layers too.
    """

    def __init__(self, psp: PSP, *, count: int, seed: int) -> None:
        self.psp, self.count, self.seed = psp, count, seed
        draw = torch_generator(seed, 'scale')
        device = psp.latent_avg.device
        with torch.no_grad():
            z = torch.randn(_SCALE_SAMPLES, psp.decoder.style_dim, generator=draw).to(device)
            w = psp.decoder.mapping(z.to(psp.latent_avg.dtype))
            # The mean squared distance of a latent from the mean, per number.
            self.variance = float(w.var(0).mean())
        self._step = -1
        self._ws = torch.empty(0)

    @torch.no_grad()
    def latents(self, step: int) -> Tensor:
        """The latents of the samples of a step, [count, L, D]."""
        if step != self._step:
            decoder, device = self.psp.decoder, self.psp.latent_avg.device
            draw = torch_generator(self.seed, 'samples', step)
            z = torch.randn(2, self.count, decoder.style_dim, generator=draw)
            cut = torch.randint(1, 2 * decoder.n_latent, (self.count, 1, 1), generator=draw)
            first, second = (
                decoder.broadcast(decoder.mapping(send(part, device).to(self.psp.latent_avg.dtype)))
                for part in z
            )
            layer = torch.arange(decoder.n_latent, device=device)[None, :, None]
            self._step, self._ws = step, torch.where(layer < send(cut, device), first, second)
        return self._ws

    def part(self, step: int, place: slice) -> Tensor:
        """The latents that fall on the positions `place` of the step's batch, [n, L, D]."""
        return self.latents(step)[place.start : max(place.start, min(place.stop, self.count))]

    @torch.no_grad()
    def replace(self, x: Tensor, step: int, place: slice, noise: list[Tensor]) -> Tensor:
        """Photographs x [N, 3, S, S] at the positions `place`, samples in place of the first.

        noise: maps for those positions, as Generator.synthesis takes them.
        """
        ws = self.part(step, place)
        if not len(ws):
            return x
        images = self.psp.decode(ws, noise=[m[: len(ws)] for m in noise])
        return torch.cat([self.psp.pool(images).clamp(-1, 1).to(x.dtype), x[len(ws) :]])

    def distance(self, ws: Tensor, step: int, place: slice) -> Tensor:
        """How far latents ws [N, L, D] at the positions `place` are from the known ones, 0-d.

        Mean square over all N (photographs count as 0), 1 for the average latent.
        """
        known = self.part(step, place)
        error = (ws[: len(known)] - known).square().mean((1, 2)).sum()
        return error / (len(ws) * self.variance)
