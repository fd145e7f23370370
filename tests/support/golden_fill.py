"""Deterministic weights for the golden cases.

The golden outputs beside this file were computed with networks whose state dict
was filled by `fill_state_dict`, so no weight file has to travel: build the same
network, fill it, load it with strict=True, and the outputs must agree.
"""

import zlib

import numpy as np
import torch


def _noise(name: str, shape) -> np.ndarray:
    # RandomState's stream is frozen by NumPy's compatibility policy.
    return np.random.RandomState(zlib.crc32(name.encode())).randn(*shape).astype(np.float32)


def fill_state_dict(state: dict, equalized: bool) -> dict:
    """Returns a copy of `state` with every learnable value replaced.

    equalized=True: StyleGAN2 layers (weights have unit variance, scaled at run time).
    equalized=False: plain layers (He-scaled weights).
    FIR kernels (keys ending in '.kernel') are left as the network built them.
    """
    filled = {}
    for name, value in state.items():
        shape = tuple(value.shape)
        leaf = name.rsplit('.', 1)[-1]
        if leaf == 'kernel':
            filled[name] = value.clone()
            continue
        if leaf == 'num_batches_tracked':
            filled[name] = torch.zeros_like(value)
            continue
        r = _noise(name, shape)
        if leaf == 'running_var':
            r = 1 + 0.2 * np.abs(r)
        elif leaf == 'running_mean':
            r = 0.1 * r
        elif name.endswith('modulation.bias'):
            r = 1 + 0.1 * r
        elif leaf == 'bias':
            r = 0.1 * r
        elif (
            leaf == 'weight'
            and len(shape) == 1
            and name.startswith(('noise', 'conv1.noise', 'convs'))
        ):
            r = 0.1 * r  # noise strength
        elif leaf == 'weight' and len(shape) == 1:
            r = 1 + 0.1 * r  # batch norm, PReLU
        elif leaf == 'weight' and not equalized:
            r = r * np.sqrt(2.0 / np.prod(shape[1:]))
        if not equalized and '.linear.' in name:
            r = 0.02 * r  # small residuals, so that iterated inversion stays in range
        filled[name] = torch.from_numpy(np.asarray(r, dtype=np.float32)).reshape(shape)
    return filled


def fill_image(name: str, shape) -> torch.Tensor:
    """A smooth random image batch in [-1, 1], (N, 3, H, W)."""
    n, c, h, w = shape
    coarse = torch.from_numpy(_noise(name, (n, c, max(h // 8, 2), max(w // 8, 2))))
    fine = torch.from_numpy(_noise(name + '/fine', (n, c, h, w)))
    smooth = torch.nn.functional.interpolate(
        coarse, size=(h, w), mode='bilinear', align_corners=False
    )
    return torch.tanh(smooth + 0.1 * fine)


def fill_tensor(name: str, shape, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.from_numpy(_noise(name, shape))
