"""What a release is worth: methods against metrics, side by side, in one command.

    python scripts/evaluate.py --config=configs/evaluation/phantoms.yaml --out_dir=runs/evaluation

Splits the people into members, whose photographs the releases are made of, and others, who are
never used: they test the graders and are the attacks' non-members. For every method: fidelity on
the features of the content encoder, the score of graders trained on it (several seeds), and what
attacks find out. Every result is kept beside what it depends on; the same command goes on where a
run stopped, and after a change of the configuration computes what is missing.

In --out_dir: results.json, results.md, results.html (with examples, the privacy-utility plot and
ROC curves), split.csv. Examples of `real` and `inverted` show photographs: keep the page private.

Entries of the configuration: name; phantoms {n_patients, size, visits, seed}, or table, image_dir
and optionally split_column {members, others} values; members (share of patients); checkpoint,
content_weights, style_weights, style_weight, content_weight, lr, num_steps, precision; k; methods;
measures (default: all); grader (a configuration of classification/configs); seeds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import dataclasses
import logging
from collections.abc import Sequence

from evaluation.catalogue import MEASURES, METHODS
from evaluation.comparison import compare
from evaluation.releases import check_levers
from evaluation.report import write_report
from evaluation.settings import read_settings
from evaluation.study import open_study
from utils import cli
from utils.logs import setup_logging
from utils.runs import versions

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    p.add_argument(
        '--config', type=Path, required=True, metavar='YAML', help='what to compare on which data'
    )
    p.add_argument('--out_dir', type=Path, required=True, metavar='DIR', help='run folder')
    return cli.add_common(p)


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    settings = read_settings(opts.config)
    check_levers(settings)
    methods = METHODS.choose(settings.methods)
    measures = MEASURES.choose(settings.measures)
    study = open_study(
        settings, opts.out_dir, device=cli.resolve_device(opts.device), seed=opts.seed
    )
    rows = compare(study, methods, measures)
    facts = {
        'name': settings.name,
        'n_members': len(study.members),
        'n_others': len(study.others),
        'n_again': len(study.again),
        'versions': versions(),
        'seed': opts.seed,
    }
    print(
        write_report(opts.out_dir, rows, measures, facts=facts, config=dataclasses.asdict(settings))
    )
    log.info('page: %s', opts.out_dir / 'results.html')
    return 0


if __name__ == '__main__':
    cli.run(main)
