"""Curves of trainings: the numbers of stats.jsonl against progress, as a PNG file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from utils.io import atomic_path

_INSIDE = 8  # lines whose names fit into a panel; more stand beside it


class Panel(NamedTuple):
    """The lines of one panel: `names` of numbers, less `prefix` in the legend."""

    names: Sequence[str]
    title: str = ''
    prefix: str = ''
    log_scale: bool = False


def plot_curves(
    path: Path,
    runs: Mapping[str, Sequence[dict]],
    panels: Iterable[Panel],
    *,
    unit: str = 'step',
    scale: float = 1,
) -> None:
    """Draws the panels, in each one line per number and run.

    runs: the records of each run by its label; they hold `step`, `scale` of which make a unit.
    """
    panels = list(panels)
    figure = Figure(figsize=(4 * max(len(panels), 1), 3.2), layout='constrained')
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, panel in zip(axes, panels):
        for label, records in runs.items():
            for name in panel.names:
                points = [(r['step'] / scale, r[name]) for r in records if r.get(name) is not None]
                words = [label, name.removeprefix(panel.prefix)]
                if points:
                    axis.plot(
                        *zip(*points),
                        label=' '.join(word for word in words if word),
                        marker='.' if len(points) == 1 else None,
                    )
        axis.set(xlabel=unit, title=panel.title, yscale='log' if panel.log_scale else 'linear')
        if axis.lines:
            inside = len(axis.lines) <= _INSIDE
            place = {} if inside else {'loc': 'upper left', 'bbox_to_anchor': (1, 1)}
            axis.legend(fontsize=8, **place)
    with atomic_path(path) as temp:
        figure.savefig(temp, format='png', dpi=80, metadata={'Software': None})
