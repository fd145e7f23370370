"""A pretrained network as a grader."""

import dataclasses

import numpy as np
import torch
from tiny_grader import pictures

from classification.grader import build_grader
from classification.settings import Settings
from classification.train import train_grader
from models.features.pretrained import load_feature_network


def test_a_pretrained_network_is_trained_further():
    settings = Settings(
        target='5-class',
        arch='tf_efficientnet_lite0',
        image_size=64,
        epochs=1,
        batch_size=8,
        learning_rate=0.01,
    )
    one, other = (build_grader(settings, seed=s, imagenet_weights='lite0') for s in (0, 1))
    frozen = load_feature_network('lite0').net.state_dict()
    for key, value in one.state_dict().items():
        if not key.startswith('classifier'):
            assert torch.equal(value, frozen[key])
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    grades = np.arange(10) % 5
    result = train_grader(
        pictures(grades, 64), np.eye(5)[grades], settings=settings, imagenet_weights='lite0'
    )
    trained = result.net.state_dict()
    assert all(
        not torch.equal(trained[k], frozen[k]) for k in ('conv_stem.weight', 'conv_head.weight')
    )
    assert result.predict(pictures(grades, 64)).outputs.shape == (10, 5)
    assert build_grader(dataclasses.replace(settings, arch='mobilenetv3_small_050'), seed=0)(
        torch.zeros(1, 3, 64, 64)
    ).shape == (1, 5)
