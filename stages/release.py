"""The last stages: the release, its verification, and what it is worth and gives away."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anonymization import Networks, OptimizeConfig, Settings, anonymize
from anonymization.audit import audit_release, report_dict
from anonymization.calibrated import NoiseConfig
from anonymization.grouped import GROUP_TABLE
from datasets.groups import Groups
from datasets.pictures import load_pictures
from datasets.table import Table
from evaluation.attacks.metrics import attack_metrics
from evaluation.attacks.nearest import nearest_attack
from evaluation.population import people_of
from evaluation.probe import pooled_features
from evaluation.splits import MEMBER, split_by_patient
from evaluation.vessel_amount import vessel_ratios
from models.features.pretrained import load_feature_network
from stages.figures import JUDGE, distance_ratio, sheet
from stages.preparation import HELD_OUT, LABELS, RELEASED, Command, cropped
from stages.runner import Finding, Outcome, Places
from stages.settings import Request
from stages.training import ENCODER, distance_finding, refinements, run_command, vessel_findings
from utils.images import find_images
from utils.io import write_json

FOLDER = 'release'  # in the folder of the stage: what may be shared
_LEAST_GROUPED = 0.8
_MOST_AUC = 0.65
_LARGER = 'a larger `k`, and networks that were trained longer or on more people'


def release_settings(request: Request, encoder: Path, table: Table) -> Settings:
    """How the release is made. encoder: file of the networks. table: the cropped photographs."""
    return Settings(
        k=request.k,
        surplus='suppress',
        soft_labels=table.labels is not None,
        sides='mixed',  # the crops are turned to one side
        n_iters=refinements(encoder),
        seed=request.seed,
        noise=NoiseConfig(request.epsilon),
        deterministic=request.epsilon is not None and request.device.type == 'cuda',
        optimize=OptimizeConfig(
            n_steps=request.how.release_steps,
            latent_rank=request.how.latent_rank,
            style_weight='auto',
            lr='auto',
        ),
    )


def release_flags(
    request: Request, settings: Settings, encoder: Path, crops: Path, run: Path
) -> list[str]:
    """The same as flags of scripts/k-SALSA.py, for several processes."""
    return [
        f'--exp_dir={run}',
        f'--checkpoint_path={encoder}',
        f'--df={crops / LABELS}',
        f'--data_path={crops}',
        '--content_weights=lite0',
        '--style_weights=lite0',
        *([f'--guide={request.guide}'] if request.guide else []),
        f'--same_k={settings.k}',
        f'--surplus={settings.surplus}',
        f'--sides={settings.sides}',
        f'--n_iters={settings.n_iters}',
        f'--seed={settings.seed}',
        f'--data={settings.data}',
        f'--num_steps={settings.optimize.n_steps}',
        f'--latent_rank={settings.optimize.latent_rank}',
        f'--style_weight={settings.optimize.style_weight}',
        f'--lr={settings.optimize.lr}',
        *([f'--epsilon={settings.noise.epsilon}'] if settings.noise.epsilon else []),
        *(['--deterministic'] if settings.deterministic else []),
        *(['--soft_labels'] if settings.soft_labels else []),
        f'--device={request.device}',
    ]


def make_release(request: Request, several: Command | None) -> Callable:
    """The stage that groups the photographs and draws a picture for each group.

    several: the command that does it with several processes, None for this one alone.
    """

    def work(folder: Path, places: Places) -> Outcome:
        encoder, run = places['encoder'] / ENCODER, folder / 'run'
        table = cropped(places, RELEASED)
        settings = release_settings(request, encoder, table)
        if several is not None:
            crops = places['crop'] / RELEASED
            run_command(several, release_flags(request, settings, encoder, crops, run))
        found = anonymize(
            table,
            Networks(encoder, 'lite0', 'lite0', guide=request.guide),
            settings,
            run,
            device=request.device,
        )
        people = people_of(table)
        sizes = [len({people[row] for row in rows}) for rows in found.groups.members]
        finding = Finding(
            'share of photographs in groups',
            1 - found.groups.n_left_out / len(table),
            _LEAST_GROUPED,
            True,
            f'{len(found.groups)} pictures, each of at least {min(sizes)} {table.unit}; '
            f'{found.groups.n_left_out} of {len(table)} photographs are in none.',
            'photographs of more people, or a smaller `k`',
        )
        pictures = {
            'Groups: members, centroid (if it differs), result': 'run/private/contact_sheet.png'
        }
        return Outcome([finding], pictures, ['run/release/manifest.json'])

    return work


def verify_release(request: Request) -> Callable:
    """The stage that derives the release once more and draws every picture anew."""

    def work(folder: Path, places: Places) -> Outcome:
        run = places['release'] / 'run'
        audit = audit_release(
            run / FOLDER,
            private=run / 'private',
            source_table=cropped(places, RELEASED),
            recompute_n=None,
            checkpoint=places['encoder'] / ENCODER,
            device=request.device,
        )
        write_json(folder / 'audit.json', report_dict(audit))
        failed = [check for check in audit.checks if not check.passed]
        finding = Finding(
            'failed checks',
            len(failed),
            0,
            False,
            f'{len(audit.checks)} checks of the release against its photographs and groups.',
            'do not share it; ' + '; '.join(f'{check.name}: {check.detail}' for check in failed),
            final=True,
        )
        return Outcome([finding], {}, ['audit.json'])

    return work


class _Sides(NamedTuple):
    """Pictures and people of members, of non-members, and of those whom an attacker knows."""

    members: np.ndarray
    nonmembers: np.ndarray
    reference: np.ndarray
    member_people: list[str]
    other_people: list[str]


def _sides(request: Request, places: Places, size: int) -> _Sides:
    table, others = cropped(places, RELEASED), cropped(places, HELD_OUT)
    groups = Groups.read(places['release'] / 'run' / 'private' / GROUP_TABLE, table.ids)
    members = table.subset(np.flatnonzero(groups.of >= 0))
    roles = split_by_patient(people_of(others), 0.5, seed=request.seed)
    here = [i for i, role in enumerate(roles) if role == MEMBER]
    there = [i for i, role in enumerate(roles) if role != MEMBER]
    nonmembers, reference = others.subset(here), others.subset(there)

    def read(part: Table) -> np.ndarray:
        return load_pictures(part.paths, size)

    return _Sides(
        read(members), read(nonmembers), read(reference), people_of(members), people_of(nonmembers)
    )


def evaluate_release(request: Request) -> Callable:
    """The stage that holds the release against photographs, and attacks it.

    With given networks what the release looks like does not bind, what it gives away does.
    """

    def work(folder: Path, places: Places) -> Outcome:
        size, network = request.how.size, load_feature_network(JUDGE)
        sides = _sides(request, places, size)
        images = find_images(places['release'] / 'run' / FOLDER / 'images')
        release = load_pictures(images, size)
        scores = nearest_attack(
            sides.members,
            sides.nonmembers,
            sides.reference,
            lambda pictures: pooled_features(network, pictures, device=request.device),
        )
        attack = attack_metrics(
            *scores(release),
            member_people=sides.member_people,
            other_people=sides.other_people,
            seed=request.seed,
        )
        vessels = vessel_ratios(sides.members, release, people=sides.member_people)
        features = [
            pooled_features(network, p, device=request.device) for p in (sides.members, release)
        ]
        distance = distance_ratio(features[0], features[1], request.seed)
        write_json(
            folder / 'figures.json', {'attack': attack, 'vessels': vessels, 'distance': distance}
        )
        sheet([release], folder / 'release.png')
        auc, better = attack['auc'], 'train longer (`hours`), or on more photographs'
        looks = [
            distance_finding(distance, 'the release', better),
            *vessel_findings(vessels['length']['value'], 'the release', better),
        ]
        findings = [
            *(f._replace(binding=request.encoder_weights is None) for f in looks),
            Finding(
                'attack',
                auc['value'],
                _MOST_AUC,
                False,
                'How well the nearest picture tells members from people held out (AUC; 0.5 is '
                f'chance; 95 % interval {auc["low"]:.2f} to {auc["high"]:.2f}).',
                _LARGER,
            ),
        ]
        return Outcome(findings, {'The release': 'release.png'}, ['figures.json'])

    return work
