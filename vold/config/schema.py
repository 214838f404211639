"""Every key a YAML may hold, its type, its default, its unit. The only place with defaults.

Functions receive the sub-config they use, never the root.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Url = Annotated[str, Field(pattern=r"^https?://[^/]+$")]


class Strict(BaseModel):
    """Frozen; an unknown key or a wrong type is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ParallelConfig(Strict):
    """How one model copy is divided, student and teacher alike; the rest of the world is data parallel."""

    tp: Positive = 1  # ranks that share each layer
    pp: Positive = 1  # consecutive stages of layers
    vpp: Annotated[int, Field(ge=2)] | None = None  # interleaved stages a rank holds
    sp: bool = False  # norms and residuals divided over the tp ranks too
    distributed_optimizer: bool = False  # fp32 masters and Adam's moments divided over the data-parallel ranks
    recompute: Literal["none", "selective", "full"] = "none"  # what backward computes again: nothing, MLPs, layers


class DataConfig(Strict):
    """A file of problems or traces. `layout` names the public data set whose schema it follows (see vold.data)."""

    path: Path
    layout: Literal[
        "orz",
        "orz-eval",
        "gsm8k",
        "geometry3k",
        "virl39k",
        "vlaa",
        "vqa",
        "vlmevalkit",
        "messages",
        "prompt-response",
        "traces",
    ]
    image_root: Path | None = None  # images must lie below; the file's own folder when absent
    on_error: Literal["stop", "skip"] = "stop"
    shuffle: bool = True  # false: training reads the rows in the file's order, epoch after epoch
    limit: Positive | None = None  # first rows only


class PromptConfig(Strict):
    """How a problem becomes a chat: [system] user(problem + suffix), rendered by the tokenizer's own template."""

    system: str | None = None
    suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    max_tokens: Positive = 2048


class SamplingConfig(Strict):
    """temperature 0 is greedy; top_k 0 is off."""

    max_new_tokens: Positive
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegative = 0
    sequences_per_call: Positive = 256  # how many responses are generated side by side


class VllmConfig(Strict):
    """vLLM's own settings, where `engine: vllm`: an engine inside each process, or those that `vold serve` started."""

    urls: tuple[Url, ...] = ()  # http://host:port of each engine; empty: inside the process
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 8.0  # an engine's memory for keys and values
    max_model_len: Positive | None = None  # prompt, image and response tokens; the model's own limit when absent
    enforce_eager: bool = False  # no CUDA graphs: less memory, slower decoding
    sleep: bool = False  # inside the process: no GPU memory is held between calls, the weights wait on the host
    # how new weights reach `urls`; nccl is gloo without GPUs. auto: nccl from GPUs to other machines, else files
    transport: Literal["auto", "files", "nccl"] = "auto"
    weights_dir: Path = Path("/dev/shm")  # where new weights lie until every engine of `urls` has read them
    timeout: Annotated[float, Field(gt=0.0)] = 1800.0  # seconds an engine of `urls` may take for one request
    retries: NonNegative = 2  # how often a request that failed is sent to another engine
    restart_seconds: Annotated[float, Field(ge=0.0)] = 120.0  # how long to wait for one when none of `urls` answers

    @model_validator(mode="after")
    def _who_sleeps(self):
        if self.sleep and self.urls:
            raise ValueError("vllm.sleep = true is for an engine inside the process; leave it out beside vllm.urls")
        return self


class EngineConfig(Strict):
    """Which engine samples."""

    engine: Literal["transformers", "vllm"] = "transformers"
    vllm: VllmConfig = VllmConfig()

    @property
    def batches_by_itself(self) -> bool:
        """As it has room: portions of what is asked would only let it run dry at their ends."""
        return self.engine == "vllm"


class DynamicSamplingConfig(Strict):
    """DAPO's: groups that the objective learns nothing from are dropped, and further prompts asked in their place."""

    max_prompts_factor: Annotated[float, Field(ge=1.0)] = 3.0  # prompts a step may ask, in units of prompts_per_step


class CurriculumConfig(Strict):
    """A prompt whose last pass rate lay outside is passed over when it comes up next, and asked the time after."""

    lowest: Share = 0.0
    highest: Share = 1.0


class RolloutConfig(SamplingConfig, EngineConfig):
    """Stage 2's sampler: G responses a prompt."""

    responses_per_prompt: Annotated[int, Field(ge=1)] = 5
    # 1: a step's rollouts are drawn while the step before trains, with weights one update old. Weights are handed over
    # only when nothing is being drawn, so that a larger lag would make rollouts older and overlap no more.
    lag: Annotated[int, Field(ge=0, le=1)] = 0
    importance_cap: Annotated[float, Field(gt=0.0)] = (
        2.0  # of each token's importance weight, where lag > 0 or minibatches > 1
    )
    dynamic_sampling: DynamicSamplingConfig | None = None
    curriculum: CurriculumConfig | None = None

    @model_validator(mode="after")
    def _rollouts_are_sampled(self):
        if self.temperature == 0.0:
            raise ValueError("rollout.temperature = 0 gives identical responses; use a value > 0")
        return self


class ObjectiveConfig(Strict):
    """A preset of vold.objectives, what is changed of it; an absent key is the preset's own (docs/methods.md).
    VOLD's beta: the paper's table 4 says 1e-3, which is the preset's, its text 0.1."""

    preset: str = "vold"
    advantage: str | None = None  # group-normalised | smoothed | mean-centred | none
    ratio: str | None = None  # token | sequence | adaptive
    routing: str | None = None  # nowhere | every | failed | failed-groups
    normaliser: str | None = None  # tokens | sequences | constant
    divergence: Literal["k1", "k2", "k3", "reverse_kl", "forward_kl", "jsd"] | None = (
        None  # k1, k3: refused, with the reason
    )
    top_k: Positive | None = None  # of reverse_kl, forward_kl and jsd: the student's likeliest ids, all others as one
    beta: Annotated[float, Field(ge=0.0)] | None = None
    beta_end: Annotated[float, Field(ge=0.0)] | None = None  # linear: from beta to beta_end, beta_step a step
    beta_step: Annotated[float, Field(gt=0.0)] | None = None
    target_kl: Annotated[float, Field(gt=0.0)] | None = None  # automatic: kl_teacher, in nats a token, is held here
    clip_eps_low: Share | None = None
    clip_eps_high: Annotated[float, Field(ge=0.0)] | None = None
    kl_clamp: Annotated[float, Field(gt=0.0)] | None = None  # nats of |logp - logp_teacher| that a token is pulled for
    entropy_bonus: float | None = None
    average_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None  # a step's, of the average that teaches (SDPO)
    feedback: bool | None = None  # a self-teacher is told what the grader found wrong with a failed response
    overlong_share: Share | None = None  # last part of the budget over which the penalty grows; 0: none
    overlong_penalty: Annotated[float, Field(gt=0.0)] = 0.5  # at its end; rewards lie in [0, 1]

    visual_advantage: bool | None = (
        None  # VA-OPD: KL weighs most where the teacher's opinion hangs on an image's detail
    )

    @model_validator(mode="after")
    def _one_schedule(self):
        if (self.beta_end is None) != (self.beta_step is None):
            raise ValueError("objective.beta_end and objective.beta_step belong together; give both or neither")
        if self.target_kl is not None and self.beta_end is not None:
            raise ValueError("objective.target_kl and objective.beta_end both steer beta; leave one out")
        return self


class RewardConfig(Strict):
    """accuracy x (the answer is right) + format x (<think>...</think>, then a boxed answer). VOLD: 1 and 0; EasyR1: .9
    and .1; VLM-R1, which adds the two up: .5 and .5. Routing looks at the answer alone."""

    accuracy: Share = 1.0
    format: Share = 0.0

    @model_validator(mode="after")
    def _adds_up_to_one(self):
        if abs(self.accuracy + self.format - 1.0) > 1e-6 or not self.accuracy:
            found = f"reward.accuracy = {self.accuracy} and reward.format = {self.format}"
            raise ValueError(f"{found} must add up to 1, the first above 0")
        return self


class OptimizerConfig(Strict):
    """AdamW, linear warm-up, then `schedule` down to lr * min_lr_ratio."""

    lr: Annotated[float, Field(gt=0.0)]
    warmup_steps: NonNegative = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: Share = 0.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    clip_grad: Annotated[float, Field(gt=0.0)] = 1.0
    max_bad_steps: Positive = 3  # in a row, non-finite or with nothing to learn from, each skipped on every rank


class VisionConfig(Strict):
    """A student that sees. The blocks of its vision tower stay frozen."""

    train_merger: bool = False  # train what turns patches into tokens (with Qwen3-VL's DeepStack mergers)
    patches_per_pass: Positive = 16384  # image patches the tower looks at side by side


class EvaluationConfig(Strict):
    """Named problem sets, answered greedily unless said otherwise."""

    sets: dict[str, DataConfig] = {}
    every: NonNegative = 0  # steps; 0: never during training
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=2048, temperature=0.0)
    responses_per_problem: Positive = 1  # k of avg@k and maj@k
    best: str | None = None  # a set: the checkpoint with the highest accuracy on it stays too; vold export step=best

    @model_validator(mode="after")
    def _best_is_evaluated(self):
        if self.best is not None and self.best not in self.sets:
            raise ValueError(
                f"evaluation.best = {self.best!r} is none of evaluation.sets: {', '.join(self.sets) or 'empty'}"
            )
        if self.best is not None and not self.every:
            raise ValueError(f"evaluation.best = {self.best!r} compares steps; set evaluation.every > 0, or best=null")
        return self

    @model_validator(mode="after")
    def _several_answers_are_sampled(self):
        if self.responses_per_problem > 1 and self.sampling.temperature == 0.0:
            raise ValueError(
                f"evaluation.responses_per_problem = {self.responses_per_problem} greedy answers are all the same; set "
                "evaluation.sampling.temperature > 0, or responses_per_problem=1"
            )
        return self


class RunConfig(Strict):
    """What every verb that writes a run directory has."""

    run_dir: Path
    seed: NonNegative = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    parallel: ParallelConfig = ParallelConfig()
    timeout_seconds: Positive = 1800  # a rank that makes the others wait longer ends the job, and is named
    prompt: PromptConfig = PromptConfig()
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # besides metrics.jsonl


class TrainConfig(RunConfig):
    """Common to both stages."""

    student: Path
    data: DataConfig
    optimizer: OptimizerConfig
    vision: VisionConfig = VisionConfig()
    steps: Positive
    microbatch_tokens: Positive = 16384  # packed tokens of one forward/backward pass
    save_every: NonNegative = 0  # steps; the last step is always saved
    save_async: bool = False  # train on while a checkpoint is written; its state is held in host memory meanwhile
    keep_checkpoints: Positive = 2
    parity_limit: Annotated[float, Field(gt=1.0)] = 1.05  # mean exp|logp sampler - logp trainer| after a weight sync
    evaluation: EvaluationConfig = EvaluationConfig()


class TracesConfig(RunConfig, EngineConfig):
    """Stage 0: the teacher answers; answers are not checked (paper section 4.1)."""

    teacher: Path
    data: DataConfig
    sampling: SamplingConfig
    max_tokens: Positive = 8192  # prompt + response; longer or truncated traces are dropped
    prompts_per_shard: Positive = 512


class SftConfig(TrainConfig):
    """Stage 1: maximum likelihood on traces."""

    batch_size: Positive = 256  # sequences a step, over all ranks
    max_tokens: Positive = 8192
    pair_with: Path | None = None  # teacher whose tokenizer the student must share


class SelfTeacherConfig(Strict):
    """What a self-teacher (SDPO, SRPO) reads instead of the problem. A section is there where it has something to show:
    a correct sibling's answer; and, with objective.feedback, what the grader found wrong with the response."""

    template: str = "{problem}{demonstration}{feedback}\n\nSolve the problem correctly."
    demonstration: str = "\n\nA correct solution of this problem:\n\n{demonstration}"
    feedback: str = "\n\nYour earlier attempt failed:\n\n{feedback}"

    @model_validator(mode="after")
    def _nothing_is_lost(self):
        for name in ("problem", "demonstration", "feedback"):
            if f"{{{name}}}" not in self.template:
                raise ValueError(
                    f"self_teacher.template = {self.template!r} lacks {{{name}}}; put it in (a section that is not "
                    "wanted may be empty: self_teacher.feedback='')"
                )
        return self


class RlConfig(TrainConfig):
    """Stage 2: rollouts used twice."""

    teacher: Path | None = None  # needed when the objective has a KL term
    teacher_engine: Literal["trainer", "vllm"] = "trainer"  # vllm: asked for each group as it is done
    teacher_vllm: VllmConfig = VllmConfig()  # its engine's settings
    teacher_offload: bool = False  # its weights wait in CPU memory while it does not score (in the trainer)
    prompts_per_step: Positive = 256  # over all ranks
    self_teacher: SelfTeacherConfig = SelfTeacherConfig()
    minibatches: Positive = 1  # updates that a step's prompts are divided among; at 1 no ratio is clipped
    rollout: RolloutConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    reward: RewardConfig = RewardConfig()
    samples_per_step: NonNegative = 8  # responses shown in samples.jsonl each step
    # steps; 0: never. Two forward passes tell what the student's log-probs owe to an image's detail (image_sensitivity)
    image_sensitivity_every: NonNegative = 0
    grader_workers: Positive = 2

    @model_validator(mode="after")
    def _a_prompt_for_each_minibatch(self):
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"minibatches = {self.minibatches} exceeds prompts_per_step = {self.prompts_per_step}; lower it"
            )
        return self


class VlmevalkitConfig(Strict):
    """How VLMEvalKit is asked; pixels are its own numbers for Qwen2.5-VL."""

    judge: Literal["rule", "model"] = "rule"  # model: the kit's default language model, by OPENAI_API_KEY
    min_pixels: Positive = 1280 * 28 * 28
    max_pixels: Positive = 16384 * 28 * 28
    max_new_tokens: Annotated[int, Field(ge=8192)] = 8192  # reasoning that is cut off has no answer


class PoseConfig(Strict):
    """How the challenger is asked for a question, and what of its response is one (R-Zero)."""

    request: str = (
        "Write one new, challenging mathematics problem that has a single answer. Put the problem, and nothing else, "
        "between <question> and </question>."
    )  # the user's message
    system: str | None = None
    pattern: str = r"<question>\s*(.+?)\s*</question>"  # regular expression; its last match's group 1 is the question
    candidates: Positive = 8000  # responses drawn of the trained challenger, over all ranks
    repetition_weight: Annotated[float, Field(ge=0.0)] = 1.0  # of |cluster| / B in the challenger's reward
    cluster_distance: Annotated[float, Field(gt=0.0)] = 0.5  # questions of a step that are nearer are one cluster

    @model_validator(mode="after")
    def _pattern_has_a_group(self):
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pose.pattern = {self.pattern!r} is no regular expression: {error}") from None
        if groups < 1:
            raise ValueError(f"pose.pattern = {self.pattern!r} has no group; put the question's part in (...)")
        return self


class AnswersConfig(Strict):
    """How often the solver answers a posed question, and how many answers must agree for it to be trained on."""

    responses: Annotated[int, Field(ge=2)] = 10
    lowest: NonNegative = 3
    highest: Positive = 7

    @model_validator(mode="after")
    def _range(self):
        if not self.lowest <= self.highest <= self.responses:
            raise ValueError(
                f"answers.lowest = {self.lowest}, highest = {self.highest}, responses = {self.responses}: must ascend"
            )
        return self


class MemoryConfig(Strict):
    """R-Diverse's MAP: questions like those in the bank are worth less, and the solver sees old ones again."""

    weight: Annotated[float, Field(ge=0.0)] = 1.0  # of P in the challenger's reward
    gamma: Share = 0.5  # share of the nearest question's term in P; the rest is the mean's
    nearest_allowed: float = 0.5  # cosine
    mean_allowed: float = 0.25  # cosine
    replay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.3  # share of each solver batch, once the bank holds any


class CoderConfig(EngineConfig):
    """R-Diverse's SAM: questions are compared by the code that solves them, greedily written."""

    checkpoint: Path
    request: str = (
        "Write a Python program that solves the following problem. Give only the code, in one block.\n\n{question}"
    )
    max_new_tokens: Positive = 1024
    sequences_per_call: Positive = 256


class SelfplayPhaseConfig(Strict):
    """How challenger or solver is trained in each iteration: keys of RlConfig."""

    optimizer: OptimizerConfig
    steps: Positive
    prompts_per_step: Positive
    rollout: RolloutConfig
    objective: ObjectiveConfig = ObjectiveConfig(preset="grpo")
    save_every: NonNegative = 0


class SelfplayConfig(RunConfig):
    """Challenger and solver train each other from one checkpoint, with no data and no teacher (R-Zero, R-Diverse)."""

    student: Path  # where both begin
    iterations: Positive = 5
    pose: PoseConfig = PoseConfig()
    answers: AnswersConfig = AnswersConfig()
    memory: MemoryConfig | None = None  # MAP; needs an embedder
    embedder: Path | None = None  # an encoder's directory: of questions, or of their code
    coder: CoderConfig | None = None  # SAM; needs an embedder
    challenger: SelfplayPhaseConfig
    solver: SelfplayPhaseConfig
    microbatch_tokens: Positive = 16384
    evaluation: EvaluationConfig = EvaluationConfig()  # of the solver, at the end of each iteration
    samples_per_step: NonNegative = 8
    grader_workers: Positive = 2

    @model_validator(mode="after")
    def _embedder_is_there(self):
        if self.embedder is None and (self.memory or self.coder):
            wanting = "memory" if self.memory else "coder"
            raise ValueError(f"{wanting} compares embeddings and embedder is not set; set embedder: PATH")
        return self

    @model_validator(mode="after")
    def _rollouts_fit(self):
        for name, phase in (("challenger", self.challenger), ("solver", self.solver)):
            if phase.rollout.vllm.urls:
                raise ValueError(
                    f"{name}.rollout.vllm.urls names engines that hold one checkpoint, and self-play asks several: "
                    "leave it out, engines then live inside the process"
                )
            longest = self.prompt.max_tokens + phase.rollout.max_new_tokens
            if longest > self.microbatch_tokens:
                raise ValueError(
                    f"microbatch_tokens = {self.microbatch_tokens} cannot hold prompt.max_tokens + "
                    f"{name}.rollout.max_new_tokens = {longest}; raise it or lower those"
                )
        if self.challenger.rollout.dynamic_sampling or self.challenger.rollout.curriculum:
            raise ValueError(
                "challenger.rollout.dynamic_sampling and curriculum look at rewards before the step's questions are "
                "compared; leave them out (the solver may have them)"
            )
        return self


class EvalConfig(RunConfig, EngineConfig):
    """Accuracy of one checkpoint directory on the evaluation sets."""

    checkpoint: Path
    evaluation: EvaluationConfig = EvaluationConfig()
    vlmevalkit: VlmevalkitConfig = VlmevalkitConfig()
    grader_workers: Positive = 2


class ExportConfig(Strict):
    """A training run's checkpoint as a directory that from_pretrained and vLLM load."""

    run: Path
    out: Path
    step: Positive | Literal["best"] | None = None  # the latest when absent; best: see evaluation.best
