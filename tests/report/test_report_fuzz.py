"""Run directories with anything in them that JSON can say: a page and a screen come out, never a traceback."""

import io
import json
from random import Random

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from made_up_runs import rl_samples, write_run
from rich.console import Console

from vold.report import read_run, write_report
from vold.report.watch import view

SAMPLE_KEYS = sorted({key for row in rl_samples(Random(0), 20) for key in row} | {"set"})
METRIC_KEYS = ["step", "seconds", "reward", "entropy", "accuracy_text", "stderr_text", "seconds_train", "truncated"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def rows_of(keys, most=6):
    likely = st.floats(-10, 10) | st.integers(0, 9)
    return st.lists(
        st.dictionaries(st.sampled_from(keys) | st.text(max_size=6), likely | ANYTHING, max_size=8), max_size=most
    )


INTERVALS = st.lists(
    st.lists(st.sampled_from(["train", "rollout", "evaluate"]) | SCALARS, min_size=3, max_size=5), max_size=5
)
TIMELINES = st.lists(st.fixed_dictionaries({"step": SCALARS, "intervals": INTERVALS | ANYTHING}), max_size=3)


# no shrinking: an example takes a second, and what it prints is small already
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(
    metrics=rows_of(METRIC_KEYS),
    samples=rows_of(SAMPLE_KEYS),
    timeline=TIMELINES,
    config=ANYTHING,
    torn=st.binary(max_size=9),
)
def test_whatever_is_on_file(tmp_path_factory, metrics, samples, timeline, config, torn):
    root = tmp_path_factory.mktemp("runs")
    for name in ("one", "two"):
        run = write_run(root / name, config=config if config is not None else {}, metrics=metrics, samples=samples)
        (run / "timeline.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timeline))
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(torn)
    html = write_report([root], root / "report.html", title="Anything").read_text(encoding="utf-8")
    assert html.rstrip().endswith("</html>")
    Console(file=io.StringIO(), width=80).print(view(read_run(root / "one"), silent=1.0))
