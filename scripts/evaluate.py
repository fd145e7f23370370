"""What a release is worth: methods against metrics, side by side, in one command.

    python scripts/evaluate.py --config=configs/evaluation/phantoms.yaml --out_dir=runs/evaluation

Splits the patients into members, whose photographs the releases are made of, and others, who are
never used: they test the graders and are the attacks' non-members. For every method: fidelity on
the features of the content encoder, the score of graders trained on it (several seeds), and what
attacks find out. Every stage is cached; the same command goes on where a run stopped.

In --out_dir: results.json, results.md, results.html (with examples, the privacy-utility plot and
ROC curves), split.csv. Examples of `real` and `inverted` show photographs: keep the page private.

Entries of the configuration: name; phantoms {n_patients, size, visits, seed}, or table, image_dir
and optionally split_column {members, others} values; members (share of patients); checkpoint,
content_weights, style_weights, style_weight, content_weight, lr, num_steps, precision; k; methods;
grader (a configuration of classification/configs); seeds.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dataclasses
import functools
import itertools
import json
import logging
import subprocess

import jinja2
import numpy as np
import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure

from classification.data import TrainingSet, one_hot
from classification.experiment import WEIGHTS, run_seeds
from classification.grader import GraderResult, build_grader
from classification.settings import find_config, load_config
from datasets.people import merge_identical
from datasets.table import read_table
from evaluation.attacks.metrics import attack_metrics, plot_roc, reidentification_rates
from evaluation.attacks.nearest import closest_release_scores, reidentification_ranks
from evaluation.attacks.vessels import VesselAttack
from evaluation.fidelity import extract_features, fidelity
from evaluation.population import people_of, populate, roles_of
from evaluation.spectra import sharpness
from evaluation.splits import split_table
from models.features.content import load_content_network
from models.psp import load_psp
from utils import cli
from utils.errors import UserError
from utils.images import from_uint8, grid, load_rgb, resize, save_png, to_uint8
from utils.io import atomic_path, load_weights, save_npy, write_csv, write_json, write_text
from utils.logs import setup_logging
from utils.runs import run_record, start_run, versions
from utils.seeds import numpy_generator, torch_generator

log = logging.getLogger(__name__)

METHODS = {
    'real': 'all member photographs (upper yardstick)',
    'real_same_n': 'as many member photographs as there are groups',
    'inverted': 'every member photograph inverted, k = 1 (leaks: positive control)',
    'pixel_average': 'mean of the pixels of a group (k-Same)',
    'centroid': 'picture of the mean latent of a group',
    'unconditional': 'generator samples, graded by a network (independent: negative control)',
    'k_salsa': 'k-SALSA',
}
GROUPED = ('pixel_average', 'centroid', 'k_salsa')
ATTACKS = {'pixel': 'nearest in pixels', 'content': 'nearest in content features',
           'vessel': 'vessel maps after registration'}
_REQUIRED = ('checkpoint', 'content_weights', 'k', 'methods', 'grader', 'seeds')
_DEFAULTS = {'name': '', 'phantoms': None, 'table': None, 'image_dir': None,
             'split_column': None, 'members': 0.5, 'style_weights': 'filters',
             'style_weight': 1e-6, 'lr': 0.1, 'content_weight': 1e2, 'num_steps': 100,
             'precision': 'fp32'}
_EXAMPLES = 8


def build_parser():
    p = cli.parser(__doc__.splitlines()[0], '\n'.join(__doc__.splitlines()[1:]))
    p.add_argument('--config', type=Path, required=True, metavar='YAML',
                   help='what to compare on which data')
    p.add_argument('--out_dir', type=Path, required=True, metavar='DIR', help='run folder')
    return cli.add_common(p)


def read_config(path):
    """The configuration with defaults; UserError that names missing, unknown and wrong entries."""
    try:
        config = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f'--config {path}: {error}') from error
    if not isinstance(config, dict):
        raise UserError(f'--config {path}: not a table of entries')
    missing = [k for k in _REQUIRED if k not in config]
    unknown = sorted(config.keys() - set(_REQUIRED) - _DEFAULTS.keys())
    if missing or unknown:
        raise UserError(f'--config {path}: missing {missing or "nothing"}, unknown '
                        f'{unknown or "nothing"}')
    if strange := [m for m in config['methods'] if m not in METHODS]:
        raise UserError(f'--config {path}: unknown methods {strange}; choose from '
                        f'{", ".join(METHODS)}')
    config = {**_DEFAULTS, **config}
    for name in ('k', 'seeds', 'methods'):
        if not isinstance(config[name], list) or not config[name]:
            raise UserError(f'--config {path}: {name}: want a list, not {config[name]!r}')
    files = {n: config[n] for n in ('checkpoint', 'content_weights', 'style_weights')}
    files = {n: v for n, v in files.items() if not (n == 'style_weights' and v == 'filters')}
    if absent := [f'{n}: {v}' for n, v in files.items() if not Path(located(v)).is_file()]:
        raise UserError(f'--config {path}: no such files (paths count from the project folder): '
                        f'{"; ".join(absent)}')
    if 'unconditional' in config['methods'] and 'real' not in config['methods']:
        raise UserError(f'--config {path}: unconditional pictures are graded by a network that '
                        'was trained on photographs; list real too')
    if (config['phantoms'] is None) == (config['table'] is None):
        raise UserError(f'--config {path}: give either phantoms or table')
    return config


def located(path):
    """Paths of a configuration count from the project folder."""
    return str(ROOT / path)


def call(name, *arguments):
    """Runs another script of this folder; UserError when it fails."""
    log.info('%s %s', name, ' '.join(map(str, arguments)))
    code = subprocess.run([sys.executable, str(ROOT / 'scripts' / f'{name}.py'),
                           *map(str, arguments)], check=False).returncode
    if code:
        raise UserError(f'scripts/{name}.py failed with exit code {code}')


# -- data -----------------------------------------------------------------------------------


def prepare_data(config, out_dir, seed):
    """Reads or draws the photographs and splits them by patient; records split.csv."""
    if config['phantoms']:
        folder = out_dir / 'phantoms'
        if not (folder / 'labels.csv').exists():
            p = config['phantoms']
            call('make_phantoms', f'--out_dir={folder}', f'--n_patients={p["n_patients"]}',
                 f'--size={p["size"]}', f'--visits={p["visits"]}', f'--seed={p["seed"]}')
        table = read_table(folder / 'labels.csv', require_label=True)
    else:
        table = read_table(Path(located(config['table'])), config['image_dir'] and
                           Path(located(config['image_dir'])), require_label=True)
    table = merge_identical(table)
    roles = roles_of(table, share=config['members'], column=config['split_column'], seed=seed)
    write_csv(out_dir / 'split.csv', split_table(table, roles))
    return populate(table, roles, seed=seed)


def pictures_of(paths, side):
    """uint8 [n, 3, side, side]."""
    return np.stack([np.asarray(resize(load_rgb(p), side)).transpose(2, 0, 1) for p in paths])


# -- methods --------------------------------------------------------------------------------


@dataclasses.dataclass
class Candidate:
    """One release: pictures uint8 [n, 3, S, S], grades [n], and the group of each member.

    group_of [members]: index of the picture a member stands behind, -1 for none. people: whose
    photograph each picture is, None where a picture is nobody's own.
    """

    method: str
    k: int
    pictures: np.ndarray
    labels: np.ndarray
    shares: np.ndarray
    group_of: np.ndarray
    real: bool = False
    people: list | None = None

    @property
    def in_release(self):
        """Members whom the attacks can find [m]: who stand behind a picture; all, if none does."""
        known = self.group_of >= 0
        return known if known.any() else ~known


def make_release(config, data, k, opts):
    """Runs k-SALSA on the members; returns its run folder."""
    table = opts.out_dir / 'members.csv'
    frame = pd.DataFrame({'id_code': [p.name for p in data.members.paths],
                          'diagnosis': data.members.labels})
    if data.members.patients:
        frame['patient_id'] = data.members.patients
    write_csv(table, frame)
    run = opts.out_dir / f'k{k}'
    call('k-SALSA', f'--exp_dir={run}', f'--checkpoint_path={located(config["checkpoint"])}',
         f'--data_path={data.members.paths[0].parent}', f'--df={table}', f'--same_k={k}',
         f'--content_weights={located(config["content_weights"])}',
         f'--style_weights={style_weights(config)}', f'--style_weight={config["style_weight"]}',
         f'--lr={config["lr"]}',
         f'--content_weight={config["content_weight"]}', f'--num_steps={config["num_steps"]}',
         '--centroids', '--save_reconstructions', f'--precision={config["precision"]}',
         f'--device={opts.device}',
         f'--seed={opts.seed}')
    return run


def style_weights(config):
    value = config['style_weights']
    return value if value == 'filters' else located(value)


def grouped_candidates(config, data, pictures, k, opts, side):
    """Candidates that come from the groups of one k."""
    run = make_release(config, data, k, opts)
    groups = pd.read_csv(run / 'private' / 'groups.csv', keep_default_na=False)
    names = sorted(set(groups.release_name) - {''})
    index = {n: i for i, n in enumerate(names)}
    group_of = np.array([index.get(n, -1) for n in groups.release_name])
    counts = np.zeros((len(names), 5))
    np.add.at(counts, (group_of[group_of >= 0], data.members.labels[group_of >= 0]), 1)
    shares, labels = counts / counts.sum(1, keepdims=True), counts.argmax(1)
    found = {
        'k_salsa': lambda: pictures_of([run / f'release/images/{n}.png' for n in names], side),
        'centroid': lambda: pictures_of([run / f'private/centroids/{n}.png' for n in names],
                                        side),
        'pixel_average': lambda: np.stack([
            np.rint(pictures[group_of == i].mean(0)).astype(np.uint8)
            for i in range(len(names))]),
    }
    return [Candidate(m, k, found[m](), labels, shares, group_of)
            for m in config['methods'] if m in found], run, len(names)


def single_candidates(config, data, pictures, run, n_groups, opts, side, device):
    """Candidates that do not depend on groups; `unconditional` still lacks grades."""
    n, labels = len(pictures), data.members.labels
    own, people = np.arange(n), data.members.patients
    made = []
    for method in config['methods']:
        if method in ('real', 'real_same_n'):
            rows = own
            if method == 'real_same_n':
                rows = np.sort(numpy_generator(opts.seed, method).choice(n, n_groups, False))
            group_of = np.full(n, -1)
            group_of[rows] = np.arange(len(rows))
            made.append(Candidate(method, 1, pictures[rows], labels[rows],
                                  one_hot(labels[rows]), group_of, real=True,
                                  people=people and [people[i] for i in rows]))
        elif method == 'inverted':
            again = pictures_of([run / 'private/reconstructions' / f'{Path(p.name).stem}.png'
                                 for p in data.members.paths], side)
            made.append(Candidate(method, 1, again, labels, one_hot(labels), own, people=people))
        elif method == 'unconditional':
            made.append(Candidate(method, 0, sample(config, n_groups, opts.seed, side, device),
                                  None, None, np.full(n, -1)))
    return made


@torch.no_grad()
def sample(config, n, seed, side, device):
    """Unconditional pictures of the generator, stored noise, no truncation."""
    psp = load_psp(located(config['checkpoint']), device)
    z = torch.randn(n, psp.decoder.style_dim, generator=torch_generator(seed, 'unconditional'))
    images = torch.cat([psp.decoder(part.to(device)) for part in z.split(16)])
    return to_uint8(torch.nn.functional.adaptive_avg_pool2d(images, side)).cpu().numpy()


# -- measurements ---------------------------------------------------------------------------


def utility(candidate, config, grader, data, test_pictures, folder, device):
    """Scores of graders trained on a candidate, over the seeds."""
    n = len(candidate.pictures)
    training = TrainingSet([str(i) for i in range(n)], [[] for _ in range(n)], candidate.labels,
                           candidate.shares, candidate.people)
    return run_seeds(training, candidate.pictures, data.others, test_pictures, config=grader,
                     out_dir=folder, device=device)


def grade_samples(candidate, grader_folder, grader, seed, device):
    """Grades of unconditional pictures by the first grader that was trained on photographs."""
    folder = grader_folder / f'seed_{seed}'
    record = json.loads((folder / 'result.json').read_text(encoding='utf-8'))
    net = build_grader(grader.settings, seed=0)
    net.load_state_dict(load_weights(folder / WEIGHTS['best'], what='grader weights'))
    mean, std = (torch.tensor(record[f'channel_{name}']) for name in ('mean', 'std'))
    result = GraderResult(net.to(device), grader.settings, mean.to(device), std.to(device),
                          device=device)
    candidate.labels = result.predict(candidate.pictures).grades
    candidate.shares = one_hot(candidate.labels)


def privacy(candidate, data, views, embed, vessels):
    """Attack results of a candidate: {attack: metrics}, raw scores, and re-identification."""
    attacked = candidate.in_release
    sides = {'member_people': np.array(people_of(data.members))[attacked],
             'other_people': np.array(people_of(data.others))[data.nonmember]}
    found, raw = {}, {}
    for attack in ATTACKS:
        if attack == 'vessel':
            member, other = vessels().scores(candidate.pictures)
            member = member[attacked]
        else:
            member, other = closest_release_scores(
                views['members'][attacked], views['others'][data.nonmember], candidate.pictures,
                views['others'][~data.nonmember], embed[attack])
        found[attack] = attack_metrics(member, other, **sides)
        raw[attack] = (member, other)
    again = None
    known = candidate.group_of[data.again_of] if data.again is not None else np.array([])
    if data.again is not None and (known >= 0).any() and not candidate.real:
        keep = known >= 0
        ranks = reidentification_ranks(views['again'][keep], known[keep], candidate.pictures,
                                       embed['content'])
        again = reidentification_rates(ranks, len(candidate.pictures),
                                       people=np.array(people_of(data.again))[keep])
    return found, raw, again


def evaluate(candidates, config, grader, data, views, network, opts, device):
    """Rows of the table, one per candidate; cached as JSON."""
    side = views['members'].shape[-1]
    embed = {'pixel': lambda u8: u8.reshape(len(u8), -1).astype(np.float32) / 255,
             'content': lambda u8: extract_features(network, u8, device=device)}
    real_features = embed['content'](views['others'])
    # Made when the first candidate needs it, not when all is cached.
    vessels = functools.cache(lambda: VesselAttack(
        views['members'], views['others'][data.nonmember], views['others'][~data.nonmember]))
    curves, rows = {}, []
    for c in sorted(candidates, key=lambda c: list(METHODS).index(c.method)):
        name = f'{c.method}_k{c.k}' if c.method in GROUPED else c.method
        folder = opts.out_dir / 'methods' / name
        if c.labels is None:
            grade_samples(c, opts.out_dir / 'methods' / 'real' / 'grader', grader,
                          config['seeds'][0], device)
        if not (folder / 'row.json').exists():
            log.info('evaluating %s', name)
            folder.mkdir(parents=True, exist_ok=True)
            attacks, raw, again = privacy(c, data, views, embed, vessels)
            for attack, (member, other) in raw.items():
                save_npy(folder / f'{attack}_member.npy', member)
                save_npy(folder / f'{attack}_other.npy', other)
            row = {'name': name, 'method': c.method, 'k': c.k, 'n': len(c.pictures),
                   'fidelity': fidelity(real_features, embed['content'](c.pictures),
                                        seed=opts.seed),
                   'sharpness': sharpness(views['others'], c.pictures),
                   'utility': utility(c, config, grader, data, views['others'],
                                      folder / 'grader', device),
                   'attacks': attacks, 'reidentification': again}
            cells = from_uint8(torch.from_numpy(c.pictures[:_EXAMPLES]))
            save_png(grid(cells, _EXAMPLES), folder / 'examples.png')
            write_json(folder / 'row.json', row)
        rows.append(json.loads((folder / 'row.json').read_text(encoding='utf-8')))
        curves[name] = {a: tuple(np.load(folder / f'{a}_{part}.npy')
                                 for part in ('member', 'other')) for a in ATTACKS}
    log.info('%d candidates of %d px evaluated', len(rows), side)
    return rows, curves


# -- the page -------------------------------------------------------------------------------


def privacy_utility_plot(rows, path):
    """Utility against the strongest attack, one point per method and k."""
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for row, marker in zip(rows, itertools.cycle('osD^v<>Ph*X')):
        auc = max(row['attacks'][a]['auc']['value'] for a in ATTACKS)
        score = row['utility']['summary']['auc_referable']
        axes.errorbar(auc, score['mean'], yerr=score['std'] or 0, marker=marker, capsize=3,
                      linestyle='', label=row['name'])
    axes.axvline(0.5, color='grey', linestyle=':')
    axes.axhline(0.5, color='grey', linestyle=':')
    axes.set(xlabel='membership attack, AUC of the strongest (0.5: learns nothing)',
             ylabel='grader on real eyes, AUC of referable DR')
    axes.legend(loc='center left', bbox_to_anchor=(1.01, 0.5))
    with atomic_path(path) as temp:
        figure.savefig(temp, format='png')


def markdown(rows, config):
    """The table of all methods and metrics."""
    head = ['method', 'k', 'n', 'FD-fundus', 'KID-fundus', 'AUC referable', 'kappa',
            *(f'attack: {a}' for a in ATTACKS), 'TPR at 1 % FPR', 're-identified, rank 1']
    lines = ['| ' + ' | '.join(head) + ' |', '|' + ' --- |' * len(head)]
    for r in rows:
        score = r['utility']['summary']
        attack = max(r['attacks'].values(), key=lambda a: a['auc']['value'])
        again = r['reidentification']
        cells = [r['method'], r['k'] or '-', r['n'], interval(r['fidelity']['fd'], '.3f'),
                 interval(r['fidelity']['kid'], '.1e'),
                 *(spread(score[s]) for s in ('auc_referable', 'kappa')),
                 *(interval(r['attacks'][a]['auc'], '.2f') for a in ATTACKS),
                 interval(attack['tpr_at_1pct_fpr'], '.2f'),
                 '-' if again is None else
                 f'{again["rank_1"]:.3f} (chance {again["chance_rank_1"]:.3f})']
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


def spread(score):
    """'mean ± standard deviation', without the latter after a single seed."""
    std = '' if score['std'] is None else f' ± {score["std"]:.3f}'
    return f'{score["mean"]:.3f}{std}'


def interval(value, style):
    """'value (low to high)', each in a format such as '.2f'."""
    return f'{value["value"]:{style}} ({value["low"]:{style}} to {value["high"]:{style}})'


def write_results(rows, curves, config, data, opts):
    out = opts.out_dir
    facts = {'name': config['name'], 'n_members': len(data.members), 'n_others': len(data.others),
             'n_again': 0 if data.again is None else len(data.again), 'versions': versions(),
             'seed': opts.seed}
    write_json(out / 'results.json', {'facts': facts, 'config': config, 'rows': rows})
    write_text(out / 'results.md', markdown(rows, config) + '\n')
    privacy_utility_plot(rows, out / 'privacy_utility.png')
    for attack in ATTACKS:
        plot_roc({name: curves[name][attack] for name in curves}, out / f'roc_{attack}.png',
                 title=ATTACKS[attack])
    page = jinja2.Environment(loader=jinja2.FileSystemLoader(ROOT / 'scripts' / 'templates'),
                              autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(out / 'results.html', page.get_template('evaluation.html').render(
        facts=facts, rows=rows, methods=METHODS, attacks=ATTACKS,
        table=[line.strip('| ').split(' | ') for line in markdown(rows, config).splitlines()
               if not line.startswith('| ---') and '---' not in line]))


def main(argv=None):
    opts = build_parser().parse_args(argv)
    setup_logging()
    config = read_config(opts.config)
    device = cli.resolve_device(opts.device)
    grader = load_config(find_config(config['grader']), seeds=tuple(config['seeds']))
    network = load_content_network(located(config['content_weights']))
    start_run(opts.out_dir, run_record(config, inputs={
        'checkpoint': located(config['checkpoint']),
        'content_weights': located(config['content_weights'])}, seed=opts.seed), resume=True)
    data = prepare_data(config, opts.out_dir, opts.seed)
    side = grader.settings.image_size
    views = {'members': pictures_of(data.members.paths, side),
             'others': pictures_of(data.others.paths, side)}
    if data.again is not None:
        views['again'] = pictures_of(data.again.paths, side)
    candidates, run, n_groups = [], None, None
    for k in sorted(config['k'], key=lambda k: k != 5):
        found, own_run, count = grouped_candidates(config, data, views['members'], k, opts, side)
        candidates += found
        if run is None:
            run, n_groups = own_run, count
    candidates += single_candidates(config, data, views['members'], run, n_groups, opts, side,
                                    device)
    rows, curves = evaluate(candidates, config, grader, data, views, network, opts, device)
    write_results(rows, curves, config, data, opts)
    print((opts.out_dir / 'results.md').read_text(encoding='utf-8'))
    log.info('page: %s', opts.out_dir / 'results.html')
    return 0


if __name__ == '__main__':
    cli.run(main)
