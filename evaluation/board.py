"""The results as answers: what an ethics board asks, what was found, against which control."""

from collections.abc import Iterator
from typing import NamedTuple

from evaluation.comparison import Row
from evaluation.registry import Measure, interval

RISK_LINE = 0.09  # re-identification risk accepted by EMA policy 0070 and Health Canada


class Answer(NamedTuple):
    """A question, its answer in a word, the number behind it, its control, and what it leaves out.

    found: whether something was found beyond the control; useful: whether that is to the good.
    """

    question: str
    answer: str
    number: str
    control: str
    caveat: str
    found: bool
    useful: bool = False


class Section(NamedTuple):
    """The answers of one release; risk: what 1/k says beside the regulators' line."""

    name: str
    title: str
    risk: str
    answers: list[Answer]


# By attack: how it asks whether a person is in the release, and what the number leaves out.
_ATTACKERS = {
    'projection': (
        'with the very photograph and the network of the makers',
        'the strongest of about twenty readings, as is its control',
    ),
    'pixel': ('with the very photograph, by comparing pixels', 'sees copies, and little else'),
    'content': ('with the very photograph and a network that knows pictures', ''),
    'vessel': ('with the very photograph, by comparing vessels', ''),
    'pair': ('with the very photograph, who knows half of the groups', ''),
    'identity': (
        'with the very photograph and a network that knows eyes',
        'the network has not seen the method',
    ),
    'pair_trained': (
        'with the very photograph, who has trained on releases by the same method',
        'trained on a release of other people, of general features',
    ),
    'identity_trained': (
        'with the very photograph and a network that knows eyes, who has trained on the method',
        'trained on a release of other people',
    ),
}


def attackers(rows: list[Row]) -> list[str]:
    """How good the networks are that know eyes, a sentence for each; none where none was asked."""
    found = {}
    for row in rows:
        for label, result in row.results.get('identity', {}).get('by_judge', {}).items():
            if result.get('network'):
                found[label] = _knowing(label, result['network'])
    return list(found.values())


def _knowing(label: str, figures: dict) -> str:
    task = (
        'the two eyes of a person from eyes of two people'
        if figures.get('fellow')
        else 'two photographs of an eye from photographs of two people'
    )
    return (
        f'The network that knows eyes ({label}) tells {task} with an AUC of '
        f'{interval(figures["auc"], ".4f")} and an equal error rate of '
        f'{figures["equal_error_rate"]:.1%}, by {figures["n_member_people"]} people who taught it '
        'nothing.'
    )


def sections(rows: list[Row], measures: list[Measure]) -> list[Section]:
    """What is said of every release that stands for groups; the k-SALSA releases first."""
    grouped = [row for row in rows if row.method.grouped]
    ordered = sorted(grouped, key=lambda row: row.method.name != 'k_salsa')
    return [
        Section(row.name, row.method.title, _risk(row.k), list(_answers(row, measures)))
        for row in ordered
    ]


def _risk(k: int) -> str:
    side = 'meets' if 1 / k <= RISK_LINE else 'is above'
    return f'1/k = {1 / k:.2f} {side} the line of {RISK_LINE} (EMA, Health Canada)'


def _answers(row: Row, measures: list[Measure]) -> Iterator[Answer]:
    for measure in measures:
        result = row.results[measure.name]
        if measure.attack:
            who, caveat = _ATTACKERS.get(measure.name, (f'by the attack {measure.name}', ''))
            yield _membership(f'Can somebody tell that a person is in it, {who}?', result, caveat)
            if result.get('again'):
                yield _another_photograph(result['again'])
            if result.get('linked'):
                yield from _linked(result)
        elif measure.score is not None:
            score = measure.score(result)
            low = score['low']
            yield Answer(
                f'Is it good for anything: {measure.title}?',
                'yes' if low > 0.5 else 'not that can be seen',
                interval(score, '.2f'),
                '0.50: guessing',
                'a probe or grader trained on the release alone, tested on other people',
                low > 0.5,
                useful=True,
            )


def _membership(question: str, result: dict, caveat: str) -> Answer:
    excess, control = result.get('excess'), result.get('control')
    beyond = excess or {n: result['auc'][n] - 0.5 for n in ('value', 'low', 'high')}
    found = beyond['low'] > 0
    seen = (beyond['high'] - beyond['low']) / 2
    rate = result['tpr_at_1pct_fpr']
    notes = [caveat] * bool(caveat)
    notes.append(f'{rate["value"]:.0%} of the members are found at 1 % false alarms')
    if not rate['resolved']:
        notes[-1] += ', which so few others cannot resolve'
    if not found:
        notes.append(f'less than {seen:.2f} would not have been seen')
    return Answer(
        question,
        'yes' if found else 'not that can be seen',
        'AUC ' + interval(result['auc'], '.2f'),
        '0.50: guessing' if control is None else 'AUC ' + interval(control['auc'], '.2f'),
        '; '.join(notes),
        found,
    )


def _another_photograph(again: dict) -> Answer:
    found = again['auc']['low'] > 0.5
    return Answer(
        'And with another photograph of the same eye?',
        'yes' if found else 'not that can be seen',
        'AUC ' + interval(again['auc'], '.2f'),
        '0.50: guessing',
        f'{again["n_member_people"]} members, {again["n_other_people"]} others',
        found,
    )


def _linked(result: dict) -> Iterator[Answer]:
    linked, single = result['linked'], result['singled_out']
    found = linked['excess']['low'] > 0
    yield Answer(
        'Does a photograph of a member lead to the picture of his group?',
        'yes' if found else 'no more than one of somebody like him',
        interval(linked['members'], '.2f'),
        interval(linked['control'], '.2f'),
        'control: people who are not in it, and the group that looks most like them',
        found,
    )
    found = single['excess']['low'] > 0
    yield Answer(
        'Can a person be singled out for a picture, from all people asked?',
        'yes' if found else 'no more than one like him',
        interval(single, '.2f'),
        f'{interval(single["control"], ".2f")} (chance {single["chance"]:.3f})',
        'the attacker names one person per picture; control: among people who are not in it, one '
        f'who looks like its group; among as many members {interval(single["alone"], ".2f")}',
        found,
    )
