"""Trains a content encoder on your own fundus photographs (MoCo v2), no labels needed.

    python scripts/train_content_encoder.py --data=photographs/ --out_dir=runs/content \\
        --arch=resnet50 --input_size=224 --batch_size=256 --max_steps=20000 --amp=bf16

A small run on a CPU, with a report on what the features carry:

    python scripts/train_content_encoder.py --data=phantoms/labels.csv --out_dir=runs/content64 \\
        --arch=resnet18 --small_stem --input_size=64 --batch_size=64 --max_steps=2000 \\
        --learning_rate=0.12 --warmup_steps=40 --key_momentum=0.99 --amp=bf16

--data is a folder, a ZIP archive or a table (CSV) of photographs; sets may be pooled. With a
table (or one given as --labels) of grades, patients and eyes, the run ends with a linear probe and
the nearest neighbours of the features: do they share the grade, or only the patient?

Several processes: torchrun --nproc_per_node=N scripts/train_content_encoder.py ... --batch_size
counts the images of a step over all of them. The same command with --resume goes on where a run
stopped.

In --out_dir: content_encoder.pt (for --content_weights of the other scripts), quality.json,
curves.png, views.png (photographs and the views made of them), stats.jsonl, logs/ (TensorBoard),
checkpoints/state_<step>.pt (for --resume).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import logging

import numpy as np
import torch

from datasets.people import merge_identical
from datasets.pictures import Pictures
from datasets.table import Table, read_table
from evaluation.feature_quality import describe_quality, feature_quality
from models.features.content import ContentNetwork, content_network_from_state
from models.resnet import build_resnet
from training.content_options import FREE, TRAINING, ContentOptions, MocoConfig
from training.moco import EXPORT_NAME, MocoTrainer, content_run
from training.run import finish, open_folder
from utils import cli, distributed
from utils.errors import UserError
from utils.images import from_uint8
from utils.io import write_json
from utils.logs import progress, setup_logging
from utils.options import add_flags, build, heading
from utils.runs import run_record
from utils.seeds import numpy_generator, seed_everything
from utils.signals import stop_on_signal

log = logging.getLogger(__name__)

_MIN_SIZE, _SMALL_SIZE = 32, 96


def build_parser() -> argparse.ArgumentParser:
    p = cli.parser_of(__doc__)
    add_flags(p, ContentOptions)
    cli.add_device(heading(p, TRAINING))
    return p


def is_table(path: Path) -> bool:
    return path.suffix.lower() == '.csv'


def check_options(opts: argparse.Namespace) -> None:
    if opts.input_size < _MIN_SIZE:
        raise UserError(f'--input_size {opts.input_size}: at least {_MIN_SIZE} px are needed')
    if not opts.small_stem and opts.input_size < 2 * _MIN_SIZE:
        raise UserError(f'--input_size {opts.input_size} needs --small_stem')
    if opts.small_stem and opts.input_size > _SMALL_SIZE:
        log.warning(
            '--small_stem is meant for at most %d px; it makes %d px slow',
            _SMALL_SIZE,
            opts.input_size,
        )
    if not opts.min_area:
        raise UserError('--min_area must be above 0')
    for flag in ('image_dir', 'split'):
        if getattr(opts, flag) is not None and not is_table(opts.data):
            raise UserError(f'--{flag} goes with a table (CSV) as --data')
    if opts.labels is None and is_table(opts.data):
        opts.labels, opts.labels_image_dir = opts.data, opts.image_dir
    for flag in ('labels_image_dir', 'quality_split'):
        if getattr(opts, flag) is not None and opts.labels is None:
            raise UserError(f'--{flag} goes with --labels')


def training_set(opts: argparse.Namespace) -> Pictures:
    if is_table(opts.data):
        return Pictures(read_table(opts.data, opts.image_dir, split=opts.split), opts.input_size)
    return Pictures(opts.data, opts.input_size)


def quality_table(opts: argparse.Namespace) -> Table | None:
    """The rows to report on, or None without grades and patients."""
    if opts.labels is None:
        return None
    table = read_table(opts.labels, opts.labels_image_dir, split=opts.quality_split)
    if table.labels is None and table.patients is None:
        log.info('%s has neither grades nor patients: no quality report', opts.labels)
        return None
    if len(table) < 2:
        raise UserError(f'{opts.labels}: a quality report needs at least 2 images')
    table = merge_identical(table)  # so that no probe is tested on a photograph it has seen
    people = np.asarray(table.ids if table.patients is None else table.patients)
    order = numpy_generator(opts.seed, 'quality').permutation(np.unique(people))
    rank = {person: i for i, person in enumerate(order)}
    chosen = np.argsort([rank[v] for v in people], kind='stable')[: opts.quality_images]
    return table.subset(np.sort(chosen))


@torch.no_grad()
def image_features(
    net: ContentNetwork, dataset: Pictures, device: torch.device, *, amp: str, batch: int = 64
) -> np.ndarray:
    """[n, F] unit vectors of all pictures of a dataset."""
    net, found = net.to(device), []
    for start in progress(range(0, len(dataset), batch), desc='features', unit='batch'):
        img = torch.stack([dataset[i] for i in range(start, min(start + batch, len(dataset)))])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp == 'bf16'):
            found.append(net.features(from_uint8(img.to(device))).cpu())
    return torch.cat(found).numpy()


def report_quality(
    opts: argparse.Namespace, trainer: MocoTrainer, table: Table, device: torch.device
) -> None:
    """Writes quality.json (the trained network beside an untrained one) and logs its numbers."""
    pictures, result = Pictures(table, opts.input_size), {}
    trained = trainer.export()
    seed_everything(opts.seed, 'untrained')
    untrained = {
        **trained,
        'state_dict': build_resnet(opts.arch, small_stem=opts.small_stem).state_dict(),
    }
    for name, file in (('untrained', untrained), ('trained', trained)):
        net = content_network_from_state(file, source=name)
        result[name] = feature_quality(
            image_features(net, pictures, device, amp=opts.amp),
            labels=table.labels,
            patients=table.patients,
            eyes=table.eyes,
            seed=opts.seed,
        )
        log.info(
            '%s features of %d images:\n  %s',
            name,
            len(table),
            '\n  '.join(describe_quality(result[name])),
        )
    write_json(opts.out_dir / 'quality.json', result)


def build_trainer(opts: argparse.Namespace, images: Pictures, device: torch.device) -> MocoTrainer:
    workers = 0 if images.cached else opts.workers
    config = build(MocoConfig, vars(opts))
    return MocoTrainer(images, config, device=device, workers=workers)


@cli.names_flags(build_parser)
def main(argv: Sequence[str] | None = None) -> int:
    opts = build_parser().parse_args(argv)
    setup_logging()
    check_options(opts)
    device = distributed.init(cli.resolve_device(opts.device))
    table = quality_table(opts)
    images = training_set(opts)
    trainer = build_trainer(opts, images, device)

    def record() -> dict:
        described = f'{len(images)} images, {images.digest()}'
        return run_record({**vars(opts), 'images': described}, seed=opts.seed)

    open_folder(opts.out_dir, record, resume=opts.resume, free_options=FREE, resume_flag='--resume')
    run = content_run(trainer, opts.out_dir, keep_states=opts.keep_states)
    if opts.resume:
        run.resume()
    log.info(
        '%d images of %d px, %s%s, batch %d on %d process(es), queue %d, %s',
        len(images),
        opts.input_size,
        opts.arch,
        ' with the small stem' if opts.small_stem else '',
        opts.batch_size,
        distributed.world_size(),
        trainer.queue_size,
        device,
    )
    with stop_on_signal() as signalled:
        done = run.to_the_end(requested=signalled, max_minutes=opts.max_minutes)
    log.info(
        '%s after %d steps; the encoder is %s',
        'finished' if done else 'stopped',
        trainer.step_count,
        opts.out_dir / EXPORT_NAME,
    )
    # A scheduler that asks to stop waits seconds, which the report would not fit in.
    if table is not None and distributed.is_main() and not signalled():
        report_quality(opts, trainer, table, device)
    return finish(signalled)


if __name__ == '__main__':
    cli.run(main)
