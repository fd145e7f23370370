"""Two small maps of a picture, in which copies are looked for: tone and detail."""

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata

SIDE = 32
_STEP = 4  # grey levels that count as equal, so that noise in black gets no ranks

Features = np.ndarray  # float32 [F, S, S]


def features(pixels: UInt8[np.ndarray, 'H W 3']) -> Features:
    """Tone and detail of a picture uint8 [H, W, 3], float32 [2, 32, 32] in [-0.5, 0.5]."""
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, dtype=np.float64).mean(2)
    detail = grey - gaussian_filter(grey, 2.0, mode='nearest')
    return np.stack([_ranks(grey, _STEP), _ranks(detail, _STEP / 4)]).astype(np.float32)


def _ranks(values: Num[np.ndarray, '*s'], step: float) -> Num[np.ndarray, '*s']:
    ranks = rankdata(np.round(values / step)).reshape(values.shape)
    return ranks / values.size - 0.5
