"""Whatever a config file or an override holds: a config, or one line."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vold.config import dump_config, load_config
from vold.config.load import load_training_config
from vold.config.schema import EvalConfig, RlConfig, SftConfig, TracesConfig
from vold.io import visible

RL = {
    "run_dir": "runs/x",
    "student": "s",
    "data": {"path": "d.json", "layout": "orz"},
    "steps": 2,
    "rollout": {"max_new_tokens": 8},
    "optimizer": {"lr": 1e-5},
}
KEYS = [*RL, "parallel", "objective", "evaluation", "prompt", "loggers", "dtype", "seed", "tp", "lr", "layout", "x", ""]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_line(load) -> object | None:
    try:
        return load()
    except ValueError as error:
        assert str(error) and len(str(error).splitlines()) == 1, str(error)
        assert visible(str(error)) == str(error), repr(str(error))
        return None


@FUZZ
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    one_line(lambda: load_config(RlConfig, path))


@FUZZ
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    schema=st.sampled_from([RlConfig, SftConfig, TracesConfig, EvalConfig]),
)
def test_any_values_and_what_is_accepted_is_saved_and_read_again(tmp_path, changes, schema):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(RL | changes, allow_unicode=True))
    if config := one_line(lambda: load_config(schema, path)):
        path.write_text(dump_config(config, "rl"))
        assert load_config(schema, path) == config
    one_line(lambda: load_training_config(path))


@FUZZ
@given(
    override=st.text(max_size=20)
    | st.tuples(st.lists(st.sampled_from(KEYS), max_size=3), st.text(max_size=10)).map(
        lambda x: f"{'.'.join(x[0])}={x[1]}"
    )
)
@example(override="\x1e=")
@example(override="data.\x85=1")
@example(override="\u2028")
@example(override="steps=\x1b[2J")
@example(override="\u202e=\u2066")
@example(override="a\nb=c")
@example(override="none\n.yaml")
def test_any_override(tmp_path, override):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(RL))
    one_line(lambda: load_config(RlConfig, path, [override]))


@pytest.mark.parametrize("hidden", ["\x1e", "\x85", "\u2028", "\x1b[2J", "\u202e", "\n"], ids=ascii)
def test_hidden_characters_stay_on_one_line(tmp_path, hidden):
    """In a key, in a section's key, in a value, in the file's name and in its text."""
    path = tmp_path / f"c{hidden}.yaml"
    for changes in ({hidden: 1}, {"data": {hidden: 1}}, {"steps": hidden}, {"dtype": hidden}, {"optimizer": hidden}):
        path.write_text(yaml.safe_dump(RL | changes))
        assert one_line(lambda: load_config(RlConfig, path)) is None
        assert one_line(lambda: load_training_config(path)) is None
    path.write_text(f"a: [{hidden}")
    assert one_line(lambda: load_config(RlConfig, path)) is None
    assert one_line(lambda: load_config(RlConfig, tmp_path / f"none{hidden}.yaml")) is None


def test_a_valid_one_is_accepted(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(RL))
    assert load_config(RlConfig, path).steps == 2


@pytest.mark.parametrize(
    "text", ["a: &a [*a]", "{" * 2000, "? [a, b]\n: c", "a: 1\na: 2", "- " * 500, "a: !!binary 'x'"]
)
def test_yaml_that_is_more_than_a_tree(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert one_line(lambda: load_config(RlConfig, path)) is None
