"""Faults for one rank of a run, and the function that such a rank runs."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from vold import cli
from vold.data.traces import TraceShard
from vold.trainer import checkpoint
from vold.trainer.trainer import Trainer
from vold.types import Batch


def run_verb(arguments: list[str], faults: dict[int, tuple]) -> None:
    """`vold ARGUMENTS` on this rank; faults: rank -> (function of this module, its arguments)."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a run under nohup ignores it, and the tests may run under nohup
    signal.signal(signal.SIGINT, signal.default_int_handler)  # and a job in the background ignores this one
    fault, *numbers = faults.get(int(os.environ["RANK"]), (None,))
    if fault is not None:
        fault(*numbers)
    sys.argv = ["vold", *arguments]
    cli.main()


def at_call(owner: object, name: str, number: int, action: Callable) -> None:
    """Replace owner.name so that its `number`-th call (from 1) goes through action(original, *arguments)."""
    original, calls = getattr(owner, name), [0]

    def counted(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == number:
            return action(original, *arguments, **keywords)
        return original(*arguments, **keywords)

    setattr(owner, name, counted)


def die(*_arguments, **_keywords) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_step(number: int) -> None:
    """Killed when gradients are ready and nothing is updated."""
    at_call(Trainer, "_update", number, die)


def dies_in_save(number: int) -> None:
    """Killed with half of its file written."""

    def half(write, file, pieces):
        write(file, pieces)
        os.truncate(file, file.stat().st_size // 2)
        die()

    at_call(checkpoint, "write_pieces", number, half)


def dies_in_trace(number: int) -> None:
    """Killed with the end of its file not yet written."""

    def torn(add, shard, rollouts):
        add(shard, rollouts)
        os.truncate(shard.part, shard.part.stat().st_size - 9)
        die()

    at_call(TraceShard, "add", number, torn)


def hangs_in_step(number: int) -> None:
    at_call(Trainer, "_update", number, lambda *_: time.sleep(3600))


def is_sent_sigterm_in_step(number: int) -> None:
    def signalled(step, *arguments, **keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **keywords)

    at_call(Trainer, "step", number, signalled)


def gets_signals(number: int, *signals: tuple[float, int]) -> None:
    """In the `number`-th step; each signal after so many seconds more."""

    def signalled(step, *arguments, **keywords):
        for seconds, sent in signals:
            time.sleep(seconds)
            os.kill(os.getpid(), sent)
        return step(*arguments, **keywords)

    at_call(Trainer, "step", number, signalled)


def gets_signals_until_saved(number: int) -> None:
    """SIGTERM in the `number`-th step, from a launcher and a scheduler, and again while its file is being written."""

    def signalled(write, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return write(*arguments)

    gets_signals(number, (0, signal.SIGTERM), (0, signal.SIGTERM))
    at_call(checkpoint, "write_pieces", 1, signalled)


def dies_before_it_starts() -> None:
    from vold.parallel import launch

    at_call(launch, "_start_world", 1, die)


def disk_is_full_in_save(number: int, limit: int) -> None:
    """No file may grow beyond `limit` bytes; the kernel refuses the write itself."""

    def limited(save, *arguments, **options):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return save(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    at_call(checkpoint.Checkpoints, "save", number, limited)


def gets_nan(first: int, count: int) -> None:
    """Advantages are not-a-number in this rank's share of the batch, in `count` steps from step `first` on."""

    def poisoned(step, trainer, batch, **keywords):
        micro_batches = tuple(replace(m, advantage_N=m.advantage_N * float("nan")) for m in batch.micro_batches)
        return step(trainer, Batch(micro_batches), **keywords)

    for number in range(count):
        at_call(Trainer, "step", first if number == 0 else first + number, poisoned)
