"""One training run: what all trainings of the project share, whatever they train.

A `Training` brings a step, a state and an export; a `TrainingRun` takes it to its end. It prints a
status line with images per second and the time left, writes stats.jsonl, TensorBoard logs and
curves.png, keeps checkpoints, goes on exactly from the newest one, and ends when values stop
being finite. When a person, a scheduler or a time limit asks it to stop, the step under way is
finished, a state is saved, and the exit code is the signal's (128 + number), or 0 under torchrun,
which would report another as a crash. All processes stop after the same step; they wait for each
other up to `utils.distributed.TIMEOUT`. Loading processes leave signals to the training
(utils.signals). A killed run loses what came after its newest checkpoint.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from training.batches import Batches
from training.checkpoints import Checkpoints
from training.curves import Panel, plot_curves
from utils import distributed
from utils.errors import UserError
from utils.io import load_weights
from utils.logs import ScalarLog, read_jsonl, setup_logging
from utils.runs import start_run
from utils.signals import StopRequest

log = logging.getLogger(__name__)

# Options of a run that never shape what is learnt, whatever is trained: they may differ when it
# goes on. The files that they name are compared by content.
FREE_OPTIONS = (
    'out_dir',
    'outdir',
    'exp_dir',
    'resume',
    'device',
    'workers',
    'test_workers',
    'keep_states',
    'max_minutes',
)
STATS = 'stats.jsonl'
_NOT_DRAWN = {'step', 'images_per_second', 'memory_gb', 'kimg', 'epoch'}
_STATUS_SECONDS = 60  # a sign of life between records
_ASK_EVERY = 4  # steps; several GPUs that are asked whether to stop wait for each other


class Training:
    """What differs between trainings. Everything random is a function of (seed, progress).

    A subclass sets `device` and writes `progress`, `advance`, `state` and `load_state`; the other
    methods have a default. unit: what progress counts, `scale` of which make one on the status
    line. stride: counts of a step. images: of one count. means: records hold means of the
    steps since the one before, not the last step's values. remedy: against values that are not
    finite.
    """

    device: torch.device
    _batches: Batches | None = None
    unit: str = 'step'
    scale: int = 1
    stride: int = 1
    images: float = 1
    means: bool = True
    remedy: str = 'lower `learning_rate`'

    @property
    def progress(self) -> int:
        """What is done: steps, images or epochs."""
        raise NotImplementedError

    def advance(self) -> Mapping[str, Tensor | float]:
        """One step on the next data, in every process; returns 0-d tensors or floats by name."""
        raise NotImplementedError

    def state(self) -> dict:
        """Everything that a run which goes on needs besides data and options, as plain data."""
        raise NotImplementedError

    def load_state(self, state: dict, *, source: str | Path = 'state') -> None:
        """Goes on from `state()`; UserError naming `source` when it belongs to another run."""
        raise NotImplementedError

    def facts(self) -> dict[str, float]:
        """Further numbers of a record, such as the learning rate; asked in the first process."""
        return {}

    def describe(self, values: Mapping[str, float]) -> str:
        """The numbers of a record on the status line."""
        return '  '.join(f'{name} {value:.4f}' for name, value in values.items())

    def panels(self, names: set[str]) -> list[Panel]:
        """The panels of curves.png for the numbers that were logged."""
        return [Panel((name,)) for name in sorted(names)]

    def check(self, spoilt: list[str], *, saving: bool) -> None:
        """UserError when the training cannot go on; spoilt: values that were not finite."""
        if spoilt:
            raise UserError(
                f'training diverged: {", ".join(spoilt)} not finite at {self.where()}; '
                f'{self.remedy}, and resume from the last saved state'
            )

    def begin(self, run: 'TrainingRun') -> None:
        """Called in every process before the first step, also of a run that goes on."""

    def after_step(self, run: 'TrainingRun', *, last: bool) -> None:
        """Called in every process after a step and its record, before a state is saved."""

    def after_save(self, run: 'TrainingRun', *, stopping: bool) -> None:
        """Called in the first process after a state was saved: exports, pictures.

        stopping: a scheduler that asks to stop waits seconds, not minutes.
        """

    def measure(self, run: 'TrainingRun') -> None:
        """Called in every process after `after_save`, unless the run stops: costly measures."""

    def close(self) -> None:
        """Ends the loading processes; called when the run ends."""
        self._batches = None

    def where(self) -> str:
        """The present progress with its unit."""
        return f'{self.unit} {self.progress / self.scale:g}'


class TrainingRun:
    """Takes `training` to `length` in `folder`.

    record_every, save_every: counts of progress between records and states. save_seconds: states
    that are due sooner after the last one are left out. label: begins the status lines. The last
    step, and the one after which the run stops, are always recorded and saved.
    """

    def __init__(
        self,
        training: Training,
        folder: str | Path,
        checkpoints: Checkpoints,
        *,
        length: int,
        record_every: float,
        save_every: float,
        save_seconds: float = 0.0,
        label: str = '',
    ) -> None:
        self.training, self.folder, self.checkpoints = training, Path(folder), checkpoints
        self.length, self.label = length, label
        self.record_every, self.save_every = record_every, save_every
        self.save_seconds = save_seconds
        self._scalars: ScalarLog | None = None
        self._window, self._clock = _Window(training.means), _Clock(training.progress)

    def resume(self, path: str | Path | None = None) -> bool:
        """Loads the state `path`, or the newest readable one; whether there was one."""
        found = self.checkpoints.latest() if path is None else (load_weights(path), Path(path))
        if found is None:
            return False
        self.training.load_state(found[0], source=found[1])
        log.info('%sgoing on from %s at %s', self.label, found[1], self.training.where())
        return True

    def to_the_end(
        self, *, requested: Callable[[], bool] | None = None, max_minutes: float | None = None
    ) -> bool:
        """Runs to the end, or until `requested` says so in any process, or `max_minutes` are over.

        Returns whether all is done. UserError when the training diverges.
        """
        training, main = self.training, distributed.is_main()
        if main:
            self._scalars = ScalarLog(self.folder, resume_step=training.progress or -1)
        training.begin(self)
        if training.progress >= self.length:
            log.info('%salready at %s of %s', self.label, training.where(), self._goal())
            if distributed.from_main(lambda: not self.checkpoints.path(training.progress).exists()):
                self._save(stopping=False)
        asked = Stopping(training.device, requested=requested, max_minutes=max_minutes)
        self._clock = _Clock(training.progress)
        stopping = False
        while training.progress < self.length and not stopping:
            stopping = self._step(asked)
        training.close()
        if main and self._scalars is not None:
            self._scalars.close()
            if stopping:
                log.info('%sstopped at %s of %s', self.label, training.where(), self._goal())
        distributed.barrier()
        return not stopping

    def due(self, every: float | None) -> bool:
        """Whether the last step reached a multiple of `every`: the same ones in a resumed run."""
        now = self.training.progress
        return every is not None and now // every > (now - self.training.stride) // every

    def log(self, values: Mapping[str, float]) -> None:
        """Adds numbers to the records of the present progress, in the first process."""
        if self._scalars is not None:
            self._scalars.log(self.training.progress, dict(values))

    def _step(self, asked: 'Stopping') -> bool:
        """One step and what follows it; returns whether the run is to stop before its end."""
        training, clock = self.training, self._clock
        self._window.add(training.advance())
        last = training.progress >= self.length
        several_gpus = training.device.type == 'cuda' and distributed.world_size() > 1
        may_stop = not several_gpus or training.progress // training.stride % _ASK_EVERY == 0
        stopping = not last and may_stop and asked()
        saving = last or stopping or self._save_due()
        recording = saving or self.due(self.record_every)
        if recording:
            self._record(saving)
        elif distributed.is_main() and clock.silent() > _STATUS_SECONDS:
            self._status(self._window.means()[0])
        training.after_step(self, last=last)
        if saving:
            self._save(stopping=stopping)
            distributed.barrier()
            clock.saved = time.monotonic()
        if recording:
            clock.restart(training.progress)
        return stopping

    def _save_due(self) -> bool:
        # The clocks of several processes differ, so these save by progress alone.
        waited = time.monotonic() - self._clock.saved >= self.save_seconds
        return self.due(self.save_every) and (waited or distributed.world_size() > 1)

    def _record(self, saving: bool) -> None:
        means, spoilt = self._window.close()
        self.training.check(spoilt, saving=saving)
        if distributed.is_main():
            values = {**means, **self.training.facts()}
            rate = self._clock.speed(self.training.progress) * self.training.images
            self.log({**values, 'images_per_second': rate})
            self._status(values)

    def _status(self, values: Mapping[str, float]) -> None:
        training, clock = self.training, self._clock
        log.info(
            '%s%s/%s  %s  %.1f img/s  time %s  eta %s  mem %.1fG',
            self.label,
            training.where(),
            self._goal(),
            training.describe(values),
            clock.speed(training.progress) * training.images,
            _hours(clock.elapsed()),
            _hours(clock.left(training.progress, self.length)),
            memory_gb(training.device),
        )
        clock.spoke = time.monotonic()

    def _save(self, *, stopping: bool) -> None:
        main = distributed.is_main()
        if main:
            self.checkpoints.save(self.training.progress, self.training.state())
            self.training.after_save(self, stopping=stopping)
        if not stopping:
            self.training.measure(self)
        if main and (self.folder / STATS).is_file():
            records = read_jsonl(self.folder / STATS)
            names = {name for record in records for name in record} - _NOT_DRAWN
            plot_curves(
                self.folder / 'curves.png',
                {'': records},
                self.training.panels(names),
                unit=self.training.unit,
                scale=self.training.scale,
            )

    def _goal(self) -> str:
        return f'{self.length / self.training.scale:g}'


class _Window:
    """The values of the steps since the last record, kept on the device.

    Values that are not finite count in no mean, and are reported.
    """

    def __init__(self, of_all_steps: bool) -> None:
        self.of_all_steps = of_all_steps
        self.sums: dict[str, Tensor] = {}  # of each value, where finite, how often it was, steps

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Takes the values of a step; a value need not be there in every step."""
        if not self.of_all_steps:
            self.sums = {}
        for name, value in values.items():
            value = value.float() if torch.is_tensor(value) else torch.tensor(value).double()
            finite = value.isfinite().to(value.dtype)
            row = torch.stack([value.nan_to_num(0, 0, 0), finite, torch.ones_like(finite)])
            self.sums[name] = self.sums[name] + row if name in self.sums else row

    def means(self) -> tuple[dict[str, float], list[str]]:
        """This process's means, without values that were never finite; which ever were not."""
        rows = {name: row.tolist() for name, row in self.sums.items()}
        spoilt = [name for name, (_, finite, steps) in rows.items() if finite < steps]
        return {name: total / finite for name, (total, finite, _) in rows.items() if finite}, spoilt

    def close(self) -> tuple[dict[str, float], list[str]]:
        """As `means`, over all processes; empties the window."""
        self.sums = {name: distributed.all_reduce_sum(row) for name, row in self.sums.items()}
        found = self.means()
        self.sums = {}
        return found


class _Clock:
    """Time and progress: of the run, and since the last record, save or sign of life."""

    def __init__(self, progress: int) -> None:
        self.first, self.started = progress, time.monotonic()
        self.saved = self.started
        self.restart(progress)

    def restart(self, progress: int) -> None:
        """Begins a new stretch; what was not training in the one before does not count."""
        self.from_progress, self.since = progress, time.monotonic()
        self.spoke = self.since

    def speed(self, progress: int) -> float:
        """Counts per second in this stretch."""
        return (progress - self.from_progress) / max(time.monotonic() - self.since, 1e-9)

    def silent(self) -> float:
        """Seconds since the last status line."""
        return time.monotonic() - self.spoke

    def elapsed(self) -> float:
        """Seconds of the run."""
        return time.monotonic() - self.started

    def left(self, progress: int, length: int) -> float:
        """Seconds to come, at the pace of the whole run."""
        return (length - progress) * self.elapsed() / max(progress - self.first, 1)


class Stopping:
    """Asked after steps, in all processes at once: whether any of them is to stop.

    requested: this process's own wish, such as a `StopRequest`. max_minutes: time from now on.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        requested: Callable[[], bool] | None = None,
        max_minutes: float | None = None,
    ) -> None:
        self.device, self.requested = device, requested
        self.limit = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def __call__(self) -> bool:
        late = self.limit is not None and time.monotonic() > self.limit
        wished = late or (self.requested is not None and self.requested())
        return distributed.any_process(wished, self.device)


def finish(request: StopRequest) -> int:
    """Leaves the process group and returns the exit code of a training."""
    alone = distributed.world_size() == 1
    distributed.shutdown()
    return 128 + request.number if request.number is not None and alone else 0


def open_folder(
    folder: Path,
    make_record: Callable[[], dict],
    *,
    resume: bool,
    free_options: Iterable[str] = (),
    resume_flag: str | None = None,
) -> bool:
    """Begins the run folder with its record, or checks that the run in it may go on (True).

    Only `FREE_OPTIONS` and `free_options` may differ then; see `utils.runs.start_run`. The first
    process does it, and logs to log.txt from here on.
    """
    resuming = False
    if distributed.is_main():
        resuming = start_run(
            folder,
            make_record(),
            resume=resume,
            free_options=(*FREE_OPTIONS, *free_options),
            resume_flag=resume_flag,
        )
        setup_logging(folder / 'log.txt')
    distributed.barrier()
    return distributed.broadcast_object(resuming)


def memory_gb(device: torch.device) -> float:
    """Memory in use on a CPU, the most in use so far on a GPU, in GB."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _hours(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02d}:{seconds:02d}'
