"""What a run leaves in private/: the records from which its release can be derived again.

pictures.json: release name -> {'pixels': SHA-256 of the uint8 RGB bytes [R, R, 3]}, taken when the
optimisation made the picture. group_latents.npy: float32 [C, L, D], row c - 1 is group c of
groups.csv. facts.json: what the manifest says besides counts and file hashes. Each is sealed
(utils.io). C groups, L styles, D style dimension, R side of the pictures.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from anonymization.card import Card
from anonymization.photographs import Photographs
from utils.images import grid, pil_to_tensor, save_png
from utils.io import save_npy, sealing, write_json, write_text

PICTURES, LATENTS, FACTS = 'pictures.json', 'group_latents.npy', 'facts.json'
_SHEET_GROUPS = 6
_README = """This folder holds what must never leave: which photographs stand behind which picture
(groups.csv), every patient's latent (latents.npy: it reconstructs the photograph), the latents of
the groups, losses, options with paths, and contact_sheet.png, which shows photographs. The files
NAME.sha256 tell whether NAME was damaged. Publish ../release/ only.
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


def write_records(
    private: Path, results: dict[str, GroupResult], *, facts: dict, soft_labels: bool
) -> None:
    """Writes pictures.json, group_latents.npy, facts.json, losses.npy and README.txt.

    results: by release name, in the order of the group numbers.
    """
    with sealing(private / PICTURES):
        write_json(private / PICTURES, {n: {'pixels': r.pixels} for n, r in results.items()})
    with sealing(private / LATENTS):
        save_npy(private / LATENTS, torch.stack([r.ws for r in results.values()]).float().numpy())
    with sealing(private / FACTS):
        write_json(private / FACTS, {'soft_labels': soft_labels, 'facts': facts})
    save_npy(private / 'losses.npy', np.stack([r.losses.numpy() for r in results.values()]))
    write_text(private / 'README.txt', _README)


def write_card(private: Path, card: Card) -> None:
    """Puts another card into facts.json and seals it again; the rest stays as it is."""
    record = json.loads((private / FACTS).read_text(encoding='utf-8'))
    record['facts']['card'] = card
    with sealing(private / FACTS):
        write_json(private / FACTS, record)


def write_contact_sheet(
    path: Path, labels: Int[np.ndarray, ' n'], results: Sequence[GroupResult], photos: Photographs
) -> None:
    """Rows of members, centroid, k-SALSA image. Shows photographs: private.

    labels: group numbers [n]; results: in the order of the group numbers.
    """
    rows, most = [], 0
    step = max(1, len(results) // _SHEET_GROUPS)
    for number in range(0, len(results), step)[:_SHEET_GROUPS]:
        members = np.flatnonzero(labels == number + 1)
        shown = [photos[int(i)] for i in members]
        rows.append((shown, results[number].centroid, results[number].image))
        most = max(most, len(shown))
    side = max(128, min(256, photos.size))
    cells = []
    for shown, centroid, image in rows:
        blank = [torch.full_like(shown[0], 255)] * (most - len(shown))
        cells += [*shown, *blank, centroid, image]
    cells = [
        pil_to_tensor(to_picture(c).resize((side, side), Image.Resampling.BICUBIC)) for c in cells
    ]
    save_png(grid(torch.stack(cells), most + 2, fill=1.0), path)
