"""The published way of computing k-SALSA, written plainly: what the benchmark compares with.

One group at a time, each inverted twice; modulated weights for every sample and grouped
convolutions; resampling by zero insertion; a VGG19 of 16 convolutions run in full for its second;
three content passes for every member and step; Gram matrices in Python loops with a host
synchronisation for each patch. The formulas are the paper's, so the losses are those of
anonymization/optimize.py.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor

from anonymization.optimize import OptimizeConfig, learning_rate
from benchmarks.machine import clock
from models.features.content import ContentNetwork
from models.features.style import VGGStyle
from models.psp import PSP
from models.stylegan2.model import Generator, ModulatedConv2d, StyledConv, ToRGB


def upfirdn2d_plain(
    x: Float[Tensor, 'N C H W'],
    kernel: Float[Tensor, '4 4'],
    *,
    up: int = 1,
    pad: tuple[int, int] = (0, 0),
) -> Float[Tensor, 'N C h w']:
    """Zero insertion, padding and filtering of [N, C, H, W], one channel at a time."""
    n, c, h, w = x.shape
    x = x.reshape(n * c, h, 1, w, 1)
    x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(n * c, 1, h * up, w * up)
    x = F.pad(x, (pad[0], pad[1], pad[0], pad[1]))
    y = F.conv2d(x, kernel.flip(0, 1)[None, None])
    return y.reshape(n, c, *y.shape[2:])


def modulated_conv(
    conv: ModulatedConv2d, x: Float[Tensor, 'N C H W'], w: Float[Tensor, 'N D']
) -> Float[Tensor, 'N K h w']:
    """A ModulatedConv2d with one weight per sample, as a grouped convolution."""
    n, c_in, h, width = x.shape
    weight = conv.scale * conv.weight * conv.modulation(w).view(n, 1, c_in, 1, 1)
    if conv.demodulate:
        weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    c_out, side = weight.shape[1], weight.shape[3]
    x = x.reshape(1, n * c_in, h, width)
    if conv.upsample:
        weight = weight.transpose(1, 2).reshape(n * c_in, c_out, side, side)
        y = F.conv_transpose2d(x, weight, stride=2, groups=n)
        y = y.view(n, c_out, *y.shape[2:])
        return upfirdn2d_plain(y, conv.blur.kernel, pad=(1, 1))
    weight = weight.view(n * c_out, c_in, side, side)
    y = F.conv2d(x, weight, padding=side // 2, groups=n)
    return y.view(n, c_out, h, width)


def styled_conv(
    layer: StyledConv,
    x: Float[Tensor, 'N C H W'],
    w: Float[Tensor, 'N D'],
    noise: Float[Tensor, '#N 1 h w'],
) -> Float[Tensor, 'N K h w']:
    y = modulated_conv(layer.conv, x, w) + layer.noise.weight * noise
    return F.leaky_relu(y + layer.activate.bias.view(1, -1, 1, 1), 0.2) * 2**0.5


def to_rgb(
    layer: ToRGB,
    x: Float[Tensor, 'N C H W'],
    w: Float[Tensor, 'N D'],
    skip: Float[Tensor, 'N 3 h w'] | None = None,
) -> Float[Tensor, 'N 3 H W']:
    rgb = modulated_conv(layer.conv, x, w) + layer.bias
    if skip is None:
        return rgb
    return rgb + upfirdn2d_plain(skip, layer.upsample.kernel, up=2, pad=(2, 1))


def synthesis(generator: Generator, ws: Float[Tensor, 'N L D']) -> Float[Tensor, 'N 3 R R']:
    """ws [N, L, D] -> images [N, 3, R, R]."""
    noise = generator.stored_noise()
    x = generator.input.input.repeat(len(ws), 1, 1, 1)
    x = styled_conv(generator.conv1, x, ws[:, 0], noise[0])
    rgb = to_rgb(generator.to_rgb1, x, ws[:, 1])
    convs = cast(Sequence[StyledConv], generator.convs)
    for j, layer in enumerate(cast(Sequence[ToRGB], generator.to_rgbs)):
        x = styled_conv(convs[2 * j], x, ws[:, 2 * j + 1], noise[2 * j + 1])
        x = styled_conv(convs[2 * j + 1], x, ws[:, 2 * j + 2], noise[2 * j + 2])
        rgb = to_rgb(layer, x, ws[:, 2 * j + 3], rgb)
    return rgb


class PublishedWay:
    """Inverts and optimises one group at a time with the networks of a PSP.

    content_net, style_net: ContentNetwork and VGGStyle of models.features; the latter's two
    convolutions start a VGG19 that is otherwise random. All stay float32.
    """

    def __init__(
        self, psp: PSP, content_net: ContentNetwork, style_net: VGGStyle, config: OptimizeConfig
    ) -> None:
        self.psp, self.content_net, self.config = psp, content_net, config
        self.device = psp.latent_avg.device
        vgg = torchvision.models.vgg19(weights=None).features
        vgg[0].load_state_dict(style_net.features_0.state_dict())
        vgg[2].load_state_dict(style_net.features_2.state_dict())
        self.vgg = vgg.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def invert(
        self, x: Float[Tensor, 'k 3 S S'], n_iters: int = 5
    ) -> tuple[Float[Tensor, 'k L D'], Float[Tensor, 'k 3 S S']]:
        """x [k, 3, S, S] -> latents [k, L, D] and reconstructions [k, 3, S, S]."""
        psp = self.psp
        ws = psp.latent_avg.repeat(len(x), 1, 1)
        y = psp.pool(synthesis(psp.decoder, psp.latent_avg[None])).repeat(len(x), 1, 1, 1)
        for _ in range(n_iters):
            ws = psp.encoder(torch.cat([x, y], 1)) + ws
            y = psp.pool(synthesis(psp.decoder, ws))
        return ws, y

    def style_features(self, img: Float[Tensor, 'k 3 S S']) -> Float[Tensor, 'k 64 S S']:
        """The second rectified convolution of VGG19, of the sixteen that are computed."""
        kept = []
        for layer in self.vgg:
            img = layer(img)
            if isinstance(layer, torch.nn.ReLU):
                kept.append(img)
        return kept[1]

    def content_loss(
        self, y: Float[Tensor, '1 3 S S'], recon: Float[Tensor, 'k 3 S S']
    ) -> Float[Tensor, '']:
        """Mean over members of 1 - cosine; features of y, targets and sources every time."""
        k = len(recon)
        features = self.content_features(y.repeat(k, 1, 1, 1))
        targets = self.content_features(recon).detach()
        sources = self.content_features(self.sources)
        loss, improvement = features.new_zeros(()), 0.0
        for i in range(k):
            diff = features[i].dot(targets[i])
            improvement += float(diff.detach()) - float(targets[i].dot(sources[i]))
            loss = loss + 1 - diff
        return loss / k

    def content_features(self, img: Float[Tensor, 'k 3 S S']) -> Float[Tensor, 'k F']:
        img = F.interpolate(img, size=self.content_net.input_size)
        return F.normalize(self.content_net.net(img), dim=1)

    def style_loss(
        self, y_features: Float[Tensor, '1 C S S'], source_features: Float[Tensor, 'k C S S']
    ) -> Float[Tensor, '']:
        """Every source patch against its most similar patch of y, one pair after the other."""
        grid = self.config.n_crop
        y_grams = [gram(p) for p in patches(y_features[0], grid)]
        loss = y_features.new_zeros(())
        for source in source_features:
            own = y_features.new_zeros(())
            for patch in patches(source, grid):
                wanted = gram(patch)
                similar = [
                    F.cosine_similarity(g.reshape(1, -1), wanted.reshape(1, -1)) for g in y_grams
                ]
                best = int(torch.cat(similar).argmax())
                own = own + (y_grams[best] - wanted).square().sum()
            loss = loss + own / grid**2
        return loss / len(source_features)

    def targets(self, x: Float[Tensor, 'k 3 S S']) -> Float[Tensor, 'k C S S']:
        """What is computed once for a group: style features of its photographs."""
        self.sources = x
        with torch.no_grad():
            return self.style_features(x)

    def steps(
        self,
        ws: Float[Tensor, 'k L D'],
        recon: Float[Tensor, 'k 3 S S'],
        source_features: Float[Tensor, 'k C S S'],
        n_steps: int,
    ) -> tuple[Float[Tensor, '{n_steps} 2'], list[float]]:
        """Optimises from the mean latent; returns (losses [n_steps, 2], seconds of each step)."""
        cfg, rate, style_weight = (
            self.config,
            float(self.config.lr),
            float(self.config.style_weight),
        )
        w = ws.mean(0, keepdim=True).requires_grad_(True)
        adam = torch.optim.Adam([w], lr=rate, betas=(0.9, 0.999), eps=1e-8)
        losses, seconds = [], []
        for step in range(n_steps):
            begin = clock(self.device)
            for group in adam.param_groups:
                group['lr'] = learning_rate(step, cfg.n_steps, rate)
            y = self.psp.pool(synthesis(self.psp.decoder, w))
            content = self.content_loss(y, recon)
            style = self.style_loss(self.style_features(y), source_features)
            adam.zero_grad()
            (cfg.content_weight * content + style_weight * style).backward()
            adam.step()
            losses.append((content.item(), style.item()))
            seconds.append(clock(self.device) - begin)
        return torch.tensor(losses), seconds


def patches(features: Float[Tensor, 'C H W'], grid: int) -> list[Float[Tensor, 'C h w']]:
    """[C, H, W] -> grid^2 patches [C, H // grid, W // grid], row by row."""
    h, w = features.shape[1] // grid, features.shape[2] // grid
    return [
        features[:, i * h : (i + 1) * h, j * w : (j + 1) * w]
        for i in range(grid)
        for j in range(grid)
    ]


def gram(patch: Float[Tensor, 'C h w']) -> Float[Tensor, 'C C']:
    flat = patch.flatten(1)
    return flat @ flat.T
