"""ROC curves as PNG files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Num
from matplotlib.figure import Figure

from evaluation.scores import auc, roc
from utils.io import atomic_path


def plot_roc(
    curves: Mapping[str, tuple[Num[np.ndarray, ' _'], Num[np.ndarray, ' _']]],
    path: Path,
    *,
    title: str = '',
    logarithmic: bool = False,
) -> None:
    """ROC curves of {label: (scores of positives, scores of negatives)}, each with its AUC.

    logarithmic: both axes, where low false positive rates can be read.
    """
    figure = Figure(figsize=(6, 6), layout='constrained')
    axes = figure.subplots()
    lowest = 1 / max(len(negative) for _, negative in curves.values())
    least = lowest / 2 if logarithmic else 0.0
    for label, (positive, negative) in curves.items():
        fpr, tpr = roc(positive, negative)
        axes.step(
            np.maximum(fpr, least),
            np.maximum(tpr, least and 1e-4),
            where='post',
            label=f'{label} (AUC {auc(positive, negative):.2f})',
        )
    line = np.geomspace(least, 1) if logarithmic else np.array([0, 1])
    axes.plot(line, line, color='grey', linestyle=':', label='chance')
    scale = 'log' if logarithmic else 'linear'
    axes.set(
        xscale=scale,
        yscale=scale,
        xlim=(least, 1),
        ylim=(least, 1.1 if logarithmic else 1),
        xlabel='false positive rate',
        ylabel='true positive rate',
        title=title,
    )
    axes.legend(loc='lower right', fontsize='small')
    with atomic_path(path) as temp:
        figure.savefig(temp, format='png', metadata={'Software': None})
