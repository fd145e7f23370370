"""The results for people: one table, rendered as Markdown and as a page, with its plots."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from evaluation.board import attackers, sections
from evaluation.comparison import Row
from evaluation.plots import plot_roc
from evaluation.registry import Measure, interval
from utils.io import atomic_path, write_json, write_text

_TEMPLATES = Path(__file__).parent / 'templates'
_TPR = 'TPR at 1 % FPR'  # of the strongest attack


class Table(NamedTuple):
    """Column heads, and the text of every cell by row."""

    head: list[str]
    lines: list[list[str]]


def table_of(rows: list[Row], measures: list[Measure]) -> Table:
    """The table of all methods and measures."""
    lines = []
    for row in rows:
        cells = {'method': row.method.name, 'k': str(row.k or '-'), 'n': str(row.n)}
        for measure in measures:
            cells |= measure.cells(row.results[measure.name])
            if measure.attack:
                cells.pop(_TPR, None)  # to stand behind the last attack
                cells[_TPR] = interval(_strongest(row, measures)['tpr_at_1pct_fpr'], '.2f')
        lines.append(cells)
    head = list(lines[0])
    return Table(head, [[cells[h] for h in head] for cells in lines])


def _strongest(row: Row, measures: list[Measure]) -> dict:
    return max(
        (row.results[m.name] for m in measures if m.attack),
        key=lambda result: result['auc']['value'],
    )


def trade_off_plot(rows: list[Row], measures: list[Measure], path: Path) -> None:
    """Utility against every attack, a panel each: a point per release, its control beside it."""
    attacks = [m for m in measures if m.attack]
    utility, score = next((m, m.score) for m in measures if m.score is not None)
    across = min(3, len(attacks))
    down = -(-len(attacks) // across)
    figure = Figure(figsize=(4.2 * across, 3.6 * down + 0.6), layout='constrained')
    panels = list(figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat)
    for axes, attack in zip(panels, attacks):
        axes.axvline(0.5, color='grey', linestyle=':')
        axes.axhline(0.5, color='grey', linestyle=':')
        for row, marker, colour in zip(rows, itertools.cycle('osD^v<>Ph*X'), _colours()):
            found, worth = row.results[attack.name], score(row.results[utility.name])
            axes.errorbar(
                found['auc']['value'],
                worth['value'],
                xerr=_arms(found['auc']),
                yerr=_arms(worth),
                marker=marker,
                color=colour,
                capsize=2,
                linestyle='',
                label=row.name,
            )
            if 'control' in found:
                at = found['control']['auc']['value']
                axes.plot(at, worth['value'], marker, markerfacecolor='none', color=colour)
        axes.set_title(attack.name, fontsize='medium')
    for axes in panels[len(attacks) :]:
        axes.set_visible(False)
    figure.supxlabel('AUC of the attack (0.5: learns nothing); hollow: its control')
    figure.supylabel(utility.title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=4, fontsize='small')
    with atomic_path(path) as temp:
        figure.savefig(temp, format='png', dpi=120, metadata={'Software': None})


def _arms(value: dict[str, float]) -> list[list[float]]:
    """Lengths of the error bars of {value, low, high}; an interval may leave its value out."""
    return [[max(0.0, value['value'] - value['low'])], [max(0.0, value['high'] - value['value'])]]


def _colours() -> Iterator[str]:
    return itertools.cycle([f'C{i}' for i in range(10)])


def row_record(row: Row, measures: list[Measure]) -> dict[str, Any]:
    """A row for results.json: attacks together, other measures under their own names."""
    attacks = {m.name: row.results[m.name] for m in measures if m.attack}
    return {
        'name': row.name,
        'method': row.method.name,
        'k': row.k,
        'n': row.n,
        **{n: r for n, r in row.results.items() if n not in attacks},
        'attacks': attacks,
    }


def write_report(
    folder: Path, rows: list[Row], measures: list[Measure], *, facts: dict, config: dict
) -> str:
    """Writes results.json, results.md, results.html and the plots; returns the Markdown table.

    facts: name, n_members, n_others, n_again, seed, versions.
    """
    attacks = [m for m in measures if m.attack]
    plots = {}
    if attacks and any(m.score is not None for m in measures):
        plots['privacy_utility.png'] = 'utility against the AUC of every attack'
        trade_off_plot(rows, measures, folder / 'privacy_utility.png')
    for attack in attacks:
        plots[f'roc_{attack.name}.png'] = f'ROC of the {attack.name} attack'
        plot_roc(
            {row.name: row.scores[attack.name] for row in rows},
            folder / f'roc_{attack.name}.png',
            title=attack.title,
            logarithmic=True,
        )
    write_json(
        folder / 'results.json',
        {'facts': facts, 'config': config, 'rows': [row_record(row, measures) for row in rows]},
    )
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=jinja2.select_autoescape(['html']),
    )
    table = table_of(rows, measures)
    text = {}
    for name in ('results.md', 'results.html'):
        text[name] = templates.get_template(name).render(
            table=table,
            facts=facts,
            rows=rows,
            plots=plots,
            attackers=attackers(rows),
            sections=sections(rows, measures),
        )
        write_text(folder / name, text[name])
    return text['results.md']
