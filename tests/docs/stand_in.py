"""A process that stands in for a reader's machine: `stand_in.py REQUESTS ANSWERS`, two file descriptors.

It runs programs of this folder one after the other in the directory of conftest.py, so that packages are imported once.
A request is a line of JSON, [program, arguments], and its answer another, {"outcomes": …} or {"error": traceback}. It
is a process of its own because `vold check` replaces the process groups.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback

from vold.parallel.launch import shutdown


def main(requests: int, answers: int) -> None:
    with open(requests) as asked, open(answers, "w") as told:
        for line in asked:
            program, arguments = json.loads(line)
            try:
                answer = {"outcomes": importlib.import_module(program).outcomes(*arguments)}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            shutdown()  # what a check that failed leaves
            told.write(json.dumps(answer) + "\n")
            told.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
