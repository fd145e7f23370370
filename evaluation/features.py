"""Features of pictures: Inception's ('fid', as torch-fidelity extracts them, Heusel et al. 2017)
and those of the project's content encoder ('fd_fundus', which needs no download).

Pictures are resized with antialiasing before either network sees them (Parmar et al. 2022).
Shapes: n pictures, feature dimension d.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, UInt8
from PIL import Image
from torch import Tensor, nn

from datasets.archive import FileStore
from datasets.pictures import read_into
from datasets.sources import list_stored
from models.features.content import ContentNetwork, load_content_network
from models.loading import load_state, mismatch
from utils.errors import UserError
from utils.images import CONTACT_SHEET, from_uint8, to_uint8
from utils.io import save_torch
from utils.logs import progress

INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'
_WHERE = (
    f'It is {INCEPTION_FILE} of the releases of github.com/mseitzer/pytorch-fid '
    '(torch-fidelity ships the same file as weights-inception-2015-12-05-6726825d.pth); '
    'give its path with `inception_weights`.'
)


class InceptionNetwork(nn.Module):
    """torch-fidelity's Inception v3 with the interface of a content network."""

    input_size = 299
    n_features = 2048
    name = 'inception'

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        state = load_state(path, what='Inception weights', hint=_WHERE)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        # torch-fidelity would download a missing file and run any pickle, also one that took the
        # place of the file after it was read here: it gets what was read.
        with tempfile.TemporaryDirectory() as folder:
            read = Path(folder) / 'weights.pt'
            save_torch(read, state)
            try:
                self.net = FeatureExtractorInceptionV3(
                    'inception', ['2048'], feature_extractor_weights_path=str(read)
                )
            except (RuntimeError, KeyError, TypeError) as error:
                raise UserError(
                    f'{path} does not hold the Inception network of FID '
                    f'({mismatch(error)}). {_WHERE}'
                ) from error

    @torch.no_grad()
    def features(self, img: Float[Tensor, 'n 3 299 299']) -> Float32[Tensor, 'n 2048']:
        """Pictures [n, 3, 299, 299] in [-1, 1] -> pool features [n, 2048], float32."""
        return self.net(to_uint8(img))[0].float()


Network = ContentNetwork | InceptionNetwork


def load_feature_network(
    *,
    content_weights: str | Path | None = None,
    inception_weights: str | Path | None = None,
    metric: str,
) -> Network:
    """The network a metric name needs; UserError naming the flag when its file is not given."""
    if metric.endswith('_fundus'):
        if content_weights is None:
            raise UserError(
                f'{metric} needs a content encoder file (`content_weights`; '
                '`metric_network` when training a generator); make one with '
                'scripts/train_content_encoder.py'
            )
        network = load_content_network(content_weights)
        if not isinstance(network, ContentNetwork):
            raise UserError(
                f'{metric} needs a content encoder file, not {content_weights}, whose features '
                'are compared by `metrics`=features'
            )
        return network
    if inception_weights is None:
        raise UserError(f'{metric} needs the Inception weights. {_WHERE}')
    return InceptionNetwork(inception_weights)


def picture_names(path: str | Path) -> tuple[FileStore, list[str]]:
    """(FileStore, image names) of a folder or ZIP; contact sheets of generate.py do not count.

    UserError when there is none.
    """
    store = FileStore(path)
    names = [n for n in store.image_names() if Path(n).name != CONTACT_SHEET]
    if not names:
        raise UserError(f'no images in {path}')
    return store, names


def read_pictures(
    path: str | Path, size: int, *, threads: int = 4
) -> UInt8[np.ndarray, 'n 3 {size} {size}']:
    """All images of a folder (searched recursively) or ZIP, uint8 [n, 3, size, size].

    Antialiased bicubic, aspect ratio not kept; in the order of their names. UserError that lists
    all unreadable files.
    """
    items = list_stored(*picture_names(path))
    pictures = np.empty((len(items), 3, size, size), np.uint8)
    read_into(pictures, items, size, resample=Image.Resampling.BICUBIC, threads=threads)
    return pictures


def resize_pictures(
    pictures: UInt8[Tensor, 'n 3 H W'], size: int
) -> UInt8[Tensor, 'n 3 {size} {size}']:
    """uint8 [n, 3, H, W] -> uint8 [n, 3, size, size], antialiased bicubic."""
    if tuple(pictures.shape[-2:]) == (size, size):
        return pictures
    img = F.interpolate(
        pictures.float(), size=(size, size), mode='bicubic', antialias=True, align_corners=False
    )
    return img.round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def extract_features(
    network: Network,
    pictures: UInt8[np.ndarray, 'n 3 H W'] | UInt8[Tensor, 'n 3 H W'],
    *,
    device: torch.device | str = 'cpu',
    batch_size: int = 32,
) -> Float64[np.ndarray, 'n d']:
    """Features of uint8 pictures [n, 3, H, W] of any size: float64 numpy [n, d].

    Each picture is resized and seen on its own, so neither the order nor the batch size matters
    (beyond the rounding of the device's matrix products).
    """
    network = network.to(device)
    found = []
    for start in progress(range(0, len(pictures), batch_size), desc='features', unit='batch'):
        batch = torch.as_tensor(pictures[start : start + batch_size]).to(device)
        batch = from_uint8(resize_pictures(batch, network.input_size))
        found.append(network.features(batch).double().cpu())
    return torch.cat(found).numpy()
