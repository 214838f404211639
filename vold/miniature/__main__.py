"""`python -m vold.miniature demo | reproduce | methods | second-act | selfplay`."""

import sys
import warnings

warnings.filterwarnings("ignore", module=r"megatron\..*")


def main(arguments: list[str]) -> int:
    from vold.miniature import demo, methods, reproduce, second_act, selfplay

    verbs = {"demo": demo, "reproduce": reproduce, "methods": methods, "second-act": second_act, "selfplay": selfplay}
    if len(arguments) != 1 or arguments[0] not in verbs:
        print(f"usage: python -m vold.miniature {' | '.join(verbs)}", file=sys.stderr)
        return 2
    try:
        verbs[arguments[0]].run()
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
