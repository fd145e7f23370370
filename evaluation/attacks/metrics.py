"""How well an attack tells members from others: AUC, TPR at low FPR, intervals, ROC plots.

Scores are higher for members. An attack that learns nothing has an AUC of 0.5.
"""
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest, rankdata

from utils.errors import UserError
from utils.io import atomic_path
from utils.seeds import numpy_generator

FPRS = {'tpr_at_1pct_fpr': 0.01, 'tpr_at_0.1pct_fpr': 0.001}
MIN_SCORES = 4


def attack_metrics(member, other, *, n_bootstrap=500, seed=0, level=0.95):
    """Summary of an attack's scores: member [m] and other [n], higher meaning member.

    Returns n_members, n_others and, each as {value, low, high}: `auc` (bootstrap interval over
    members and others), `balanced_accuracy` (threshold chosen on one half of the people and
    applied to the other half; bootstrap) and `tpr_at_1pct_fpr`, `tpr_at_0.1pct_fpr` (exact
    binomial intervals; `resolved` is False where there are too few others to have that rate).
    UserError with fewer than 4 of either.
    """
    member, other = (np.asarray(s, dtype=np.float64) for s in (member, other))
    if min(len(member), len(other)) < MIN_SCORES:
        raise UserError(f'{len(member)} members and {len(other)} others are too few to measure '
                        f'an attack; at least {MIN_SCORES} of each are needed')
    rng = numpy_generator(seed, 'attack metrics')
    right = _cross_fitted(member, other, rng)
    aucs, accuracies = np.empty(n_bootstrap), np.empty(n_bootstrap)
    for b in range(n_bootstrap):
        m, n = rng.integers(len(member), size=len(member)), rng.integers(len(other),
                                                                         size=len(other))
        aucs[b] = auc(member[m], other[n])
        accuracies[b] = (right[0][m].mean() + right[1][n].mean()) / 2
    found = {'n_members': len(member), 'n_others': len(other),
             'auc': _interval(auc(member, other), aucs, level),
             'balanced_accuracy': _interval((right[0].mean() + right[1].mean()) / 2, accuracies,
                                            level)}
    for name, fpr in FPRS.items():
        found[name] = _tpr_at(member, other, fpr, level)
    return found


def auc(member, other):
    """Probability that a member scores above an other, ties counted half."""
    ranks = rankdata(np.concatenate([member, other]))[:len(member)]
    return float((ranks.sum() - len(member) * (len(member) + 1) / 2)
                 / (len(member) * len(other)))


def _interval(value, draws, level):
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return {'value': float(value), 'low': float(low), 'high': float(high)}


def _cross_fitted(member, other, rng):
    """Which members and others are told right by thresholds chosen on the other half of them."""
    half = [rng.permutation(len(s)) % 2 for s in (member, other)]
    right = [np.empty(len(s)) for s in (member, other)]
    for part in (0, 1):
        seen = [s[h != part] for s, h in zip((member, other), half)]
        cuts = np.unique(np.concatenate(seen))
        rates = [1 - np.searchsorted(np.sort(s), cuts, side='left') / len(s) for s in seen]
        cut = cuts[np.argmax(rates[0] - rates[1])]
        right[0][half[0] == part] = member[half[0] == part] >= cut
        right[1][half[1] == part] = other[half[1] == part] < cut
    return right


def _tpr_at(member, other, fpr, level):
    """TPR at the lowest threshold that at most floor(fpr * n) others reach."""
    allowed = int(np.floor(fpr * len(other)))
    limit = np.sort(other)[::-1][allowed]    # the first other that must stay below
    found = int((member > limit).sum())
    interval = binomtest(found, len(member)).proportion_ci(level, method='exact')
    return {'value': found / len(member), 'low': float(interval.low),
            'high': float(interval.high), 'resolved': len(other) * fpr >= 1}


def roc(member, other):
    """(false positive rates, true positive rates) over all thresholds, from (0, 0) to (1, 1)."""
    cuts = np.unique(np.concatenate([member, other]))[::-1]
    rates = [np.searchsorted(np.sort(-np.asarray(s)), -cuts, side='right') / len(s)
             for s in (other, member)]
    return tuple(np.concatenate([[0.0], r]) for r in rates)


def plot_roc(curves, path, *, title=''):
    """ROC curves on logarithmic axes, where low false positive rates can be read.

    curves: {name: (member scores, other scores)}.
    """
    figure = Figure(figsize=(6, 6), layout='constrained')
    axes = figure.subplots()
    lowest = 1 / max(len(other) for _, other in curves.values())
    for name, (member, other) in curves.items():
        fpr, tpr = roc(member, other)
        axes.step(np.maximum(fpr, lowest / 2), np.maximum(tpr, 1e-4), where='post',
                  label=f'{name} (AUC {auc(member, other):.2f})')
    line = np.geomspace(lowest / 2, 1)
    axes.plot(line, line, color='grey', linestyle=':', label='chance')
    axes.set(xscale='log', yscale='log', xlim=(lowest / 2, 1), ylim=(lowest / 2, 1.1),
             xlabel='false positive rate', ylabel='true positive rate', title=title)
    axes.legend(loc='lower right', fontsize='small')
    with atomic_path(path) as temp:
        figure.savefig(temp, format='png')


def precision_at_k(scores, same, topk):
    """The published number: share of the `topk` best-scored photographs that are members.

    scores [C, n]: of photograph n for release picture C. same [C, n]: true membership. Ties are
    broken against the attacker.
    """
    order = np.lexsort((same, -np.asarray(scores)), axis=1)[:, :topk]
    return float(np.take_along_axis(np.asarray(same), order, 1).mean())


def reidentification_rates(ranks, n_release):
    """Rates of finding the own group's picture first, and among the first five, with chance.

    ranks [q]: 1 is the best. Exact binomial intervals.
    """
    ranks = np.asarray(ranks)
    found = {'n_probes': len(ranks), 'n_release': n_release,
             'median_rank': float(np.median(ranks))}
    for top in (1, 5):
        hits = int((ranks <= top).sum())
        interval = binomtest(hits, len(ranks)).proportion_ci(method='exact')
        found[f'rank_{top}'] = hits / len(ranks)
        found[f'rank_{top}_low'], found[f'rank_{top}_high'] = map(float, interval)
        found[f'chance_rank_{top}'] = min(1.0, top / n_release)
    return found
