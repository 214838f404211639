"""`python -m vold.miniature demo | reproduce | methods | selfplay`."""

import sys
import warnings

warnings.filterwarnings("ignore", module=r"megatron\..*")


def main(arguments: list[str]) -> int:
    from vold.miniature import demo, methods, reproduce, selfplay

    verbs = {"demo": demo.run, "reproduce": reproduce.run, "methods": methods.run, "selfplay": selfplay.run}
    if len(arguments) != 1 or arguments[0] not in verbs:
        print(f"usage: python -m vold.miniature {' | '.join(verbs)}", file=sys.stderr)
        return 2
    try:
        verbs[arguments[0]]()
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
