"""SIGTERM, SIGHUP, Ctrl-C and a launcher that is gone: the step under way is finished and saved.

Launcher and scheduler each send a SIGTERM, and torchrun repeats a Ctrl-C: repeats are ignored for a while. Signals are
read by a thread, since Python's own handlers wait while the main thread is in a collective.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from vold.io import log

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
ECHO_SECONDS = 1.0
"""A second Ctrl-C within so many seconds is the first one, passed on by a launcher."""


class StopRequest:
    """A context manager for the steps of a run; `signal` is 0 until the run is asked to stop.

    grace_seconds: a repeat that comes earlier than this, after the first signal and again after `save_begins`, is
    ignored; a later one, or a second Ctrl-C, ends the process at once with the exit code of that signal. Signals that
    were ignored before (nohup) stay so.
    """

    def __init__(self, grace_seconds: float):
        self.signal = 0
        self._grace, self._ignored_until, self._interrupted = grace_seconds, 0.0, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        global _active
        _active = self
        if threading.current_thread() is not threading.main_thread():
            return self  # signals are the main thread's
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back, unless the process ends because of one: then repeats still come."""
        global _active
        if self.signal:
            return
        _active = None
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        os.close(self._pipe[1])
        self._thread.join()
        os.close(self._pipe[0])

    def save_begins(self, number: int) -> None:
        """The last save begins, since a rank got signal `number`: repeats are ignored for another `grace_seconds`."""
        if not self.signal:
            self._stop_with(number, f"another rank got {signal.Signals(number).name}")
        self._ignored_until = time.monotonic() + self._grace

    def receive(self, number: int, cause: str = "") -> None:
        """React to a signal. Called by the thread that reads them."""
        now = time.monotonic()
        second = number == signal.SIGINT and self._interrupted and now - self._interrupted > ECHO_SECONDS
        if number == signal.SIGINT:
            self._interrupted = self._interrupted or now
        if not self.signal:
            self._ignored_until = now + self._grace
            self._stop_with(number, cause or signal.Signals(number).name)
        elif second or now > self._ignored_until:
            os._exit(128 + number)

    def _stop_with(self, number: int, cause: str) -> None:
        self.signal = number
        if os.environ.get("RANK", "0") == "0":
            again = "; a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
            log.warning(f"{cause}: the step under way is finished and saved first{again}")

    def _watch(self) -> None:
        while True:
            select.select([self._pipe[0]], [], [])
            if not (numbers := os.read(self._pipe[0], 64)):
                return
            for number in numbers:
                if number in SIGNALS:
                    self.receive(number)


_active: StopRequest | None = None


def follow_launcher() -> None:
    """End this process when torchrun, which started it, is gone: after the step, saved, where it trains, and at once
    elsewhere. Nobody could end it otherwise, and the job that is submitted again would meet it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or any(t.name == "launcher" for t in threading.enumerate()):
        return
    threading.Thread(target=_follow, args=(os.getppid(),), name="launcher", daemon=True).start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    cause = f"the launcher (torchrun, process {launcher}) is gone"
    log.warning(f"{cause}; this process ends" + (", saved, after the step under way" if _active else ""))
    if _active is None:
        os._exit(1)
    _active.receive(signal.SIGTERM, cause)
