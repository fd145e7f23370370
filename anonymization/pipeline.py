"""From a table of photographs to a release: invert, group, optimise, write.

Every stage leaves its result in `exp_dir/private/` before the next begins, so a run that was
killed goes on where it stopped. With torchrun, inversion chunks and batches of groups are shared
out among the processes; process 0 groups and writes.

On a CPU every photograph and every group is computed alone by one thread (see workers), several
at a time, so the release does not depend on how many, nor on memory. On a GPU they are computed
in batches, whose size changes rounding; `deterministic` computes them alone there too.

Shapes: n photographs, L styles, D style dimension, S side of the encoder, R of the generator.
"""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from anonymization.grouping import assign_groups
from anonymization.optimize import (
    ACTIVATIONS,
    Group,
    GroupOptimizer,
    Result,
    batch_that_fits,
    equal_shares,
    matmul_precision,
    style_term,
)
from anonymization.photographs import Photographs, copies
from anonymization.promises import check_groups
from anonymization.records import (
    GroupResult,
    pixel_digest,
    to_picture,
    write_contact_sheet,
    write_records,
)
from anonymization.release import GroupFacts, png_encoder, release_names, write_release
from anonymization.settings import Settings
from anonymization.starts import KEY, read_key, start_offset
from anonymization.workers import deterministic_algorithms, each, memory, run_within_memory
from datasets.people import merge_duplicates
from datasets.table import Table
from models.features import FeatureNet
from models.features.content import ContentNetwork
from models.features.guide import Guide
from models.features.pretrained import FeatureNetwork
from models.psp import PSP, FrozenPSP, invert
from models.stylegan2.sampling import latent_spread
from utils import distributed
from utils.errors import PrivacyError, UserError
from utils.images import png_names, save_png, to_uint8
from utils.io import (
    check_intact,
    has_seal,
    is_intact,
    load_weights,
    remove_sealed,
    save_npy,
    save_torch,
    sealing,
    sha256_bytes,
    sha256_file,
    write_csv,
    write_text,
)
from utils.logs import progress
from utils.signals import leave_signals_to_parent

log = logging.getLogger(__name__)

_ANEW = 'remove it and its .sha256 and run the same command again: it is computed anew'
GROUP_TABLE = 'groups.csv'
N_GRADES = 5


class Pipeline:
    """One run in `exp_dir`.

    table: datasets.table.Table with files; digests: of each photograph's pixels. psp,
    content_net, style_net, guide: loaded networks. facts: plain dict for the manifest ('networks',
    'versions').
    workers: loading processes. threads: units computed at a time on a CPU. Raises UserError when
    a stratum column is missing.
    """

    def __init__(
        self,
        exp_dir: str | Path,
        table: Table,
        digests: list[str],
        *,
        psp: PSP,
        content_net: ContentNetwork | FeatureNetwork,
        style_net: FeatureNet | None,
        guide: Guide | None = None,
        settings: Settings,
        device: str | torch.device,
        facts: dict,
        workers: int = 0,
        threads: int = 1,
    ) -> None:
        self.exp_dir, self.private = Path(exp_dir), Path(exp_dir) / 'private'
        self.work = self.private / 'work'
        self.table, self.settings, self.facts = table, settings, facts
        self.device, self.workers = torch.device(device), workers
        self.threads = threads if self.device.type == 'cpu' else 1
        self.alone = self.device.type == 'cpu' or settings.deterministic
        self.psp, self.content_net, self.style_net = psp, content_net, style_net
        self.guide = guide
        self.photos = Photographs(table, psp.input_size, settings.mirror_left)
        self.people = merge_duplicates(table.patients, digests)
        self.unit = 'images' if table.patients is None else 'patients'
        self.copies = copies(digests, table.ids)
        if self.copies.any():
            log.warning(
                '%d photographs are identical copies of others: they show the same '
                'person, and are left out',
                self.copies.sum(),
            )
        if settings.mirror_left and not table.eyes:
            raise UserError('`mirror_left` needs an eye column in the table')
        self.strata = self._strata()
        if settings.deterministic and self.device.type == 'cuda':
            self._check_deterministic()

    def _check_deterministic(self) -> None:
        """UserError for sizes whose resampling has no deterministic gradient on a GPU."""
        picture, side, seen = self.psp.decoder.size, self.psp.input_size, self.content_net
        sides = [picture, side]
        if isinstance(seen, ContentNetwork) and seen.resize != 'nearest':
            sides.append(seen.input_size)
        if any(large % small for large, small in zip(sides, sides[1:])):
            raise UserError(
                f'`deterministic`: the sides of pictures, encoder and content network ({sides}) '
                'must be multiples, each of the next; leave it out, or use --device cpu'
            )

    def _strata(self) -> list[str] | None:
        if not self.settings.strata:
            return None
        columns = []
        for name in self.settings.strata:
            values = getattr(self.table, name)
            if values is None:
                raise UserError(f'`strata` {name}: the table has no such column')
            columns.append([str(v) for v in values])
        return ['/'.join(parts) for parts in zip(*columns)]

    # -- 1: inversion -----------------------------------------------------------------------

    def _chunks(self) -> list[range]:
        size = self.settings.batch_size
        return [range(i, min(i + size, len(self.table))) for i in range(0, len(self.table), size)]

    def _chunk_file(self, i: int) -> Path:
        return self.work / f'inversion_{i:06d}.pt'

    def invert(self) -> tuple[Float[np.ndarray, 'n L D'], Float[np.ndarray, 'n F']]:
        """Latents of all photographs [n, L, D], content features [n, F] of their pictures.

        Both as memory-mapped files in private/, computed once.
        """
        latents, content = self.private / 'latents.npy', self.private / 'content.npy'
        done = has_seal(latents) and has_seal(content)
        distributed.barrier()  # before process 0 can have made them
        if not done:
            self._invert_chunks()
            distributed.barrier()
        if distributed.is_main():
            if not done:
                self._collect(latents, content)
            for path in (latents, content):
                check_intact(path, remedy=_ANEW)
        distributed.barrier()
        return np.load(latents, mmap_mode='r'), np.load(content, mmap_mode='r')

    def _invert_chunks(self) -> None:
        chunks = self._chunks()
        mine = [
            i
            for i in range(distributed.rank(), len(chunks), distributed.world_size())
            if not is_intact(self._chunk_file(i))
        ]
        psp = FrozenPSP(self.psp.to(self.device), ACTIVATIONS[self.settings.precision])
        net = self.content_net.to(self.device).to(memory_format=torch.channels_last)
        loader = DataLoader(
            self.photos,
            batch_sampler=[list(chunks[i]) for i in mine],
            num_workers=min(self.workers, len(mine)),
            worker_init_fn=leave_signals_to_parent,
        )
        log.info('inverting %d photographs, %d refinements', len(self.table), self.settings.n_iters)
        bar = progress(total=sum(len(chunks[i]) for i in mine), desc='inversion', unit='img')
        names = png_names(self.table.ids)

        def one(item: tuple[int, torch.Tensor], check: Callable[[], None]) -> None:
            i, u8 = item
            parts = []
            for x in u8.split(1 if self.alone else len(u8)):
                check()
                parts.append(self._invert_batch(psp, net, x))
            found = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
            recon = found.pop('recon')
            if self.settings.save_reconstructions:
                for j, y in zip(chunks[i], recon):
                    save_png(y, self.private / 'reconstructions' / names[j])
            with sealing(self._chunk_file(i)):
                save_torch(self._chunk_file(i), found)
            bar.update(len(u8))

        with matmul_precision(self.settings.precision):
            each(one, zip(mine, loader), self.threads)
        bar.close()

    def _invert_batch(
        self, psp: FrozenPSP, net: ContentNetwork | FeatureNetwork, u8: UInt8[Tensor, 'N 3 S S']
    ) -> dict[str, torch.Tensor]:
        """Of photographs uint8 [N, 3, S, S]: ws, recon, content features, error [N], on the CPU."""
        x = u8.to(self.device).float().div(127.5).sub(1)
        found = invert(psp, x, n_iters=self.settings.n_iters)
        if not torch.isfinite(found.ws).all():
            raise UserError(
                'the inversion gives numbers that are not finite; is the checkpoint '
                'of --checkpoint_path a trained one?'
            )
        # A pretrained network sees what the inversion loses, and looks at the photograph.
        seen = x if net.of_photographs else found.recon
        return {
            'ws': found.ws.cpu(),
            'recon': found.recon.cpu(),
            'content': net.features(seen).cpu(),
            'error': (found.recon - x).square().mean((1, 2, 3)).cpu(),
        }

    def _collect(self, latents: Path, content: Path) -> None:
        files = [self._chunk_file(i) for i in range(len(self._chunks()))]
        parts = [_load_intact(file, 'inversion chunk') for file in files]
        errors = torch.cat([p['error'] for p in parts])
        log.info(
            'reconstruction error (mean square, range [-1, 1]): median %.4f, worst %.4f',
            errors.median(),
            errors.max(),
        )
        save_npy(self.private / 'inversion_error.npy', errors.numpy())
        for path, part in ((latents, 'ws'), (content, 'content')):
            with sealing(path):
                save_npy(path, torch.cat([p[part] for p in parts]).numpy())
        for file in files:
            remove_sealed(file)

    # -- 2: grouping ------------------------------------------------------------------------

    def group(self, latents: Float[np.ndarray, 'n L D']) -> tuple[Int[np.ndarray, ' n'], list[str]]:
        """Group numbers [n] (1 to C; 0: left out), checked again from the written table.

        Also the release names of groups 1 to C.
        """
        path = self.private / GROUP_TABLE
        if distributed.is_main():
            if not has_seal(path):
                self._write_groups(path, self._assign(latents))
            check_intact(path, remedy=_ANEW)
        distributed.barrier()
        table = pd.read_csv(
            path,
            dtype={'id_code': str, 'release_name': str, 'patient_id': str},
            keep_default_na=False,
        )
        if list(table['id_code']) != self.table.ids:
            raise UserError(f'{path} does not belong to the table of this run')
        labels = table['centers'].to_numpy()
        self._check(labels)
        names = {int(c): n for c, n in zip(table['centers'], table['release_name']) if c}
        return labels, [names[c] for c in range(1, len(names) + 1)]

    def _assign(self, latents: Float[np.ndarray, 'n L D']) -> Int[np.ndarray, ' n']:
        s = self.settings
        latents = latents.reshape(len(latents), -1)
        rows = np.flatnonzero(~self.copies)
        found = assign_groups(
            latents[rows] if self.copies.any() else latents,
            s.k,
            patients=[self.people[i] for i in rows],
            strata=self.strata and [self.strata[i] for i in rows],
            grades=None if self.table.labels is None else self.table.labels[rows],
            grade_penalty=s.grade_penalty,
            method=s.clustering,
            policy=s.policy,
            surplus=s.surplus,
            seed=s.seed,
            reduce=s.reduce_dim or 'auto',
            device=self.device,
        )
        log.info(
            '%d groups of %s; squared error within groups %.1f %% of the total',
            found.labels.max(),
            _sizes(found.labels),
            100 * found.info['sse_ratio'],
        )
        for reason in sorted({r for _, r in found.suppressed}):
            log.warning(
                'left out %d photographs: %s', sum(r == reason for _, r in found.suppressed), reason
            )
        labels = np.zeros(len(latents), np.int64)
        labels[rows] = found.labels
        return labels

    def _check(self, labels: Int[np.ndarray, ' n']) -> None:
        check_groups(
            labels.tolist(),
            self.settings.k,
            patients=self.people,
            strata=self.strata,
            policy=self.settings.policy,
        )

    def _write_groups(self, path: Path, labels: Int[np.ndarray, ' n']) -> None:
        self._check(labels)
        sizes = np.bincount(labels)
        secret = '\n'.join(f'{i} {c}' for i, c in zip(self.table.ids, labels)).encode()
        names = release_names(int(labels.max()), secret, self.settings.seed)
        columns = {
            'id_code': self.table.ids,
            'centers': labels,
            'count_centers': [int(sizes[c]) if c else 0 for c in labels],
            'release_name': [names[c - 1] if c else '' for c in labels],
            'patient_id': self.table.patients or [f'person-{p}' for p in self.people],
        }
        if self.table.labels is not None:
            columns['diagnosis'] = self.table.labels
        with sealing(path):
            write_csv(path, pd.DataFrame(columns))

    # -- 3: optimisation --------------------------------------------------------------------

    def _batch_file(self, i: int) -> Path:
        return self.work / f'groups_{i:06d}.pt'

    def _sources(self) -> str:
        """One digest of what the optimisation starts from: latents, content features, groups."""
        names = ['latents.npy', 'content.npy', GROUP_TABLE] + [KEY] * bool(
            self.settings.start_noise
        )
        files = [self.private / name for name in names]
        return sha256_bytes('\n'.join(sha256_file(f) for f in files).encode())

    def optimise(
        self,
        latents: Float[np.ndarray, 'n L D'],
        content: Float[np.ndarray, 'n F'],
        labels: Int[np.ndarray, ' n'],
    ) -> list[GroupResult]:
        """Runs every batch of groups that has no result yet; returns results on process 0."""
        offset = self._offsets()
        n_groups = int(labels.max())
        members = [np.flatnonzero(labels == c) for c in range(1, n_groups + 1)]
        at_once = self._at_once(n_groups)
        size = 1 if self.alone else at_once
        batches = [members[i : i + size] for i in range(0, n_groups, size)]
        sources = self._sources()
        mine = [
            i
            for i in range(distributed.rank(), len(batches), distributed.world_size())
            if not is_intact(self._batch_file(i), sources)
        ]
        if mine:
            engine = GroupOptimizer(
                self.psp,
                self.content_net,
                self.style_net,
                config=self.settings.optimize,
                device=self.device,
                precision=self.settings.precision,
                guide=self.guide,
            )
            steps = self.settings.optimize.n_steps
            log.info('optimising %d groups, %d at a time, %d steps', n_groups, at_once, steps)
            bar = progress(
                total=steps * sum(len(batches[i]) for i in mine), desc='optimisation', unit='step'
            )

            def one(i: int, check: Callable[[], None]) -> None:
                def on_step(n: int) -> None:
                    check()
                    bar.update(n)

                groups = [
                    self._group(m, latents, content)._replace(offset=offset(m)) for m in batches[i]
                ]
                result = run_within_memory(engine, groups, on_step=on_step)
                self._save_batch(self._batch_file(i), result, sources)

            with matmul_precision(self.settings.precision):  # set once for all threads
                each(one, mine, min(at_once, self.threads))
            bar.close()
        distributed.barrier()
        if not distributed.is_main():
            return []
        return [r for i in range(len(batches)) for r in self._load_batch(i, sources)]

    def _save_batch(self, path: Path, result: Result, sources: str) -> None:
        image = to_uint8(self._output(result.image))
        with sealing(path, sources):
            save_torch(
                path,
                {
                    'ws': result.ws,
                    'losses': result.losses,
                    'image': image,
                    'centroid': to_uint8(self._output(result.centroid)),
                    'pixels': [pixel_digest(u8) for u8 in image],
                },
            )

    def _load_batch(self, i: int, sources: str) -> list[GroupResult]:
        part = _load_intact(self._batch_file(i), 'group results', sources)
        return [
            GroupResult(*row)
            for row in zip(
                part['image'],
                part['centroid'],
                part['ws'],
                part['losses'].unbind(1),
                part['pixels'],
            )
        ]

    def _at_once(self, n_groups: int) -> int:
        """Groups optimised at a time: on a CPU side by side, on a GPU together in a batch.

        Batches are decided once per run, since a resumed run must cut the same way.
        """
        net = self.style_net
        style = None if net is None else style_term(net, self.settings.optimize)
        world = distributed.world_size()
        free = memory(self.device) // (world if self.device.type == 'cpu' else 1)
        most = self.threads if self.device.type == 'cpu' else min(64, -(-n_groups // world))
        size = min(
            self.settings.group_batch or most,
            batch_that_fits(self.psp, style, self.settings.precision, free, most=most),
        )
        if self.alone:
            return size
        path = self.private / 'group_batch.txt'
        if distributed.is_main():
            if not has_seal(path):
                with sealing(path):
                    write_text(path, f'{self.settings.group_batch or size}\n')
            check_intact(path, remedy=_ANEW)
        distributed.barrier()
        recorded = int(path.read_text())
        if recorded != (self.settings.group_batch or recorded):
            log.warning('going on with %d groups at a time, as this run began', recorded)
        return recorded

    def _group(
        self,
        members: Int[np.ndarray, ' k'],
        latents: Float[np.ndarray, 'n L D'],
        content: Float[np.ndarray, 'n F'],
    ) -> Group:
        return Group(
            torch.from_numpy(np.array(latents[members])),
            torch.stack([self.photos[int(i)] for i in members]),
            torch.from_numpy(np.array(content[members])),
            equal_shares([self.people[i] for i in members]),
        )

    def _offsets(self) -> Callable[[Int[np.ndarray, ' k']], Tensor | None]:
        """What the group of given rows starts away from the mean of its latents."""
        if not self.settings.start_noise:
            return lambda rows: None
        key = distributed.from_main(lambda: read_key(self.private, self.settings.start_key))
        decoder = self.psp.decoder
        scale, shape = (
            self.settings.start_noise * latent_spread(decoder),
            (decoder.n_latent, decoder.style_dim),
        )
        return lambda rows: start_offset(key, [self.table.ids[int(i)] for i in rows], shape, scale)

    def _output(self, image: Float[Tensor, 'G 3 R R']) -> Float[Tensor, 'G 3 S S']:
        if self.settings.resize_outputs:
            return self.psp.pool(image)
        return image

    # -- 4: what leaves, and what stays -----------------------------------------------------

    def write(
        self,
        labels: Int[np.ndarray, ' n'],
        names: list[str],
        results: list[GroupResult],
        staging: Path,
    ) -> dict:
        """Writes the release into the new folder `staging`, and the private records."""
        if len(results) != len(names):
            raise PrivacyError(
                f'{len(results)} optimised groups for {len(names)} groups in the '
                f'group table; remove {self.private} and run again'
            )
        named = dict(zip(names, results))
        facts = self._manifest_facts(labels, results[0].image.shape[-1])
        write_records(self.private, named, facts=facts, soft_labels=self.settings.soft_labels)
        manifest = write_release(
            staging,
            [self._facts(labels, c + 1, name) for c, name in enumerate(names)],
            lambda name: to_picture(named[name].image),
            facts=facts,
            soft_labels=self.settings.soft_labels,
        )
        if self.settings.centroids:
            for name, result in named.items():
                save_png(to_picture(result.centroid), self.private / 'centroids' / f'{name}.png')
        write_contact_sheet(self.private / 'contact_sheet.png', labels, results, self.photos)
        return manifest

    def _facts(self, labels: Int[np.ndarray, ' n'], number: int, name: str) -> GroupFacts:
        rows = np.flatnonzero(labels == number)
        grades = None
        if self.table.labels is not None:
            grades = tuple(np.bincount(self.table.labels[rows], minlength=N_GRADES).tolist())
        return GroupFacts(name, len(rows), len({self.people[i] for i in rows}), grades)

    def _manifest_facts(self, labels: Int[np.ndarray, ' n'], size: int) -> dict[str, Any]:
        s = self.settings
        settings = {
            'n_iters': s.n_iters,
            **dataclasses.asdict(s.optimize),
            'precision': s.precision,
            'mirror_left': s.mirror_left,
        }
        return {
            'k': s.k,
            'unit': self.unit,
            'policy': s.policy,
            'clustering': s.clustering,
            'strata': list(s.strata),
            'n_suppressed': int((labels == 0).sum()),
            'image_size': size,
            'settings': settings,
            **self.facts,
            'png_encoder': png_encoder(),
        }

    def run(self, staging: Path) -> dict | None:
        """All stages; returns the manifest of the release in `staging`, on process 0."""
        with deterministic_algorithms(self.settings.deterministic and self.device.type == 'cuda'):
            return self._run(staging)

    def _run(self, staging: Path) -> dict | None:
        if distributed.is_main():
            self.work.mkdir(mode=0o700, parents=True, exist_ok=True)
        distributed.barrier()
        latents, content = self.invert()
        labels, names = self.group(latents)
        results = self.optimise(latents, content, labels)
        if not distributed.is_main():
            return None
        shutil.rmtree(staging, ignore_errors=True)
        return self.write(labels, names, results, staging)


def _load_intact(path: Path, what: str, context: str = '') -> dict:
    if not is_intact(path, context):
        raise UserError(f'{path} is damaged; run the same command again: it is computed anew')
    return load_weights(path, what=what)


def _sizes(labels: Int[np.ndarray, ' n']) -> str:
    sizes, counts = np.unique(np.bincount(labels)[1:], return_counts=True)
    return ', '.join(f'{s} images ({c}x)' for s, c in zip(sizes, counts))
