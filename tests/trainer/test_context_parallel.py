"""Kinds of losses and teachers at cp = 2 beside cp = 1: gradients, metrics, and what is reported of each sample.

ALL=1 python -m pytest tests/trainer/test_context_parallel.py      every kind and layout

The layouts' own table, with vold's loss, is that of benchmarks/parity.py.
"""

from __future__ import annotations

import json
import os

import context_ranks
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support import ranks
from support.completion_server import CompletionServer
from support.fake_engine import FakeEngine
from support.steps import make_groups, relative
from vold.miniature import models

LAYOUTS = {"cp2": (2, dict(cp=2))}
if os.environ.get("ALL"):
    LAYOUTS |= {"tp2-cp2+sp": (4, dict(tp=2, cp=2, sp=True)), "pp3-cp2": (6, dict(pp=3, cp=2))}


@pytest.fixture(scope="module")
def world(tiny_student_dir, tiny_teacher_dir, tmp_path_factory):
    second = tmp_path_factory.mktemp("second")
    models.save_checkpoint(models.new_model(models.teacher_config(), seed=9), second)
    engines = [FakeEngine(), FakeEngine()]
    for engine in engines:
        engine.width = models.HIDDEN
    engines[1].fault, engines[1].victim = "500", int(make_groups(context_ranks.REWARDS)[2].prompt.token_ids[0])
    with CompletionServer(AutoModelForCausalLM.from_pretrained(tiny_teacher_dir), vocab_size=40) as server:
        yield context_ranks.World(tiny_student_dir, tiny_teacher_dir, second, server.url, *(e.url for e in engines))
    for engine in engines:
        engine.stop()


@pytest.fixture(scope="module")
def alone(world, layout, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    context_ranks.measure(world, layout, out)
    return out


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_teachers_are_the_same(name, world, alone, tmp_path):
    ranks.run(LAYOUTS[name][0], context_ranks.rank, world, LAYOUTS[name][1], tmp_path, logs=tmp_path / "logs")
    for case in context_ranks.cases():
        found, expected = (load_file(folder / f"{case}.safetensors") for folder in (tmp_path, alone))
        assert max(float(g.abs().max()) for g in expected.values()) > 0, case
        assert relative(found, expected) <= 1e-4, case
        found, expected = (json.loads((folder / f"{case}.json").read_text()) for folder in (tmp_path, alone))
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=2e-5, abs=1e-6), case
        assert found["mean_kl"] == pytest.approx(expected["mean_kl"], rel=1e-4, abs=1e-8), case
        assert found["tokens"].keys() == expected["tokens"].keys() and found["tokens"], case
        for sample, logps in expected["tokens"].items():
            assert found["tokens"][sample].keys() == logps.keys(), case
            for kind, values in logps.items():
                assert found["tokens"][sample][kind] == pytest.approx(values, abs=1e-4), (case, sample, kind)
