"""An independent look at a release: is it what its groups and its run record say?

Everything in a release can be derived again, so it is derived and compared: pages, labels and
manifest byte for byte, pictures in one form and against the digests of the run. Counts of people,
grades and diversity are the audit's own code, so that a fault in grouping or writing is not
repeated here. Without the private folder it checks what any recipient can check.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32

from anonymization.audit import copies, derive, noise, recompute, schema
from anonymization.audit.checks import Audit, Check, Findings, report_dict, report_text
from anonymization.audit.copies import plot_distances
from anonymization.audit.files import Fault, Tree, parse_json, read_regular, scan
from anonymization.audit.pictures import Picture, check_form, check_made, look_at
from anonymization.audit.records import Run, read_run
from anonymization.release import LABELS, MANIFEST, METADATA, OLDER_FORMATS, PAGES, render_pages
from datasets.table import Table
from models.psp import load_psp
from utils.errors import UserError

__all__ = ['Audit', 'Check', 'audit_release', 'plot_distances', 'report_dict', 'report_text']

FILES = 'there are the expected files, each a regular one, and nothing else'
CONTENT = 'manifest, labels and pages are what groups and run record say'
FORMED = 'manifest, labels and pages have the known form and agree with each other'


def audit_release(
    release: str | Path,
    *,
    private: str | Path | None = None,
    source_table: Table | None = None,
    recompute_n: int | None = 0,
    checkpoint: Path | None = None,
    device: torch.device | str = 'cpu',
) -> Audit:
    """Checks the folder `release`; with `private` and the photographs it is derived again.

    source_table: of the photographs behind the release; goes with `private`. recompute_n: how
    many pictures to synthesise anew, None for all, with the networks in `checkpoint` (default: the
    run's). UserError when a folder is missing, a private record cannot be read, or the release is
    of an older version; ValueError when only one of private and source_table is given.
    """
    release = Path(release)
    if not release.is_dir():
        raise UserError(f'release folder not found: {release}')
    if not any((release / name).exists() for name in (MANIFEST, LABELS, 'images')):
        inside = release / 'release'
        meant = f'; did you mean {inside}?' if (inside / MANIFEST).exists() else ''
        raise UserError(f'{release} is no release: it has no {MANIFEST}, labels or pictures{meant}')
    if (private is None) != (source_table is None):
        raise ValueError('private and source_table go together')
    _check_version(release)
    if private is None or source_table is None:
        return _audit_alone(release)
    run = read_run(Path(private), source_table)
    latents = recompute.read_latents(run)
    audit = _audit_derived(release, run, latents)
    if recompute_n != 0:
        check, audit.facts['recomputed'] = recompute.check_recomputed(
            release, run, latents, recompute_n, checkpoint=checkpoint, device=device
        )
        audit.checks.append(check)
        if run.options['epsilon'] is not None:
            psp = load_psp(checkpoint or run.options['checkpoint_path'])
            audit.checks.append(noise.check_told(run, latents, psp))
    return audit


def _check_version(release: Path) -> None:
    """UserError for a release in the format of an older version."""
    try:
        found = parse_json(read_regular(release / MANIFEST)).get('format')
    except Fault:
        return  # said among the findings
    if found in OLDER_FORMATS:
        raise UserError(
            f'{release} is in the format {found} of an older version of this project; '
            'verify it with that version, or make the release anew with this one'
        )


# -- with the records of the run ------------------------------------------------------------


def _audit_derived(release: Path, run: Run, latents: Float32[np.ndarray, 'C L D']) -> Audit:
    audit = Audit(facts={'k': run.k, 'pictures': len(run.names)})
    names = sorted(run.names.values())
    size = run.facts['image_size']
    pictures = look_at(release, names, size if isinstance(size, int) else None, with_features=True)
    audit.checks = [
        derive.check_records(run),
        *derive.check_groups(run),
        _check_files(release, names),
        _check_content(release, run, pictures),
        check_form(pictures, run.facts['png_encoder']),
        check_made(pictures, run.pictures),
        recompute.check_one_person(run, latents),
    ]
    if not run.table.patients:
        audit.notes.append(
            'the table has no patient column: every photograph is taken for another person, '
            'photographs are counted'
        )
    grades, audit.facts['grade_diversity'] = derive.check_grades(run)
    seen = [(p.name, p.features) for p in pictures]
    audit.checks += [grades, copies.check_copies(seen, run, audit)]
    return audit


def _check_content(release: Path, run: Run, pictures: list[Picture]) -> Check:
    """Every page byte for byte, as it follows from groups, photographs and run record."""
    found = Findings(CONTENT)
    derive.check_networks(run, found)
    derive.check_card(run, found)
    manifest, labels = derive.manifest_without_files(run), derive.labels_text(run)
    noise.check_noise(manifest, found)
    table = pd.read_csv(io.StringIO(labels), dtype={'image': str}, keep_default_na=False)
    rendered = render_pages(manifest, table)
    rendered |= {LABELS: labels, METADATA: derive.metadata_text(run)}
    wanted = {name: rendered[name].encode() for name in PAGES}
    hashes = {f'images/{p.name}.png': p.sha256 for p in pictures}
    hashes |= {name: hashlib.sha256(data).hexdigest() for name, data in wanted.items()}
    manifest['files'] = {name: hashes[name] for name in _in_order(hashes)}
    wanted[MANIFEST] = (json.dumps(manifest, indent=2) + '\n').encode()
    for name, data in wanted.items():
        try:
            there = read_regular(release / name)
        except Fault as fault:
            found.add(f'{name} {fault}')
            continue
        if there != data:
            found.add(
                f'{name} differs from what follows from them'
                + (_which_fields(there, manifest) if name == MANIFEST else '')
            )
    return found.check(f'{len(wanted)} files derived again')


def _in_order(names: Any) -> list[str]:
    """File names as a manifest lists them: folder by folder."""
    return sorted(names, key=lambda name: Path(name).parts)


def _which_fields(data: bytes, wanted: dict[str, Any]) -> str:
    """Which of the known fields differ; unknown ones are only counted, their names may be ids."""
    try:
        there = parse_json(data)
    except Fault as fault:
        return f' (it {fault})'
    wrong = [name for name, value in wanted.items() if there.get(name) != value]
    extra = len(there.keys() - wanted.keys())
    return f' ({", ".join(wrong) or "order"}{f", {extra} foreign fields" if extra else ""})'


# -- both ways ------------------------------------------------------------------------------


def _check_files(release: Path, names: list[str]) -> Check:
    """Exactly the expected files. Foreign names are private: they may be anything, also ids."""
    found = Findings(FILES)
    tree = _scan(release, found)
    wanted = {MANIFEST, *PAGES, *(f'images/{n}.png' for n in names)}
    if missing := sorted(wanted - tree.files):
        found.add(f'{len(missing)} of {len(wanted)} files are missing', missing)
    for name, kind in sorted(tree.odd.items()):
        found.add(f'{_place(name)} there is {kind}', [name])
    for name in sorted(tree.files - wanted):
        found.add(f'{_place(name)} there is a file that does not belong there', [name])
    for name in sorted(tree.folders - {'images'}):
        found.add(f'{_place(name)} there is a folder that does not belong there', [name])
    if tree.attributes:
        found.add(
            f'{len(tree.attributes)} files or folders carry extended attributes',
            sorted(tree.attributes),
        )
    return found.check(f'{len(wanted)} files')


def _scan(release: Path, found: Findings) -> Tree:
    try:
        return scan(release)
    except OSError as error:
        found.add(f'the folder cannot be listed ({error.strerror})', [error.filename])
        return Tree(frozenset(), frozenset(), {}, frozenset())


def _place(name: str) -> str:
    return (
        'in images/'
        if name.startswith('images/')
        else ('in a foreign folder' if '/' in name else 'beside the manifest')
    )


# -- without them ---------------------------------------------------------------------------


def _audit_alone(release: Path) -> Audit:
    """What a recipient can check: names, form, schema, sums, hashes."""
    audit, found = Audit(), Findings(FORMED)
    manifest, labels = _read_pages(release, found)
    names = [] if labels is None else labels['image'].tolist()
    size = (manifest or {}).get('image_size')
    pictures = look_at(release, names, size if isinstance(size, int) else None)
    if manifest is not None and labels is not None:
        _check_hashes(release, manifest, pictures, found)
    audit.facts = {'k': (manifest or {}).get('k'), 'pictures': len(pictures)}
    audit.checks = [
        _check_files(release, names),
        found.check(f'format {(manifest or {}).get("format")}'),
        check_form(pictures, (manifest or {}).get('png_encoder')),
    ]
    audit.notes.append(
        'groups, pictures and pages were not derived again, and not compared with '
        'photographs: the maker does that, with the private folder'
    )
    return audit


def _read_pages(
    release: Path, found: Findings
) -> tuple[dict[str, Any] | None, pd.DataFrame | None]:
    """Manifest and labels where they can be relied upon, else None."""
    manifest = labels = None
    try:
        manifest = parse_json(read_regular(release / MANIFEST))
    except Fault as fault:
        found.add(f'{MANIFEST} {fault}')
    try:
        labels = schema.read_labels(read_regular(release / LABELS))
    except Fault as fault:
        found.add(f'{LABELS} {fault}')
    if manifest is None or not schema.check_manifest(manifest, found):
        return None, labels
    if labels is None:
        return manifest, None
    schema.check_sums(manifest, labels, found)
    without = {name: value for name, value in manifest.items() if name != 'files'}
    for name, text in render_pages(without, labels).items():
        try:
            if read_regular(release / name) != text.encode():
                found.add(f'{name} is not what manifest and labels say')
        except Fault as fault:
            found.add(f'{name} {fault}')
    return manifest, labels


def _check_hashes(
    release: Path, manifest: dict[str, Any], pictures: list[Picture], found: Findings
) -> None:
    hashes = {f'images/{p.name}.png': p.sha256 for p in pictures}
    for name in PAGES:
        try:
            hashes[name] = hashlib.sha256(read_regular(release / name)).hexdigest()
        except Fault:
            hashes[name] = None  # said already
    if list(manifest['files']) != _in_order(hashes):
        found.add('the manifest lists other files than there should be')
    altered = [n for n, digest in hashes.items() if manifest['files'].get(n) != digest]
    if altered:
        found.add(f'{len(altered)} files have another SHA-256 than the manifest says', altered)
