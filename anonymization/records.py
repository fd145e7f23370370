"""What a run leaves in private/: the records from which its release can be derived again.

pictures.json: release name -> {'pixels': SHA-256 of the uint8 RGB bytes [R, R, 3]}, taken when the
optimisation made the picture. group_latents.npy: float32 [C, L, D], row c - 1 is group c of
groups.csv. facts.json: what the manifest says besides counts and file hashes. Each is sealed
(utils.io). C groups, L styles, D style dimension, R side of the pictures.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from anonymization.card import Card
from anonymization.photographs import Photographs
from datasets.groups import Groups
from utils.images import grid, pil_to_tensor, save_png
from utils.io import append_npy, save_npy, sealing, write_json, write_text

PICTURES, LATENTS, FACTS = 'pictures.json', 'group_latents.npy', 'facts.json'
_SHEET_GROUPS = 6
_README = """This folder holds what must never leave: which photographs stand behind which picture
(groups.csv), every patient's latent (latents.npy: it reconstructs the photograph), the latents of
the groups, losses, options with paths, the photographs (photographs.npy) and contact_sheet.png,
which shows some of them. The files NAME.sha256 tell whether NAME was damaged.
Publish ../release/ only.
"""


class GroupResult(NamedTuple):
    """One optimised group: pictures uint8 [3, R, R], ws [L, D], losses [steps, 2].

    pixels: SHA-256 of the picture's bytes, [R, R, 3], when the optimisation made it.
    """

    image: torch.Tensor
    centroid: torch.Tensor
    ws: torch.Tensor
    losses: torch.Tensor
    pixels: str


def pixel_digest(u8: UInt8[Tensor, '3 R R']) -> str:
    """SHA-256 of a picture uint8 [3, R, R] as RGB bytes [R, R, 3]."""
    return hashlib.sha256(u8.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()


def to_picture(u8: UInt8[Tensor, '3 R R']) -> Image.Image:
    """uint8 [3, R, R] -> PIL RGB."""
    return Image.fromarray(u8.permute(1, 2, 0).numpy())


class Recorder:
    """Keeps what a run's results leave in private/, as they come by; nothing holds them all.

    add: a result by release name, in the order of the groups. close: once, after all.
    """

    def __init__(
        self, private: Path, groups: Groups, photographs: Photographs, *, centroids: bool
    ) -> None:
        self.private, self.groups, self.photographs = private, groups, photographs
        self._centroids = centroids
        self._pixels: dict[str, dict[str, str]] = {}
        self._losses: list[np.ndarray] = []
        self._shown: dict[int, GroupResult] = {}
        step = max(1, len(groups) // _SHEET_GROUPS)
        self._to_show = set(range(0, len(groups), step)[:_SHEET_GROUPS])
        self._files = contextlib.ExitStack()
        self._files.enter_context(sealing(private / LATENTS))
        self._add_latents = self._files.enter_context(append_npy(private / LATENTS, len(groups)))

    def add(self, name: str, result: GroupResult) -> None:
        """Takes the next group's result."""
        number = len(self._pixels)
        self._pixels[name] = {'pixels': result.pixels}
        self._losses.append(result.losses.numpy())
        self._add_latents(result.ws[None].float().numpy())
        if self._centroids:
            save_png(to_picture(result.centroid), self.private / 'centroids' / f'{name}.png')
        if number in self._to_show:
            self._shown[number] = result

    def close(self, *, facts: dict[str, Any], soft_labels: bool) -> None:
        """Writes pictures.json, group_latents.npy, facts.json, losses.npy, README.txt, a sheet."""
        self._files.close()
        private = self.private
        with sealing(private / PICTURES):
            write_json(private / PICTURES, self._pixels)
        with sealing(private / FACTS):
            write_json(private / FACTS, {'soft_labels': soft_labels, 'facts': facts})
        save_npy(private / 'losses.npy', np.stack(self._losses))
        write_text(private / 'README.txt', _README)
        rows = [
            ([self.photographs[int(i)] for i in self.groups.members[number]], result)
            for number, result in self._shown.items()
        ]
        write_contact_sheet(private / 'contact_sheet.png', rows)


def write_card(private: Path, card: Card) -> None:
    """Puts another card into facts.json and seals it again; the rest stays as it is."""
    record = json.loads((private / FACTS).read_text(encoding='utf-8'))
    record['facts']['card'] = card
    with sealing(private / FACTS):
        write_json(private / FACTS, record)


def write_contact_sheet(
    path: Path, groups: Sequence[tuple[Sequence[torch.Tensor], GroupResult]]
) -> None:
    """Rows of members uint8 [3, S, S], centroid, k-SALSA image. Shows photographs: private.

    Where every centroid is the image, it is shown once.
    """
    most = max(len(members) for members, _ in groups)
    side = max(128, min(256, groups[0][0][0].shape[-1]))
    moved = any(not torch.equal(result.centroid, result.image) for _, result in groups)
    cells = []
    for members, result in groups:
        blank = [torch.full_like(members[0], 255)] * (most - len(members))
        cells += [*members, *blank, *([result.centroid] if moved else []), result.image]
    shown = [
        pil_to_tensor(to_picture(c).resize((side, side), Image.Resampling.BICUBIC)) for c in cells
    ]
    save_png(grid(torch.stack(shown), most + 1 + moved, fill=1.0), path)
