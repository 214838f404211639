"""Every number of a method and of a recipe has a label in docs/sources.yaml that says where it is from, and the label
has its present value.

WRITE=1 python -m pytest tests/docs/test_sources.py      puts the table into docs/methods.md
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import os
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from commands import ROOT

import vold.objectives
import vold_kernels
from vold import PRESETS
from vold.config import schema

PAGE = ROOT / "docs" / "methods.md"
START, END = "<!-- sources: written by tests/docs/test_sources.py -->\n", "<!-- end of sources -->\n"
LABELS = yaml.safe_load((ROOT / "docs" / "sources.yaml").read_text())
KINDS = ("published", "public code", "attributed", "ours", "idle")
OFF = {
    "kl_clamp": math.inf,
    "entropy_bonus": 0.0,
    "reference_beta": 0.0,
    "teacher_share": 1.0,
    "max_response_tokens": 0,
}
HEADINGS = {
    "presets": "Presets",
    "code": "Numbers in `vold/objectives` and the kernels",
    "configs": "Configs",
    "defaults": "Defaults",
}
SECTIONS = (  # of the schema, those whose numbers change what is trained
    *("OptimizerConfig", "SamplingConfig", "RolloutConfig", "DynamicSamplingConfig", "CurriculumConfig"),
    *("ObjectiveConfig", "RlConfig", "SftConfig", "TracesConfig", "PromptConfig", "RewardConfig", "JudgeConfig"),
    *("AdapterConfig", "TeacherConfig", "EvaluationConfig", "VlmevalkitConfig", "PoseConfig", "AnswersConfig"),
    *("MemoryConfig", "CoderConfig", "SelfplayConfig", "SelfplayPhaseConfig"),
)


def is_number(value: Any) -> bool:
    """A number, or several."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(is_number, value))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def same(value: Any) -> Any:
    return list(map(float, value)) if isinstance(value, (list, tuple)) else float(value)


def leaves(record: Any, before: str = "") -> Iterator[tuple[str, float]]:
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value) and field.name != "ratio":
            yield from leaves(value, f"{before}{field.name}.")
        elif is_number(value) and OFF.get(field.name) != value and not (field.name == "beta" and value == 0):
            yield before + field.name, value


def nested(section: dict, before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from nested(value, f"{before}{key}.")
        elif is_number(value):
            yield before + key, value


def of_presets() -> dict[tuple[str, str], Any]:
    return {(name, key): same(value) for name, preset in PRESETS.items() for key, value in leaves(preset)}


def of_code() -> dict[tuple[str, str], Any]:
    """Constants, defaults of arguments and of records: a new one in vold/objectives needs a label."""
    found: dict[tuple[str, str], Any] = {}
    for info in pkgutil.iter_modules(vold.objectives.__path__):
        module = importlib.import_module(f"vold.objectives.{info.name}")
        for name, value in vars(module).items():
            if name.lstrip("_").isupper() and is_number(value):
                found[f"{info.name}.{name}", ""] = same(value)
            elif getattr(value, "__module__", None) != module.__name__ or name == "Objective":
                continue  # Objective: the presets have its numbers
            elif dataclasses.is_dataclass(value) and inspect.isclass(value):
                fields = [(field.name, field.default) for field in dataclasses.fields(value)]
                found |= {(f"{info.name}.{name}.{key}", ""): same(v) for key, v in fields if is_number(v)}
            elif inspect.isfunction(value):
                found |= {(f"{info.name}.{name}.{key}", ""): same(v) for key, v in arguments(value)}
    loss = dict(arguments(vold_kernels.linear_policy_loss))
    return found | {("linear_policy_loss.gate_temperatures", ""): same(loss["gate_temperatures"])}


def arguments(function: Any) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.default) for parameter in parameters if is_number(parameter.default)]


def of_configs() -> dict[tuple[str, str], Any]:
    found = {}
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        if path.parent.name != "launch":
            name = f"{path.parent.name}/{path.stem}"
            found |= {(name, key): same(value) for key, value in nested(yaml.safe_load(path.read_text()))}
    return {place: value for place, value in found.items() if not on_machine(place[1])}


def of_defaults() -> dict[tuple[str, str], Any]:
    found = {}
    for name in SECTIONS:
        fields = getattr(schema, name).model_fields.items()
        found |= {(name, key): same(info.default) for key, info in fields if is_number(info.default)}
    return {place: value for place, value in found.items() if not on_machine(place[1])}


def on_machine(key: str) -> bool:
    return key.rpartition(".")[2] in LABELS["machine"]


NUMBERS = {"presets": of_presets, "code": of_code, "configs": of_configs, "defaults": of_defaults}


def labelled(part: str, numbers: dict[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    """Place -> value, as the labels have it. `all` is for configs of which nothing was published."""
    found: dict[tuple[str, str], Any] = {}
    for entry in LABELS[part]:
        for name in entry["of"].split():
            given = entry["numbers"]
            if given == "all":
                assert entry["from"] == "ours", name
                given = {key: value for (config, key), value in numbers.items() if config == name}
            for key, value in (given if isinstance(given, dict) else {"": given}).items():
                assert (name, key) not in found, f"{name} {key} has two labels"
                found[name, key] = same(value)
    return found


@pytest.mark.parametrize("part", NUMBERS)
def test_every_number_has_a_label_and_every_label_its_number(part):
    assert all(entry["from"] in KINDS and entry["source"] for entry in LABELS[part])
    numbers = NUMBERS[part]()
    assert labelled(part, numbers) == numbers


def test_a_number_without_a_label_and_one_that_changed_are_seen(monkeypatch):
    changed = dataclasses.replace(PRESETS["grpo"], clip_eps_high=0.28, entropy_bonus=0.01)
    monkeypatch.setitem(PRESETS, "grpo", changed)
    numbers = of_presets()
    differ = set(numbers.items()) ^ set(labelled("presets", numbers).items())
    assert {place for place, _ in differ} == {("grpo", "clip_eps_high"), ("grpo", "entropy_bonus")}


def table(part: str) -> Iterator[str]:
    yield f"\n**{HEADINGS[part]}**\n"
    yield "| numbers | of | from | source |\n|:--|:--|:--|:--|"
    for entry in LABELS[part]:
        names = ", ".join(f"`{name}`" for name in entry["of"].split())
        given = entry["numbers"]
        if isinstance(given, dict):
            given = ", ".join(f"{key} {shown(value)}" for key, value in given.items())
        yield f"| {shown(given)} | {names} | {entry['from']} | {entry['source']} |"


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return value if isinstance(value, str) else f"{value:g}"


def test_the_page_has_the_table():
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    lines = [line for part in NUMBERS for line in table(part)]
    unlabelled = ", ".join(f"`{key}`" for key in LABELS["machine"])
    lines += ["", f"Without a label, for they change no result's expectation: {unlabelled}."]
    page = before + START + "\n".join(lines) + "\n\n" + END + after
    if os.environ.get("WRITE"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page
