"""One grading worker: `python -m vold.grading.worker SECONDS BYTES`, JSON lines in and out.

    in   {"answer": "\\\\frac{1}{2}", "gold": "0.5"}
    out  {"ready": true} once, then per line {"equal": true, "rule": "algebra", "retire": false}

SECONDS of CPU time an answer, BYTES of address space. The kernel ends a worker that computes longer (SIGPROF), even in
the middle of C code, whether or not its parent still lives.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
from pathlib import Path

START_SECONDS = 300.0
_WARM_UP = ((r"\frac{1}{2}", r"\sqrt{2}"), (r"\{1,2\}", "(1,x)"), (r"x^{2}+1", r"2x"), ("1<x", r"[2,\infty)"))


def main() -> None:
    seconds, max_bytes = float(sys.argv[1]), int(sys.argv[2])
    parent = os.getppid()
    output = private_stdout()
    limit(max_bytes)
    sys.modules["gmpy2"] = None  # type: ignore[assignment]  # its powers cannot be interrupted
    try:
        from vold.grading.symbolic import symbolically_equal

        for answer, gold in _WARM_UP:  # the parser's tables and regexes are built on first use
            symbolically_equal(answer, gold)
    except Exception as error:
        send(output, {"failed": f"{type(error).__name__}: {error}"})
        return
    signal.setitimer(signal.ITIMER_PROF, 0)
    send(output, {"ready": True})
    for line in lines(parent):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = _answer(symbolically_equal, line)
        signal.setitimer(signal.ITIMER_PROF, 0)
        # sympy's caches grow; near the limit a MemoryError would make *correct* answers wrong.
        reply["retire"] = address_space() > max_bytes / 2
        send(output, reply)


def _answer(symbolically_equal, line: bytes) -> dict:
    """Grade one answer. An exception makes it wrong, unless the gold raises by itself: breaking the parser must not
    mask a sample whose reward is 0."""
    job = json.loads(line)
    try:
        try:
            verdict, rule = symbolically_equal(job["answer"], job["gold"])
        except Exception:
            symbolically_equal(job["gold"], job["gold"])
            verdict, rule = False, "unparsed"
    except Exception as error:
        return {"error": type(error).__name__}  # never str(error): printing a huge expression can hang
    return {"equal": verdict, "rule": rule}


def private_stdout() -> int:
    """The pipe to the parent; whatever a library prints goes to stderr instead."""
    output = os.dup(1)
    os.dup2(2, 1)
    return output


def limit(max_bytes: int) -> None:
    """Bound address space and the CPU time of starting, write no core files, and leave other signals than that of the
    CPU limit to the parent."""
    with contextlib.suppress(OSError, ValueError):  # not every system limits address space
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for asked_to_stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the trainer decides; its pipe then closes
        signal.signal(asked_to_stop, lambda *_: None)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    signal.setitimer(signal.ITIMER_PROF, START_SECONDS)


def address_space() -> int:
    """Bytes in use, as RLIMIT_AS counts them; 0 where there is no /proc. (ru_maxrss inherits the trainer's peak.)"""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return 0
    return pages * resource.getpagesize()


def lines(parent: int):
    """Lines from stdin until it closes or the parent changes (a forked sibling may hold the pipe open)."""
    buffer = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], 5.0)[0]:
            continue
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return
        *complete, buffer = (buffer + chunk).split(b"\n")
        yield from complete


def send(output: int, message: dict) -> None:
    """Write one message to the parent."""
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(output, line) :]


if __name__ == "__main__":
    main()
