"""Samples of the generator: negative control, no person stands behind a picture."""

import numpy as np
import torch
from jaxtyping import UInt8

from classification.data import one_hot
from evaluation.probing import graded
from evaluation.registry import Candidate, method
from evaluation.releases import Release
from evaluation.study import Study
from models.psp import load_psp
from utils.images import to_uint8
from utils.seeds import torch_generator


@method('unconditional', 'generator samples, graded by a probe (independent: negative control)')
def unconditional(study: Study, release: Release) -> Candidate:
    """As many samples as there are groups, graded by a probe trained on photographs."""
    pictures = _sample(study, len(release.names))
    labels = graded(study, pictures)
    return Candidate(pictures, labels, one_hot(labels), np.full(len(study.members), -1))


@torch.no_grad()
def _sample(study: Study, n: int) -> UInt8[np.ndarray, '{n} 3 S S']:
    """Pictures of the generator, stored noise, no truncation: uint8 [n, 3, S, S]."""
    psp = load_psp(study.settings.file('checkpoint'), study.device)
    z = torch.randn(
        n, psp.decoder.style_dim, generator=torch_generator(study.seed, 'unconditional')
    )
    images = torch.cat([psp.decoder(part.to(study.device)) for part in z.split(16)])
    side = study.grader.settings.image_size
    return to_uint8(torch.nn.functional.adaptive_avg_pool2d(images, side)).cpu().numpy()
