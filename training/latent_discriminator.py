"""The latent discriminator of e4e: tells the generator's latents from the encoder's.

Source: Tov et al. 2021, section 4.1 (latent discriminator, R1, pool of earlier latents).
Shapes: N latents, D style dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.seeds import torch_generator

_LAYERS = 4
_SLOPE = 0.2


class LatentCodesDiscriminator(nn.Module):
    """w [..., D] -> logits [..., 1], under the names of published checkpoints."""

    def __init__(self, style_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(_LAYERS - 1):
            layers += [nn.Linear(style_dim, style_dim), nn.LeakyReLU(_SLOPE)]
        self.mlp = nn.Sequential(*layers, nn.Linear(style_dim, 1))

    def forward(self, w: Tensor) -> Tensor:
        return self.mlp(w)


class LatentCodesPool:
    """A memory of `size` earlier latents; half of what is asked comes from it (size 0: none)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: Tensor | None = None

    def query(self, w: Tensor, draw: torch.Generator) -> Tensor:
        """Puts w [N, D] in; returns [N, D], each the new latent or, in its place, an older one."""
        if not self.size:
            return w
        kept: list[Tensor] = [] if self.kept is None else list(self.kept)
        found: list[Tensor] = []
        for new in w:
            if len(kept) < self.size:
                kept.append(new)
                found.append(new)
            elif float(torch.rand([], generator=draw)) > 0.5:
                place = int(torch.randint(self.size, [], generator=draw))
                found.append(kept[place])
                kept[place] = new
            else:
                found.append(new)
        self.kept = torch.stack(kept)
        return torch.stack(found)


class LatentGame:
    """Discriminator, its optimiser and its pools; `step` trains it, `loss` is the encoder's share.

    r1: weight of the gradient penalty, taken every `reg_every` steps. Random numbers are a
    function of (seed, step). The same numbers must be given in all processes, which then stay
    equal without averaging gradients.
    """

    def __init__(
        self,
        style_dim: int,
        *,
        lr: float,
        r1: float,
        reg_every: int,
        pool_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.r1, self.reg_every, self.seed = r1, reg_every, seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = LatentCodesDiscriminator(style_dim)
        self.net.to(device).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr)
        self.pools = {'real': LatentCodesPool(pool_size), 'fake': LatentCodesPool(pool_size)}

    def loss(self, ws: Tensor) -> Tensor:
        """-log D of latents ws [N, L', D], mean over all of them, 0-d."""
        return F.softplus(-self.net(ws)).mean()

    def step(self, real: Tensor, fake: Tensor, number: int) -> dict[str, Tensor]:
        """One optimiser step, and one of the penalty when it is due.

        real [N, D]: of the generator's mapping; fake [N, D]: of the encoder; number: of the step.
        Returns the losses as 0-d tensors.
        """
        draw = torch_generator(self.seed, 'pool', number)
        real = self.pools['real'].query(real.detach(), draw)
        fake = self.pools['fake'].query(fake.detach(), draw)
        self.net.requires_grad_(True)
        loss = F.softplus(-self.net(real)).mean() + F.softplus(self.net(fake)).mean()
        self._descend(loss)
        if self.r1 and number % self.reg_every == 0:
            real = real.requires_grad_(True)
            (grad,) = torch.autograd.grad(self.net(real).sum(), real, create_graph=True)
            penalty = grad.square().sum(1).mean()
            self._descend(penalty * (self.r1 / 2 * self.reg_every))
        self.net.requires_grad_(False)
        return {'w_discriminator': loss.detach()}

    def _descend(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict:
        """What a resumed run needs, under the published names where there are some."""
        return {
            'discriminator_state_dict': self.net.state_dict(),
            'discriminator_optimizer_state_dict': self.optimizer.state_dict(),
            'pools': {name: pool.kept for name, pool in self.pools.items()},
        }

    def load_state(self, state: dict) -> None:
        """Continues from `state()`; RuntimeError or ValueError when it does not fit."""
        self.net.load_state_dict(state['discriminator_state_dict'])
        self.optimizer.load_state_dict(state['discriminator_optimizer_state_dict'])
        for name, kept in state['pools'].items():
            self.pools[name].kept = kept
