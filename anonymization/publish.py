"""The last gate: nothing becomes `release/` that the audit has not passed."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from anonymization.audit import Audit, audit_release, plot_distances, report_dict, report_text
from anonymization.audit.checks import audit_from_dict
from anonymization.card import Card
from anonymization.records import FACTS, write_card
from anonymization.release import MANIFEST, describe_anew
from anonymization.signature import signature_path
from datasets.table import Table
from utils.errors import PrivacyError, UserError, listing
from utils.io import atomic_path, is_intact, sealing, sha256_file, write_json

log = logging.getLogger(__name__)

AUDIT, DISTANCES = 'audit.json', 'audit_distances.png'


def publish(staging: Path, release: Path, private: Path, table: Table) -> Audit:
    """Verifies the staged release and moves it into place; PrivacyError when it fails."""
    audit = audit_release(staging, private=private, source_table=table)
    write_audit(private, staging, audit)
    if audit.distances is not None:
        figure = Figure(figsize=(8, 4), layout='constrained')
        plot_distances(audit, figure.subplots())
        with atomic_path(private / DISTANCES) as temp:
            figure.savefig(temp, format='png')
    log.info('verification:\n%s', report_text(audit))
    if not audit.passed:
        raise PrivacyError(
            f'the release fails its verification and is not published (it is in '
            f'{staging}): '
            + '; '.join(f'{c.name}: {c.detail}' for c in audit.checks if not c.passed)
        )
    former = private / 'former_release'
    shutil.rmtree(former, ignore_errors=True)
    if release.exists():
        release.rename(former)
    staging.rename(release)
    shutil.rmtree(former, ignore_errors=True)
    return audit


def write_audit(private: Path, release: Path, audit: Audit) -> None:
    """Keeps what the audit found of `release`, with names and ids, bound to its manifest."""
    with sealing(private / AUDIT, _made_from(release)):
        write_json(private / AUDIT, report_dict(audit, private=True))


def finished(release: Path, private: Path, table: Table, card: Card | None) -> Audit:
    """Looks at a published release; with another card its pages are written anew.

    Returns what its audit found, without a second one where that is known; PrivacyError when it
    does not pass, UserError when a file of the release is not what its manifest says.
    """
    there = _check_files(release)
    if card is None or there == card:
        log.info('%s is complete; another run needs another folder', release)
        return _audit_of(release, private, table)
    staging = private / 'staging'
    shutil.rmtree(staging, ignore_errors=True)
    describe_anew(release, staging, card)
    before = json.loads((private / FACTS).read_text(encoding='utf-8'))['facts'].get('card')
    write_card(private, card)
    try:
        audit = publish(staging, release, private, table)
    except BaseException:
        write_card(private, before)
        raise
    log.info('%s says what the card says; the pictures are the same', release)
    if signature_path(release).exists():
        log.warning(
            '%s was made before and does not fit any more: sign the release again',
            signature_path(release),
        )
    return audit


def check_place(run_folder: Path) -> None:
    """UserError for a release/ in `run_folder` that holds something else."""
    release = run_folder / 'release'
    if release.is_dir() and (release / MANIFEST).is_file():
        return
    if release.exists() and not (release.is_dir() and not any(release.iterdir())):
        raise UserError(
            f'{release} exists and is no finished release (no {MANIFEST}); move it '
            'away, and the same command makes it anew'
        )


def _made_from(release: Path) -> str:
    manifest = release / MANIFEST
    return f'the manifest {sha256_file(manifest) if manifest.is_file() else "that is missing"}'


def _audit_of(release: Path, private: Path, table: Table) -> Audit:
    """The audit that let `release` pass; a new one where there is no record of that."""
    if is_intact(private / AUDIT, _made_from(release)):
        audit = audit_from_dict(json.loads((private / AUDIT).read_text(encoding='utf-8')))
        if audit.passed:
            return audit
    audit = audit_release(release, private=private, source_table=table)
    write_audit(private, release, audit)
    if not audit.passed:
        raise PrivacyError(
            f'{release} does not pass its verification; move it away, and the same command '
            f'makes it anew ({"; ".join(c.name for c in audit.checks if not c.passed)})'
        )
    return audit


def _check_files(release: Path) -> Any:
    """The card of a published release; UserError when it is not what its manifest says."""
    try:
        manifest = json.loads((release / MANIFEST).read_text(encoding='utf-8'))
        bad = sorted(
            n
            for n, digest in manifest['files'].items()
            if not (release / n).is_file() or sha256_file(release / n) != digest
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        manifest, bad = {}, [MANIFEST]
    if bad:
        raise UserError(
            listing(
                f'{release} is finished, but {len(bad)} of its files are damaged '
                'or missing; move it away, and the same command makes it anew',
                bad,
            )
        )
    return manifest.get('card')
