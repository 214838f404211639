"""`vold plan --teacher-gpus`: the share of a step that waits for a teacher, from published numbers alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import dry_run
import pytest
from rich.console import Console

from vold.config import load_config, schema
from vold.objectives import PRESETS
from vold.planning import plan
from vold.planning.gpu_specs import GPU_SPECS
from vold.planning.step_sizes import StepSizes
from vold.planning.step_time import phase_work
from vold.planning.teacher_cost import Sampling, TeacherCost, TeacherQuestion, read_question, scored_share, write_figure

CONFIG = Path(__file__).parents[2] / "configs" / "qwen2.5-vl-3b" / "vold.yaml"
H100 = GPU_SPECS["h100-80g"]
QWEN3_32B = {  # of its published config.json
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "max_position_embeddings": 40960,
    "num_attention_heads": 64,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
ENGINES = ["teacher_engine=vllm", "teacher_vllm.urls=[http://draw:1]"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """config.json alone: the 32B teacher, students of 3B and 8B."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "32B").mkdir()
    (folder / "32B" / "config.json").write_text(json.dumps(QWEN3_32B))
    dry_run.student().save_pretrained(folder / "3B")
    dry_run.teacher().save_pretrained(folder / "8B")
    return {path.name: path for path in folder.iterdir()}


def cost_of(models, student: str = "3B", *overrides: str, processes: int = 8, mean: int = 2048) -> TeacherCost:
    paths = [f"student={models[student]}", f"teacher={models['32B']}", *ENGINES]
    config = load_config(schema.RlConfig, CONFIG, [*paths, *overrides])
    return TeacherCost.from_sizes(StepSizes(config, processes, mean), H100)


def test_scoring_takes_two_flop_a_parameter_and_token_of_the_failed_responses(models):
    """32.76 billion parameters, without the embedding 31.98; attention reads half of what is before a token."""
    tokens = 0.4 * 256 * 5 * (1024 + 2048)
    matmuls = 2 * (32_762_123_264 - 151936 * 5120) * tokens
    attention = 4 * 64 * 64 * 128 * (3072 / 2) * tokens  # scores and values, layers, heads × width, mean keys
    found = cost_of(models).point(8, 0.6).scoring
    assert found == pytest.approx((matmuls + attention) / (8 * 989e12), rel=1e-3)
    assert cost_of(models).point(4, 0.6).scoring == pytest.approx(2 * found)
    assert cost_of(models, "3B", "objective.preset=vold-unmasked").point(8, 0.6).scoring == pytest.approx(found / 0.4)


def test_eight_and_eight_gpus_at_60_percent_keep_the_target_with_a_student_of_8b_and_not_with_one_of_3b(models):
    """What docs/teachers.md says."""
    shares = {name: cost_of(models, name).point(8, 0.6).share for name in ("3B", "8B")}
    assert shares["8B"] < 0.1 < 0.2 < shares["3B"] < 0.26
    assert cost_of(models).point(16, 0.6).share < 0.1


def test_whole_distributions_and_a_teacher_in_the_trainer_hide_behind_nothing(models):
    whole = cost_of(models, "3B", "objective.divergence=reverse_kl").point(8, 0.6)
    assert whole.waiting == pytest.approx(whole.scoring) and whole.share == pytest.approx(whole.unhidden)
    inside = cost_of(models).point(0, 0.6)
    assert inside.waiting == pytest.approx(inside.scoring) and inside.step > cost_of(models).point(8, 0.6).step


def test_a_step_waits_less_the_more_gpus_and_the_more_right_answers(models):
    cost = cost_of(models)
    by_gpus = [cost.point(gpus, 0.6).share for gpus in (1, 2, 4, 8, 16, 64, 512)]
    assert by_gpus == sorted(by_gpus, reverse=True) and by_gpus[-1] < 0.005
    by_accuracy = [cost.point(8, accuracy).share for accuracy in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert by_accuracy == sorted(by_accuracy, reverse=True) and by_accuracy[-1] == 0.0
    assert not cost_of(models, "3B", "rollout.vllm.sleep=false").point(0, 0.6).gpus
    small = TeacherCost.from_sizes(cost.sizes, GPU_SPECS["a100-40g"])
    assert [small.point(gpus, 0.6).fits for gpus in (1, 2)] == [False, True], "61 GiB of weights"


def test_the_end_of_scoring_is_that_of_a_queue(models):
    """Groups one after the other, each as it finishes or when the teacher is free."""
    sampling = Sampling.at_the_peaks(cost_of(models).sizes, H100)
    for scoring in (0.1, 3.0, 13.0, 50.0):
        groups, free = 4000, 0.0
        for group in range(groups):
            moment = sampling.seconds[(sampling.finished >= (group + 0.5) / groups).argmax()]
            free = max(free, moment) + scoring / groups
        assert sampling.scored_after(scoring) == pytest.approx(free, rel=0.02)


def test_lengths_are_those_of_a_drawing_by_hand(models):
    """Groups of 5 lengths between 0 and 4096: the share that is finished after so many tokens."""
    sampling, draw = Sampling.at_the_peaks(cost_of(models).sizes, H100), random.Random(0)
    longest = sorted(max(draw.uniform(0, 4096) for _ in range(5)) for _ in range(4000))
    for part in (0.5, 0.75, 0.9):
        index = round(part * (len(sampling.finished) - 1))
        drawn = sum(length <= part * 4096 for length in longest) / len(longest)
        assert sampling.finished[index] == pytest.approx(drawn, abs=0.02)
    assert sampling.finished[-1] == 1.0 and (sampling.seconds[1:] > sampling.seconds[:-1]).all()
    equal = Sampling.at_the_peaks(cost_of(models, mean=7168).sizes, H100)
    assert equal.finished[:-1].max() == 0.0, "all are as long as the longest: they finish together"


def test_the_share_that_is_scored_is_the_objectives(models):
    share = {name: scored_share(PRESETS[name], 0.6, 5) for name in ("vold", "vold-unmasked", "kdrl-group", "grpo")}
    assert share == pytest.approx({"vold": 0.4, "vold-unmasked": 1.0, "kdrl-group": 0.4**5, "grpo": 0.0})


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("", 0.6, None), "--accuracy and --plot are of --teacher-gpus"),
        (("8,x", 0.6, None), "'8,x' is no list of numbers of GPUs; write 1,2,4,8"),
        (("0", 0.6, None), "is no list of numbers"),
        (("8", 0.6, Path("cost.pdf")), "--plot cost.pdf must end in .png or .svg"),
    ],
)
def test_a_question_that_means_nothing_is_one_line(given, line):
    with pytest.raises(ValueError, match=line):
        read_question(*given)


def test_a_question_is_read():
    assert read_question("", 0.0, None) is None
    assert read_question("8, 2,8", 0.5, None) == TeacherQuestion([2, 8], 0.5)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["objective.preset=grpo"], "is of an rl config whose objective needs a teacher"),
        (
            ["teacher=null", "teacher_engine=trainer", "teacher_vllm.urls=[]", "teachers={a: {path: 32B}}"],
            "one teacher",
        ),
    ],
)
def test_a_config_without_one_teacher_is_refused(models, overrides, line):
    with pytest.raises(ValueError, match=line):
        cost_of(models, "3B", *overrides)


def test_the_figure_has_a_line_an_accuracy_and_the_plan_its_table(models, tmp_path, capsys):
    cost = cost_of(models)
    write_figure(cost, [1, 8], 0.6, tmp_path / "deep" / "cost.svg")
    drawn = (tmp_path / "deep" / "cost.svg").read_text()
    assert all(text in drawn for text in ("step that waits for the teacher", "a step at 60% right", "0%", "80%"))
    asked = TeacherQuestion([8, 16], 0.6, tmp_path / "cost.png")
    plan._print_teacher_cost(cost.sizes, H100, asked, Console(width=150))
    said = capsys.readouterr().out
    assert "40% of responses are scored" in said and "So 16 GPUs are the fewest" in " ".join(said.split())
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_teachers_below_teachers_are_counted(models):
    """Two in the trainer and one in vLLM with whole distributions: work, kept hidden states, and its head."""
    several = (
        f"teachers={{a: {{path: {models['8B']}, engine: trainer, offload: true}}, "
        f"b: {{path: {models['32B']}, engine: trainer, divergence: forward_kl}}, "
        f"c: {{path: {models['32B']}, divergence: jsd}}}}"
    )
    config = load_config(schema.RlConfig, CONFIG, [f"student={models['3B']}", "teacher=null", several])
    sizes = StepSizes(config, 8)
    assert [(t.arch.layers, t.offload, t.is_base) for t in sizes.trainer_teachers] == [
        (36, True, False),
        (64, False, False),
    ]
    assert sizes.scoring_teachers == 3 and sizes.has_full_divergence
    one = StepSizes(config.model_copy(update={"teachers": {"a": config.teachers["a"]}}), 8)
    other = StepSizes(config.model_copy(update={"teachers": {"b": config.teachers["b"]}}), 8)
    work = phase_work(one)["teacher"].flop + phase_work(other)["teacher"].flop
    assert phase_work(sizes)["teacher"].flop == pytest.approx(work / 3), "each of three scores as many"
    tokens = sizes.responses_per_replica * sizes.response_tokens
    assert sizes.hidden_teacher_bytes == tokens * 2 * 5120 * 2 and sizes.engine_head_bytes == 151936 * 5120 * 2
