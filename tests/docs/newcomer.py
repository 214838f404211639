"""48 things that a new user tried, and what comes of each: the program behind docs/newcomer.md.

Run by stand_in.py in the directory of conftest.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from bad_input import RL, SMALL, put
from execute import run

SFT = "vold/miniature/configs/sft.yaml"


@dataclass(frozen=True)
class Row:
    """before: what it cost once: silent (trained the wrong thing), blocked, time, looks, or fine.

    watched: a test, where the row has no command. said: what the command prints, on standard output or error.
    """

    tried: str
    before: str
    now: str
    watched: str = ""
    command: tuple[str, ...] = ()
    code: int = 0
    said: str = ""
    prepare: Callable[[], None] = lambda: None


def rl(*overrides: str) -> tuple[str, ...]:
    return ("rl", RL, "run_dir=runs/newcomer", *SMALL, *overrides)


def key(tried: str, override: str, said: str, before: str = "time") -> Row:
    """A key or value that another trainer has, and the line that names ours."""
    return Row(tried, before, f"one line: `{said}`", command=rl(override), code=2, said=said)


def rows_of(name: str, *rows: dict) -> tuple[str, Callable[[], None]]:
    path = f"mine/{name}.jsonl"
    return path, put(path, "".join(json.dumps(row) + "\n" for row in rows))


def on_data(tried: str, before: str, now: str, said: str, layout: str, *rows: dict, **more) -> Row:
    """A data file of `rows` that stage 2 refuses before it loads a model."""
    path, prepare = rows_of("newcomer-" + "".join(c for c in tried if c.isalnum()), *rows)
    command = rl(f"data={{path: {path}, layout: {layout}}}", *more.pop("overrides", ()))
    return Row(tried, before, now, command=command, code=2, said=said, prepare=prepare)


MEMBERS = "data/test_members.py::"
DATA_PAGE = "docs/test_your_own_data.py::test_a_row_is_read_as_the_table_says"
HABITS, OTHERS = "config/test_habits.py::", "config/test_habits.py::test_a_key_of_another_trainer_is_refused_with_ours"
PROMPT = {"messages": [{"role": "user", "content": "1+1?"}]}
GSM8K = {"question": "1+1?", "answer": "One and one make two.\n#### 2"}
CHOICES = {"question": "Which?", "answer": "B", "choices": {"A": "one", "B": "two"}}
ROWS: list[Row] = [
    Row(
        "`vold rl` with its output in a file, as under sbatch, nohup, tee, CI",
        "blocked",
        "what starts, a line a step with the time that is left, evaluations, what was written; `run_dir/log.txt`",
        "train/test_rl.py::test_a_finished_run_is_lengthened_with_smaller_microbatches_and_says_what_it_does",
    ),
    on_data(
        "GSM8K's file with the layout of another set (equal column names)",
        "silent",
        "refused: a gold answer that no response can match; the line names the setting that finds it",
        "data.answer_in",
        "vqa",
        GSM8K,
    ),
    Row("messages with an `images` column, SFT", "silent", "trains on the images", DATA_PAGE),
    Row("messages that begin with a system turn", "silent", "it stays in the prompt: turns have roles", DATA_PAGE),
    Row(
        "messages that end with the user, SFT",
        "silent",
        "refused: a prompt is no target",
        "data/test_members.py::test_what_is_no_target_is_refused",
    ),
    Row("messages of several turns, SFT", "silent", "all kept; `data.targets=all` trains each", DATA_PAGE),
    Row(
        "choices as `{A: one, B: two}`",
        "silent",
        "read by their letters",
        "data/test_members.py::test_options",
    ),
    Row(
        "a column that the layout does not know (`options`)",
        "silent",
        "refused where it holds options, else named by `vold check` as not read",
        "data/test_members.py::test_options_in_columns_that_nothing_reads_are_refused",
    ),
    Row("OPD on prompts without answers", "blocked", "trains", "train/test_without_golds.py::test_opd_trains_on_them"),
    on_data(
        "GRPO on prompts without answers",
        "blocked",
        "refused before a model is loaded",
        "no answer to grade by",
        "messages",
        PROMPT,
        overrides=("objective.preset=grpo",),
    ),
    Row(
        "`microbatch_tokens=512 --resume` after running out of memory",
        "blocked",
        "goes on; a line says what it changes",
        "train/test_rl.py::test_a_finished_run_is_lengthened_with_smaller_microbatches_and_says_what_it_does",
    ),
    Row(
        "`steps=6 --resume` of a run of 4",
        "blocked",
        "goes on; the finished model of step 4 stays as `model-step-4`",
        "train/test_rl.py::test_a_finished_run_is_lengthened_with_smaller_microbatches_and_says_what_it_does",
    ),
    Row(
        "Ctrl-C",
        "blocked",
        "the step is finished and saved, a line says how to go on; a second one ends it; without one a checkpoint "
        "every 10 steps (SFT: 100)",
        "faults/test_stops_and_locks.py::"
        "test_hangup_and_ctrl_c_save_and_a_second_ctrl_c_or_a_late_sigterm_ends_at_once",
    ),
    Row(
        "a refused start, a mended config, `vold check`",
        "time",
        "says what the run would do, for every state of run_dir",
        "run/test_run_dir.py::test_check_and_the_run_agree_on_every_run_dir",
    ),
    Row(
        "the recipe as printed on 8 GPUs",
        "blocked",
        "samples with vLLM in every stage",
        "docs/test_newcomer.py::test_every_recipe_samples_with_vllm",
    ),
    Row(
        "`student=Qwen/Qwen2.5-VL-3B-Instruct`",
        "time",
        "one line with the `hf download` to type",
        command=rl("student=Qwen/Qwen2.5-VL-3B-Instruct"),
        code=2,
        said="hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir",
    ),
    Row(
        "`data.path=openai/gsm8k`",
        "time",
        "read from the hub or its cache",
        "data/test_members.py::test_a_hub_id_that_is_not_here",
    ),
    on_data(
        "columns of TRL, verl, ShareGPT, Alpaca …",
        "time",
        "read with `data.columns` or their layout; else a line lists the columns that are there",
        "prompt, solution",
        "vqa",
        {"prompt": "1+1?", "solution": "2"},
    ),
    Row("base64, data URLs", "time", "read", "data/test_members.py::test_a_picture_in_any_form"),
    Row(
        "CSV, .jsonl.gz, save_to_disk, a folder",
        "looks",
        "read",
        "data/test_members.py::test_files_are_read_cell_by_cell",
    ),
    Row(
        "answers `(B)` and index 1",
        "time",
        "read; refused where they can mean two options",
        "data/test_members.py::test_an_answer_by_letter_text_or_index",
    ),
    Row("a list of answers", "looks", "any of them", "data/test_members.py::test_several_right_answers"),
    key("`lora.rank=16`", "lora.rank=16", "it is adapter={rank: 16, alpha: 32}"),
    key("`gradient_checkpointing=true`", "gradient_checkpointing=true", "it is parallel.recompute=selective or full"),
    key("`epochs=3`", "epochs=3", "a run has steps"),
    key("`optimizer.learning_rate=1e-5`", "optimizer.learning_rate=1e-5", "it is optimizer.lr"),
    key("`step=10`", "step=10", "did you mean steps?", "fine"),
    Row("`dtype=bf16`", "looks", "read", HABITS + "test_short_values_are_read"),
    Row("`loggers=wandb`", "time", "read", HABITS + "test_short_values_are_read"),
    Row(
        "a tracker that is not installed",
        "fine",
        "a line; the run goes on",
        "run/test_loggers.py::test_a_logger_that_is_not_installed_says_what_to_install",
    ),
    Row(
        "wandb's project, entity, group, name",
        "time",
        "`tracking: {project, entity, group, name, tags}`",
        command=("keys", "tracking"),
        said="tracking.entity",
    ),
    Row(
        "`reward.function=my.py:score`",
        "blocked",
        "your functions, in processes that can be killed",
        "train/test_own_rewards.py::test_functions_and_a_judge_in_a_run_that_is_resumed",
    ),
    Row("from Python", "time", "the README's ten lines", "docs/test_commands.py::test_python_runs"),
    Row(
        "`vold.grading.equal(a, b)` in an `if`",
        "time",
        "true where they are equal",
        "grading/test_grading_cases.py::test_equal_is_its_truth_value_in_an_if",
    ),
    Row("a Llama student", "time", "trains", "models/test_families.py"),
    Row(
        "`rollout.engine=vllm` without vLLM",
        "time",
        "a line with the pip command that works",
        command=rl("rollout.engine=vllm"),
        code=2,
        said="pip install -c constraints-vllm.txt -e '.[vllm]'",
    ),
    Row(
        "pictures, and a chat template that leaves them out",
        "looks",
        "one line: `prompt.chat_template`",
        "train/test_images.py::test_a_template_that_leaves_images_out_is_named",
    ),
    Row(
        "`optimizer.schedule=step`",
        "fine",
        "one line with the values",
        command=rl("optimizer.schedule=step"),
        code=2,
        said="'cosine'",
    ),
    Row(
        "`objective.preset=ppo`, a layout's typo, no teacher",
        "fine",
        "one line each ([bad-input.md](bad-input.md))",
        command=rl("objective.preset=ppo"),
        code=2,
        said="choose one of grpo, vold",
    ),
    Row("`-h`, `--version`", "looks", "both", command=("--version",), said="vold 0."),
    Row("`vold rl --help`", "time", "names the main keys; `vold keys` all", command=("rl", "--help"), said="vold keys"),
    Row(
        "rows of several images, bytes in Parquet, absolute paths",
        "fine",
        "as before",
        "data/test_members.py::test_parquet_as_the_hub_keeps_it",
    ),
    Row(
        "`vold profile`: an MFU of 673 %",
        "looks",
        "the head's work counts where it is done, and only on tokens that have a target",
        "commands/test_profile.py::test_a_fused_head_works_in_the_forward_phase",
    ),
    Row(
        "`run_dir/model` in transformers",
        "fine",
        "as before",
        "models/test_checkpoint_dir.py::test_from_pretrained_of_the_export_gives_the_trained_logits",
    ),
    Row("pushing to the hub", "looks", "[recipe.md](recipe.md#afterwards) says how", "docs/test_pages.py::test_links"),
    Row(
        "training some layers alone",
        "looks",
        "`train: [patterns]`",
        "trainer/test_selection.py::test_what_is_not_named_keeps_every_bit_and_has_no_state",
    ),
    Row(
        "`vold plan`: does it fit, and how long for all steps?",
        "fine",
        "a line `fits` and the total",
        "planning/test_plan.py::test_the_papers_stage_2_fits_four_a100s_of_80_gb",
    ),
    Row("`vold check`", "fine", "as before, and which columns are read", "planning/test_check_lines.py"),
]


def outcomes() -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each row that has a command."""
    found = []
    for row in ROWS:
        if row.command:
            row.prepare()
            found.append(run(list(row.command)))
    return found
