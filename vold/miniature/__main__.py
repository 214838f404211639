"""`python -m vold.miniature demo | reproduce | methods | lora | second-act | teachers | selfplay`."""

import argparse
import importlib
import signal
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", module=r"megatron\..*")

COMMANDS = {
    "demo": "the two-stage pipeline once: base, SFT, GRPO and VOLD, evaluated on text and on images",
    "reproduce": "one claim after the other, 8 seeds each, with intervals; PART … chooses (docs/science.md)",
    "methods": "every method of configs/methods at equal rollouts, three seeds",
    "lora": "LoRA of rank 16 beside full training, three seeds",
    "second-act": "RL on image problems after VOLD on text, three seeds",
    "teachers": "two teachers, each right on its half, and both by a column, three seeds",
    "selfplay": "R-Zero beside R-Diverse for five iterations, three seeds",
}
MODULES = {"teachers": "several_teachers", "reproduce": "science.run"}


def main(arguments: list[str]) -> int:
    """Run one command; what is finished below runs/ is kept. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vold.miniature",
        description="VOLD on a tiny world, on a CPU. Writes below runs/ here; finished parts are kept.",
        epilog="\n".join(f"  {name:<11}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("parts", nargs="*", metavar="PART", help="of reproduce: names, or files of your own")
    parser.add_argument("--budget", action="store_true", help="of reproduce: print what the parts cost, and end")
    parser.add_argument("--from", type=Path, dest="published", help="of reproduce: go on from FROM/PART.jsonl")
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    asked = parser.parse_args(arguments)
    if asked.command != "reproduce" and (asked.parts or asked.budget or asked.published):
        parser.error(f"{asked.command} takes no PART, --budget or --from; reproduce does")
    options = {"parts": asked.parts, "only_budget": asked.budget, "published": asked.published}
    options = options if asked.command == "reproduce" else {}
    from vold.io import configure_logging

    configure_logging()
    for asked_to_stop in (signal.SIGTERM, signal.SIGHUP):  # an exception ends what was started here
        signal.signal(asked_to_stop, lambda number, _: sys.exit(128 + number))
    try:
        module = MODULES.get(asked.command, asked.command.replace("-", "_"))
        importlib.import_module(f"vold.miniature.{module}").run(**options)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
