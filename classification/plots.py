"""Confusion matrices as PNG files."""

from pathlib import Path

import numpy as np
from jaxtyping import Num
from matplotlib.figure import Figure

from utils.io import atomic_path


def plot_confusion(
    confusion: Num[np.ndarray, 'C C'],
    path: Path,
    *,
    names: list[str] | None = None,
    title: str = '',
) -> None:
    """A confusion matrix [C, C] (row: truth) with counts, coloured by the share of its row."""
    confusion = np.asarray(confusion)
    names = names or [str(i) for i in range(len(confusion))]
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(4.6, 4.0), layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(confusion):
        axes.text(
            column,
            row,
            str(value),
            ha='center',
            va='center',
            fontsize=9,
            color='white' if share[row, column] > 0.5 else 'black',
        )
    axes.set(
        xticks=range(len(names)),
        yticks=range(len(names)),
        xticklabels=names,
        yticklabels=names,
        xlabel='predicted',
        ylabel='true',
        title=title,
    )
    figure.colorbar(image, label='share of the true grade')
    with atomic_path(path) as temp:
        figure.savefig(temp, format='png', dpi=120, metadata={'Software': None})
