"""Bugs that public trainers had, and the tests that would see them here. A name that no test has any more fails.

Threads are `project#number` on GitHub. What no other file tests is tested below the table; rewards have a file of their
own, tests/grading/test_public_faults.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from PIL import Image

from vold.config.schema import PromptConfig
from vold.data.packing import pack
from vold.data.problems import Problem
from vold.data.prompts import build_prompt
from vold.models.architecture import Architecture
from vold.models.images import ImageProcessor, load_prompt_encoder
from vold.models.tokenizer import check_vocabularies, load_tokenizer
from vold.objectives import assign_sft_weights
from vold.rollout.sampling_vocabulary import SamplingVocabulary
from vold.rollout.vllm.engines import Request, sized_images, vllm_prompt
from vold.types import Sample

ROOT = Path(__file__).parents[1]

# What went wrong -> (where, which tests would see it).
THREADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sampler and trainer disagree on log-probs": (
        "verl#2953 #3694 #4070, TRL#3867 #4493 #4530, open-instruct#1051, ms-swift#6235, xtuner#1197",
        (
            "train/test_rl.py::test_sampler_and_trainer_agree_at_another_temperature",
            "rollout/test_parity_probe.py::test_stale_weights_raise_the_alarm",
            "trainer/test_step.py::test_stale_rollouts_are_weighted_as_the_formula_on_materialised_logits",
            "rollout/test_decode.py::test_recorded_logprobs_are_the_models",
            "vllm/test_sampler.py::test_logprobs_are_those_of_the_sampling_temperature",
        ),
    ),
    "responses are decoded and tokenised again": (
        "TRL#5224, SkyRL#123, slime#117, ms-swift#10012, sglang#26555, NeMo-Gym#1416",
        (
            "test_public_threads.py::test_trl_5224_ids_that_text_does_not_bring_back",
            "test_public_threads.py::test_trl_5224_nobody_else_tokenises",
            "data/test_traces.py::test_sft_reads_them_as_they_are",
        ),
    ),
    "image placeholders are expanded twice": (
        "TRL#6718",
        (
            "test_public_threads.py::test_trl_6718_the_engine_gets_one_pad_an_image",
            "models/test_positions.py::test_pads_that_do_not_fit_the_images_are_an_error",
            "vllm/test_sampler.py::test_weights_arrive_again_and_again",
        ),
    ),
    "the teacher scores other tokens than were sampled": (
        "Relax#69, strands-sglang#33, verl#7844, prime-rl#2245",
        (
            "teacher/test_vllm_teacher.py::test_response_positions_only_in_order",
            "teacher/test_vllm_teacher.py::test_a_failed_call_is_none_and_the_others_are_scored",
            "train/test_rollout_schedule.py::test_a_failed_teacher_call_masks_its_response",
            "rollout/test_remote_engines.py::test_a_fault_is_named_and_the_other_engine_takes_over",
            "commands/test_serve.py::test_the_teacher_of_an_rl_config_has_room_to_score",
        ),
    ),
    "positions of packed or padded sequences": (
        "AReaL#217, transformers#40490 #40136 #40154 #45381, lerobot#3648",
        (
            "models/test_language_model.py::test_packed_equals_unpacked",
            "models/test_language_model.py::test_logits_of_a_packing_equal_transformers_row_by_row",
            "models/test_positions.py::test_positions_of_two_images_equal_transformers",
            "trainer/test_vision_training.py::test_logprobs_and_gradients_equal_transformers",
        ),
    ),
    "ends, truncation and masks": (
        "TRL#2708 #3248 #4970 #4976 #6369 #6439 #7039, ms-swift#6618, MemGen#33, torchtune#2967",
        (
            "trainer/test_step.py::test_masks_come_from_lengths_not_from_values",
            "test_public_threads.py::test_trl_7039_every_end_of_the_generation_config_ends",
            "grading/test_public_faults.py::test_trl_6439_a_truncated_response_is_wrong_even_if_its_answer_is_right",
        ),
    ),
    "how a batch is split moves its gradient": (
        "TRL#3021 #3231 #5619 #6024, ms-swift#10117, open-instruct#1137",
        (
            "trainer/test_step.py::test_gradient_is_invariant_to_the_micro_batch_split",
            "trainer/test_step.py::test_samples_without_gradient_are_left_out_exactly",
            "train/test_rl.py::test_a_stage_gives_the_same_numbers_at_every_layout",
            "benchmarks/test_parity.py::test_layouts_equal_one_process_and_transformers",
        ),
    ),
    "vocabularies and heads of different sizes": (
        "TRL#2215 #3028 #6252, torchtune#2119 #2502, LMOps#331, Model-Optimizer#2489, aprender#1877",
        (
            "models/test_model_tokenizer.py::test_a_vocabulary_larger_than_a_head_names_both_heads",
            "kernels/test_linear_policy_loss.py::test_padded_rows_of_the_vocabulary_are_minus_infinity",
            "kernels/test_linear_kl.py::test_ids_that_are_not_shared_are_minus_infinity",
            "kernels/test_kernel_parallel.py::test_every_shard_count_equals_the_specification",
        ),
    ),
    "one id, two meanings": (
        "DeepSeek-R1#30, Soup#681, slime#2032, rllm#356, tinker-cookbook#304",
        (
            "models/test_model_tokenizer.py::test_the_real_pair_is_refused_with_the_missing_tokens_their_ids_and_the_fix",
            "models/test_model_tokenizer.py::test_differing_vocabularies_are_refused",
            "test_public_threads.py::test_deepseek_r1_30_vision_ids_that_think",
        ),
    ),
    "a seeing teacher reads the student's image tokens": (
        "patch sizes differ between Qwen2.5-VL and Qwen3-VL",
        (
            "train/test_images.py::test_scores_are_those_of_the_teachers_own_prompts",
            "trainer/test_vision_training.py::test_a_teacher_reads_its_own_prompts",
        ),
    ),
    "rewards that a response can talk into": (
        "Visual-RFT#176",
        (
            "grading/test_public_faults.py::test_visual_rft_176_an_empty_answer_is_in_no_gold",
            "grading/test_public_faults.py::test_visual_rft_176_part_of_the_gold_is_not_the_gold",
            "grading/test_grading_cases.py::test_case",
        ),
    ),
    "a grader that hangs": (
        "Math-Verify#50 #55 #65, verl#5635 #5839, open-r1#420, simpleRL#95, rllm#433, Reasoning360#109, cookbook#438, "
        "monarch#4795, AReaL#1426, NeMo-Gym#1354, UniRL#462",
        (
            "grading/test_public_faults.py::test_math_verify_50_55_65_hangs_leave_later_answers_right",
            "grading/test_public_faults.py::test_verl_5839_grading_works_off_the_main_thread",
            "grading/test_public_faults.py::test_fireworks_cookbook_438_the_trainers_own_alarm_is_left_alone",
            "grading/test_grading_pool.py::test_two_bad_answers_do_not_poison_two_workers",
        ),
    ),
    "a resumed run draws or reads other things": (
        "ms-swift#9935, transformers#46628, open-instruct#1523, bionemo#1250, Megatron-Bridge#5593",
        (
            "train/test_rl.py::test_resumed_run_equals_the_uninterrupted_one_bit_for_bit",
            "trainer/test_checkpoint.py::test_a_resumed_trainer_goes_on_bit_for_bit",
            "data/test_pack_and_order.py::test_each_epoch_sees_every_row_once_across_its_edge",
            "trainer/test_reshard.py::test_a_chain_of_layouts",
        ),
    ),
    "a checkpoint that is announced too early, or removed too early": (
        "torchtitan#930, Megatron-Bridge#3267, verl#4253 #4638, Megatron-LM#1763, Cosmos-RL#756",
        (
            "trainer/test_checkpoint.py::test_the_newest_are_kept_and_only_a_commit_removes",
            "trainer/test_checkpoint.py::test_an_asynchronous_save_is_of_the_moment_it_was_asked_for",
            "trainer/test_checkpoint.py::test_a_failed_background_write_is_heard_at_the_next_step",
            "trainer/test_checkpoint.py::test_a_garbage_pointer_is_refused",
            "faults/test_save_boundaries.py::test_killed_at_every_boundary",
        ),
    ),
    "an engine or a rollout that never comes back": (
        "verl#7155, SkyRL#284, vLLM#16259",
        (
            "rollout/test_vllm_sampler.py::test_a_lost_group_is_named_and_left_out",
            "rollout/test_remote_engines.py::test_an_engine_started_again_gets_its_weights_before_it_is_used",
            "train/test_rollout_schedule.py::test_a_lost_group_is_dropped_whole_and_counted",
            "train/test_rollout_schedule.py::test_a_group_is_never_half",
        ),
    ),
    "weights that do not reach the sampler": (
        "tied heads that are not sent; caches that remember the old weights",
        (
            "models/test_weights.py::test_load_then_export_is_bit_equal_and_complete",
            "rollout/test_remote_engines.py::test_weights_are_written_in_parts_and_caches_emptied",
        ),
    ),
    "a recurrent state that runs on into the next sequence of a packing": (
        "transformers' Qwen3.5 and Qwen3-Next without flash-linear-attention, which ignore cu_seq_lens",
        (
            "models/test_packed_recurrence.py"
            "::test_packed_log_probs_are_transformers_one_by_one_and_its_own_packed_ones_are_not",
            "models/test_delta_rule.py::test_a_shared_prompt_is_a_run_that_its_responses_go_on_from",
        ),
    ),
    "a frozen tower that trains, a teacher that teaches nothing, a gradient that is no number": (
        "flags that are read by nobody; clip_grad_norm_ lets NaN through",
        (
            "trainer/test_vision_training.py::test_what_is_frozen_keeps_every_bit_and_everything_else_moves",
            "trainer/test_step.py::test_gradient_depends_on_the_teacher",
            "trainer/test_step.py::test_a_non_finite_gradient_changes_nothing_and_stops_after_several",
            "faults/test_ranks_that_fail.py::test_not_a_number_on_one_rank_changes_nothing_anywhere",
        ),
    ),
}


@pytest.mark.parametrize("bug", THREADS)
def test_it_has_its_tests(bug):
    threads, tests = THREADS[bug]
    assert threads and tests
    for test in tests:
        file, _, name = test.partition(".py::")
        defined = ast.walk(ast.parse((ROOT / "tests" / f"{file}.py").read_text()))
        assert name in {node.name for node in defined if isinstance(node, ast.FunctionDef)}, test


# -- what no other file tests --------------------------------------------------------------------------------------


def test_trl_5224_ids_that_text_does_not_bring_back(tiny_student_dir):
    """A response may spell its text as no tokenizer would; what is trained are its ids all the same."""
    vocabulary = SamplingVocabulary.from_checkpoint(tiny_student_dir)
    tokenizer = vocabulary.tokenizer
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = (*tokenizer.convert_tokens_to_ids(["7", "*"]), pad, tokenizer.convert_tokens_to_ids("6"), eos)
    prompt = build_prompt(Problem("p", "[7*6]"), tokenizer, PromptConfig(suffix=""))
    rollout = vocabulary.make_rollout(prompt, ids, [-0.1] * len(ids), version=0)
    assert tokenizer(rollout.text, add_special_tokens=False)["input_ids"] != rollout.response_ids[:-1].tolist()
    assert tuple(rollout.response_ids) == ids
    sample = Sample(prompt, rollout.response_ids, advantage=0.0, pg_weight=0.0, kl_weight=0.0)
    (micro,) = pack(assign_sft_weights([sample]), max_tokens=64).micro_batches
    assert tuple(micro.target_N.tolist()) == ids


TOKENISERS = {
    "vold/data/prompts.py": 1,  # prompts
    "vold/data/responses.py": 2,  # SFT sets that are text, and the end of a turn
    "vold/models/tokenizer.py": 2,  # the spelling of tokens a student lacks; texts that a pair must read alike
    "vold/selfplay/embedders.py": 1,  # an encoder's own reading
    "vold/selfplay/questions.py": 1,  # posed questions, which become prompts
}


def test_trl_5224_nobody_else_tokenises():
    """Places where text becomes ids; a response is at none of them."""
    found = {}
    for path in sorted((ROOT / "vold").rglob("*.py")):
        if "miniature" not in path.parts:
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            if places := sum(map(tokenises, calls)):
                found[str(path.relative_to(ROOT))] = places
    assert found == TOKENISERS


def tokenises(call: ast.Call) -> bool:
    called = ast.unparse(call.func)
    names = ("tokenizer", "_tokenizer", "student")
    return called.split(".")[-1] in names or any(called.endswith(f"{name}.encode") for name in names)


def test_trl_6718_the_engine_gets_one_pad_an_image(tiny_student_dir, tmp_path):
    """And the trainer as many as its grid says: the sampler expands what it is sent by itself."""
    path = tmp_path / "image.png"
    Image.new("RGB", (64, 32)).save(path)
    tokenizer, encode = load_tokenizer(tiny_student_dir), load_prompt_encoder(tiny_student_dir)
    prompt = build_prompt(Problem("p", "[<image>]", images=(path,)), tokenizer, PromptConfig(suffix=""))
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    request = vllm_prompt(
        Request(prompt.token_ids.tolist(), sized_images(prompt, ImageProcessor(tiny_student_dir)), {})
    )
    assert request["prompt_token_ids"].count(pad) == len(request["multi_modal_data"]["image"]) == 1
    encoded = encode(prompt)
    (picture,) = encoded.pictures
    frames, height, width = picture.grid_thw
    merged = frames * height * width // Architecture.from_pretrained(tiny_student_dir).vision.merge_size ** 2
    assert encoded.prompt_ids.tolist().count(pad) == merged > 1


def test_trl_7039_every_end_of_the_generation_config_ends(tiny_student_dir):
    """Qwen3 has two; the first that comes ends the response, and one that was cut off gets none."""
    vocabulary = SamplingVocabulary.from_checkpoint(tiny_student_dir)
    one, other, plain = vocabulary.stop_ids[0], 3, 9
    both = SamplingVocabulary(vocabulary.size, vocabulary.banned_ids, (one, other), vocabulary.tokenizer)
    prompt = build_prompt(Problem("p", "[7]"), vocabulary.tokenizer, PromptConfig(suffix=""))
    for end in (one, other):
        ended = both.make_rollout(prompt, (plain, end, plain, one), [-0.1] * 4, version=0)
        assert (tuple(ended.response_ids), ended.finish_reason) == ((plain, end), "stop")
    cut = both.make_rollout(prompt, (plain, plain), [-0.1] * 2, version=0)
    assert (tuple(cut.response_ids), cut.finish_reason) == ((plain, plain), "length")


def test_deepseek_r1_30_vision_ids_that_think():
    """R1's distilled Qwen models call 151648 <think>, where a Qwen2.5-VL begins a box."""
    student = {"a": 0, "<|box_start|>": 1, "<|box_end|>": 2}
    with pytest.raises(
        ValueError, match=r"lacks '<\|box_start\|>' \(id 1\), '<\|box_end\|>' \(id 2\).*choose a teacher"
    ):
        check_vocabularies(student, {"a": 0, "<think>": 1, "</think>": 2}, "student", "r1")
