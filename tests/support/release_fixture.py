"""Tiny networks and photographs for end-to-end runs of the main job."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from anonymization.card import read_card
from anonymization.release import png_encoder, render_pages
from models.encoders import build_encoder
from models.features.content import content_checkpoint
from models.psp import PSP, psp_checkpoint
from models.resnet import build_resnet
from models.stylegan2 import Generator
from utils.images import load_rgb
from utils.io import save_torch, sha256_file
from utils.runs import versions

CHANNELS = {4: 8, 8: 8, 16: 8, 32: 8}


def save_networks(folder):
    """psp.pt (32 px) and content.pt with seeded random weights."""
    torch.manual_seed(0)
    decoder = Generator(32, style_dim=16, n_mlp=2, channels=CHANNELS)
    encoder = build_encoder('LightEncoder', n_styles=8, input_size=32, style_dim=16, width=8)
    psp = PSP(encoder, decoder, 0.1 * torch.randn(16), 32)
    save_torch(folder / 'psp.pt', psp_checkpoint(psp, {}))
    net = build_resnet('resnet18', small_stem=True)
    save_torch(
        folder / 'content.pt',
        content_checkpoint(net, arch='resnet18', input_size=32, small_stem=True),
    )


def save_photographs(folder, n, *, patients=None, seed=0):
    """Smooth random pictures images/eye<i>x.png and labels.csv."""
    rng = np.random.default_rng(seed)
    (folder / 'images').mkdir(parents=True)
    ids = [f'eye{i:03d}x' for i in range(n)]
    for name in ids:
        noise = gaussian_filter(rng.standard_normal((40, 40, 3)), (4, 4, 0))
        u8 = np.clip(128 + 900 * noise, 0, 255).astype(np.uint8)
        Image.fromarray(u8).save(folder / 'images' / f'{name}.png')
    table = pd.DataFrame({'id_code': ids, 'diagnosis': rng.integers(0, 5, n)})
    if patients is not None:
        table['patient_id'] = patients
    table.to_csv(folder / 'labels.csv', index=False)
    return table


def release_facts(card: Path | None = None) -> dict[str, Any]:
    """What a run of patients in groups of five says of itself, as `write_release` takes it."""
    return {
        'k': 5,
        'unit': 'patients',
        'policy': 'distinct',
        'clustering': 'default',
        'strata': [],
        'n_suppressed': 0,
        'image_size': 8,
        'settings': {
            'n_iters': 5,
            'n_steps': 4,
            'n_crop': 2,
            'content_weight': 100.0,
            'style_weight': 1e-6,
            'lr': 'auto',
            'style_mode': None,
            'style_strides': (4, 8),
            'style_ratio': 0.05,
            'guide_weight': 0.1,
            'latent_rank': 0,
            'precision': 'fp32',
            'sides': 'mirror',
        },
        'noise': None,
        'networks': {
            'generator and encoder': 64 * 'a',
            'content': f'moco {64 * "b"}',
            'style': f'vgg19-relu1_2 {64 * "c"}',
            'guide': 'none',
        },
        'versions': versions(),
        'card': read_card(card),
        'png_encoder': png_encoder(),
    }


def arguments(folder, data, exp_dir, **options):
    """The command line of a small run of scripts/k-SALSA.py."""
    flags = {
        'exp_dir': exp_dir,
        'checkpoint_path': folder / 'psp.pt',
        'content_weights': folder / 'content.pt',
        'style_weights': 'filters',
        'data_path': data / 'images',
        'df': data / 'labels.csv',
        'same_k': 5,
        'num_steps': 4,
        'num_crop': 2,
        'test_workers': 0,
        'group_batch': 2,
        'device': 'cpu',
        **options,
    }
    return [f'--{name}={value}' for name, value in flags.items()]


def tree_bytes(folder):
    """{relative path: bytes} of all files below a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob('*'))
        if p.is_file()
    }


class Spoiled(NamedTuple):
    """A copy of a finished run to spoil: run/release, run/private; the photographs and networks."""

    run: Path
    photographs: Path
    networks: Path

    @property
    def release(self) -> Path:
        return self.run / 'release'

    @property
    def private(self) -> Path:
        return self.run / 'private'

    @property
    def pictures(self) -> list[Path]:
        return sorted((self.release / 'images').iterdir())

    def photograph(self, name: str = 'eye007x') -> Image.Image:
        """A source at the size of the release."""
        side = load_rgb(self.pictures[0]).size
        return load_rgb(self.photographs / f'{name}.png').resize(side)

    def manifest(self) -> dict[str, Any]:
        return json.loads((self.release / 'manifest.json').read_text())

    def seal(self, manifest: dict[str, Any] | None = None, *, render: bool = False) -> None:
        """Writes the manifest with the right hashes; render: and pages that go with it."""
        manifest = manifest or self.manifest()
        if render:
            labels = pd.read_csv(self.release / 'labels.csv')
            for name, text in render_pages(manifest, labels).items():
                (self.release / name).write_text(text)
        manifest['files'] = {
            p.relative_to(self.release).as_posix(): sha256_file(p)
            for p in sorted(self.release.rglob('*'))
            if p.is_file() and p.name != 'manifest.json'
        }
        (self.release / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')

    def reseal_private(self, name: str) -> None:
        """Gives a changed private record the checksum that belongs to it."""
        path = self.private / name
        path.with_name(f'{name}.sha256').write_text(f'{sha256_file(path)}  {name}\n')
