"""The measures of a training's snapshots, which all its processes compute together."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from datasets.archive import ImageArchive
from evaluation.features import Network, extract_features, load_feature_network
from evaluation.fidelity import check_metric_names, distance_of_samples, kernel_distance
from models.stylegan2 import Generator
from utils import distributed
from utils.images import to_uint8
from utils.io import save_npy, sha256_bytes
from utils.seeds import torch_generator

log = logging.getLogger(__name__)

_PART = 512  # pictures that a process takes at a time


def _feature_file(network: Network, dataset: ImageArchive, folder: Path) -> Path:
    """Where the archive's features are kept, named after its content and the network's weights."""
    weights = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        weights.update(name.encode() + value.cpu().numpy().tobytes())
    key = sha256_bytes(f'{dataset.digest()} {weights.hexdigest()} {network.input_size}'.encode())
    return folder / f'real-features-{key[:16]}.npy'


def _kept_features(path: Path | None) -> Float[np.ndarray, 'n d'] | None:
    """What `path` holds, or None where it cannot be read."""
    if path is None or not path.is_file():
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        log.warning('%s cannot be read (%s) and is made again', path, error)
        return None


def _real_features(
    network: Network,
    dataset: ImageArchive,
    folder: Path | None,
    *,
    device: torch.device,
    batch_size: int,
) -> Float[np.ndarray, 'n d'] | None:
    """Features [n, d] of the archive's pictures, in process 0; None in the others.

    Computed by all processes, and kept in `folder` under their content's name.
    """
    main = distributed.is_main()
    path = _feature_file(network, dataset, Path(folder)) if main and folder is not None else None
    kept = _kept_features(path)
    if distributed.from_main(lambda: kept is not None):
        return kept
    n = len(dataset.names)
    parts = distributed.by_turns(
        np.array_split(np.arange(n), -(-n // _PART)),
        lambda part: extract_features(
            network, dataset.images(part), device=device, batch_size=batch_size
        ),
    )
    found = _in_main(parts)
    if path is not None and found is not None:
        save_npy(path, found)
    return found


def _in_main(parts: Iterable[Float[np.ndarray, '_ d']]) -> Float[np.ndarray, 'n d'] | None:
    """All rows in process 0; the others only take part."""
    kept = [part for part in parts if distributed.is_main()]
    return np.concatenate(kept) if kept else None


@torch.no_grad()
def _features_of_samples(
    networks: dict[str, Network],
    generator: Generator,
    z: Float[Tensor, 'n D'],
    device: torch.device,
    batch_size: int,
) -> dict[str, Float[np.ndarray, 'n d']]:
    """What every network sees of the pictures of z."""
    pictures = torch.cat([to_uint8(generator(p.to(device))).cpu() for p in z.split(batch_size)])
    return {
        kind: extract_features(network, pictures, device=device, batch_size=batch_size)
        for kind, network in networks.items()
    }


def training_metric(
    names: Sequence[str],
    dataset: ImageArchive,
    *,
    n_images: int,
    content_weights: Path | None = None,
    inception_weights: Path | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Callable[..., dict[str, float]]:
    """A function (generator, device, folder=None) -> {name: number}, for snapshots of a training.

    All processes of a training call it and share the work; process 0 gets the numbers, the others
    nothing.

    names: of METRICS. dataset: ImageArchive with the real pictures, all of which are used once,
    without the mirror images that a training adds.
    n_images generated pictures from fixed seeds, stored noise. Networks are read here, so that
    missing files fail before training; real features are computed on the first call and kept, in
    memory and, named after their content, as files of `folder`, for a resumed training.
    """
    check_metric_names(names)
    kinds = {name: 'fundus' if name.endswith('_fundus') else 'inception' for name in names}
    networks = {
        kind: load_feature_network(
            metric=name, content_weights=content_weights, inception_weights=inception_weights
        )
        for name, kind in kinds.items()
    }
    real: dict[str, np.ndarray | None] = {}

    def metric(
        generator: Generator, device: torch.device, folder: Path | None = None
    ) -> dict[str, float]:
        z = torch.randn(
            n_images, generator.style_dim, generator=torch_generator(seed, 'metric images')
        )
        for kind, network in networks.items():
            if kind not in real:
                real[kind] = _real_features(
                    network, dataset, folder, device=device, batch_size=batch_size
                )
        # Whole batches, so that the number of processes changes none.
        parts = distributed.by_turns(
            z.split(-(-_PART // batch_size) * batch_size),
            lambda part: _features_of_samples(networks, generator, part, device, batch_size),
        )
        found = [part for part in parts if distributed.is_main()]
        for network in networks.values():
            network.cpu()
        if not found:
            return {}
        return {
            name: (distance_of_samples if name.startswith('f') else kernel_distance)(
                cast(np.ndarray, real[kind]), np.concatenate([part[kind] for part in found])
            )
            for name, kind in kinds.items()
        }

    return metric
