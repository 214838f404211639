"""The stages: teacher traces, SFT, RL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from vold.config.schema.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Share, Strict
from vold.config.schema.data import DataConfig
from vold.config.schema.evaluation import EvaluationConfig
from vold.config.schema.objective import ObjectiveConfig, SelfTeacherConfig, TeacherViewConfig
from vold.config.schema.reward import RewardConfig
from vold.config.schema.rollout import EngineConfig, RolloutConfig, SamplingConfig, VllmConfig
from vold.config.schema.run import RunConfig, listed


class OptimizerConfig(Strict):
    """AdamW with linear warm-up."""

    lr: PositiveFloat
    """Peak learning rate."""
    lr_groups: dict[str, PositiveFloat] = Field(default={})
    """Peak learning rates of their own, by patterns as in `train` (visual: 2.0e-6); the first that takes a weight
    counts. Adapters have transformers' names: layers.*.lora_B."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up, down to lr * min_lr_ratio."""
    min_lr_ratio: Share = 0.0
    """Final learning rate divided by the peak."""
    weight_decay: NonNegativeFloat = 1e-2
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's first and second moments."""
    eps: PositiveFloat = 1e-8
    """Added to Adam's denominator."""
    clip_grad: PositiveFloat = 1.0
    """Largest global norm of the gradient."""
    offload: bool = False
    """Keep the fp32 masters and Adam's moments in CPU memory, and update there: 12 bytes a trained weight less on the
    GPU (8 of a float32 model). Each update moves gradients there and weights back."""
    max_bad_steps: Positive = 3
    """Steps in a row, non-finite or without a graded response, each skipped on every rank, after which the run stops;
    a step whose gradient is zero is skipped too and does not count."""


class VisionConfig(Strict):
    """Vision tower of the student, frozen unless `train` names it."""

    train_merger: bool = False
    """Train the projector from patches to tokens (with Qwen3-VL's DeepStack mergers) beside what `train` says."""
    patches_per_pass: Positive = 16384
    """Image patches in one forward pass of the tower."""


class AdapterConfig(Strict):
    """LoRA: the model is frozen, and a low-rank update of its linear layers is trained."""

    rank: Positive = 16
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the update's inputs that a training pass drops, the same ones on every layout. Log-probs, teachers and
    samplers read the model without; a training pass's own log-probs, and mismatch, have it."""
    targets: Annotated[tuple[Literal["qkv", "proj", "fc1", "fc2", "merger", "tower"], ...], Field(min_length=1)] = (
        "qkv",
        "proj",
        "fc1",
        "fc2",
    )
    """Linear layers with an update: qkv (q_proj, k_proj, v_proj), proj (o_proj), fc1 (gate_proj, up_proj),
    fc2 (down_proj), merger (the vision tower's patch mergers), tower (its blocks)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    base_bits: Literal[8, 4] | None = None
    """Hold the frozen linear layers of the language model in 8 or 4 bits (NF4), by bitsandbytes; null: as they are."""
    seed: NonNegative = 0
    """Seed of the update's initial values, and of dropout."""
    sync: Literal["merged", "adapter"] = "merged"
    """What samplers get in stage 2: the weights with the update merged, or the update alone, as files (vLLM only)."""
    path: Path | None = None
    """Directory of an adapter, as peft or `vold export` with adapter=true writes it, to continue from."""


class TrainConfig(RunConfig):
    """Common to both training stages."""

    student: Path
    """Checkpoint directory that training starts from."""
    data: DataConfig
    """Training data."""
    optimizer: OptimizerConfig
    """Optimizer and learning rate."""
    vision: VisionConfig = VisionConfig()
    """Vision tower."""
    adapter: AdapterConfig | None = None
    """LoRA: adapters are trained in place of the language model's weights."""
    train: Annotated[tuple[str, ...] | None, BeforeValidator(listed)] = None
    """Weights that are trained; others stay as they are, to the bit: names of weights or modules as the checkpoint has
    them, * for any: [layers.35, layers.*.mlp, norm, lm_head, visual.merger, visual, language_model]. null: the language
    model, or with an adapter nothing beside it."""
    steps: Positive
    """Optimizer steps (rl: steps of rollouts; minibatches updates each)."""
    microbatch_tokens: Positive = 16384
    """Packed tokens of one forward and backward pass of a copy of the model, at least the longest sequence; the ranks
    of parallel.cp share them."""
    save_every: NonNegative = 10
    """Steps between checkpoints; 0: only the last step, which is always saved."""
    save_async: bool = False
    """Continue training while a checkpoint is written; its state is held in host memory meanwhile."""
    keep_checkpoints: Positive = 2
    """Number of latest checkpoints that are kept."""
    stop_grace_seconds: Positive = 120
    """Seconds in which a repeated SIGTERM or SIGHUP is ignored, from the first one and again from the start of the save
    that follows it; a later one ends the run at once."""
    parity_limit: Annotated[float, Field(gt=1.0)] = 1.05
    """Largest mean exp|logp of the sampler - logp of the trainer| after a weight sync."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation during training."""


class TracesConfig(RunConfig, EngineConfig):
    """`vold traces`, stage 0: the teacher answers prompts; its answers are not checked (paper section 4.1)."""

    teacher: Path
    """Checkpoint directory of the teacher."""
    data: DataConfig
    """Problems."""
    sampling: SamplingConfig
    """Sampling of the teacher's responses."""
    max_tokens: Positive = 8192
    """Prompt and response tokens below which a complete trace is kept; longer or truncated ones are dropped."""
    prompts_per_shard: Positive = 512
    """Prompts of one Parquet file."""


class SftConfig(TrainConfig):
    """`vold sft`, stage 1: maximum likelihood on traces."""

    batch_size: Positive = 256
    """Sequences per step, over all ranks."""
    save_every: NonNegative = 100
    """Steps between checkpoints; 0: only the last step, which is always saved."""
    max_tokens: Positive = 8192
    """Tokens of the longest sequence; longer ones are left out."""
    pair_with: Path | None = None
    """Teacher whose tokenizer the student must share."""


class OpenaiConfig(Strict):
    """A server with OpenAI's completions endpoint that returns log-probs of a prompt by token id, as `vllm serve` does.
    It gets the student's texts as token ids, and no image."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(/[^\s?#]*)?$")]
    """Address that /completions is added to: http://localhost:8000/v1."""
    model: str
    """Name of the model in each request."""
    concurrency: Positive = 32
    """Requests under way at once, for each rank."""
    seconds: PositiveFloat = 600.0
    """Time limit of one request."""
    retries: NonNegative = 3
    """Further attempts after a time-out, a broken connection or status 408, 409, 429 or 5xx."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; no key is sent when null."""


class TeacherConfig(Strict):
    """One of several teachers."""

    path: Path
    """Checkpoint directory with the student's tokenizer; with engine vllm of any architecture that vLLM serves, with
    openai no more than config.json and the tokenizer."""
    engine: Literal["vllm", "trainer", "openai"] = "vllm"
    """vllm: an engine of its own; trainer: in the trainer, on Megatron; openai: a server (text only)."""
    rows: Literal["all", "images", "text"] = "all"
    """Rows that it scores where teacher_column says nothing."""
    weight: PositiveFloat = 1.0
    """Factor of objective.beta for this teacher; of several that score a row, its share of the mixture too."""
    divergence: Literal["k2", "reverse_kl", "forward_kl", "jsd"] | None = None
    """Of this teacher; objective.divergence when null."""
    top_k: Positive | None = None
    """For a divergence of whole distributions, as objective.top_k; with engine openai, of the teacher's own ids."""
    vllm: VllmConfig = VllmConfig()
    """Settings of its vLLM engine."""
    openai: OpenaiConfig | None = None
    """The server of engine openai."""
    offload: bool = False
    """engine trainer: keep it in CPU memory while it does not score."""
    view: TeacherViewConfig = TeacherViewConfig()
    """What it reads."""

    @model_validator(mode="after")
    def _keys_of_its_engine(self):
        given = {"trainer": self.offload, "vllm": self.vllm != VllmConfig(), "openai": self.openai is not None}
        for engine, name in (("trainer", "offload"), ("vllm", "vllm"), ("openai", "openai")):
            if given[engine] and engine != self.engine:
                raise ValueError(f"{name} is not read by a teacher with engine = {self.engine!r}; leave it out")
        if self.engine == "openai" and self.openai is None:
            raise ValueError("engine = 'openai' needs the server; set openai: {url: …, model: …}")
        return self


class RlConfig(TrainConfig):
    """`vold rl`, stage 2: GRPO and distillation on the same rollouts."""

    teacher: Path | None = None
    """Checkpoint directory of the teacher; required when the objective needs one. Behind adapters the student's own
    directory is the base for nothing: the trainer's weights with the adapter switched off (a reference KL)."""
    teacher_engine: Literal["trainer", "vllm", "openai"] = "trainer"
    """trainer: scores the step's batch on Megatron; vllm: scores each group as soon as it is graded; openai: so does a
    server of teacher_openai."""
    teacher_openai: OpenaiConfig | None = None
    """The server of teacher_engine openai."""
    teacher_vllm: VllmConfig = VllmConfig()
    """Settings of the teacher's vLLM engine."""
    teacher_offload: bool = False
    """Keep the trainer's teacher, and a reference, in CPU memory while they do not score."""
    reference: Path | None = None
    """Checkpoint directory of the frozen reference, with objective.reference_beta > 0; the student's own when null,
    which behind adapters is the base and has no second copy."""
    teacher_view: TeacherViewConfig = TeacherViewConfig()
    """What the teacher reads."""
    teachers: dict[str, TeacherConfig] = Field(default={})
    """Several teachers by name, instead of teacher."""
    teacher_column: str | None = None
    """Column of the data with the names of a row's teachers: one, a list, or a mapping of names to weights."""
    prompts_per_step: Positive = 256
    """Prompts per step, over all ranks."""
    self_teacher: SelfTeacherConfig = SelfTeacherConfig()
    """Prompt of a self-teacher (sdpo, srpo)."""
    minibatches: Positive = 1
    """Updates that a step's prompts are divided among; at 1 no ratio is clipped."""
    rollout: RolloutConfig
    """Sampling."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Method."""
    reward: RewardConfig = RewardConfig()
    """Reward of a response."""
    samples_per_step: NonNegative = 8
    """Responses per step that are written to samples.jsonl."""
    image_sensitivity_every: NonNegative = 0
    """Steps between measurements of image_sensitivity, two forward passes on sharp and degraded images; 0: never."""
    grader_workers: Positive = 2
    """Processes per rank that grade answers."""
    grader_echo: bool = True
    """An answer that is copied from the prompt, and not spelled as the gold answer, is wrong (rule `echo`)."""

    @property
    def synced_adapter(self) -> AdapterConfig | None:
        """The adapter, where the sampler gets it alone."""
        return self.adapter if self.adapter is not None and self.adapter.sync == "adapter" else None

    @property
    def teacher_is_base(self) -> bool:
        """The trainer's teacher is the student without its adapter, which has no second copy of the weights then."""
        return self.teacher_engine == "trainer" and not self.objective.visual_advantage and self.is_base(self.teacher)

    @property
    def reference_is_base(self) -> bool:
        """As teacher_is_base, of the reference."""
        return self.is_base(self.reference or self.student)

    def is_base(self, checkpoint: Path | None) -> bool:
        """The checkpoint's weights are the trainer's with the adapter switched off, all through the run."""
        trains_weights = bool(self.train) or self.vision.train_merger
        if self.adapter is None or trains_weights or checkpoint is None:
            return False
        return checkpoint.resolve() == self.student.resolve()

    @property
    def teacher_columns(self) -> tuple[str, ...]:
        """Columns of the data that the choice and the views of teachers read."""
        views = [self.teacher_view, *(teacher.view for teacher in self.teachers.values())]
        chosen = () if self.teacher_column is None else (self.teacher_column,)
        return (*chosen, *(column for view in views for column in view.columns))

    @model_validator(mode="after")
    def _a_view_of_its_teacher(self):
        if self.teachers and self.teacher_view != TeacherViewConfig():
            raise ValueError("teacher_view is of one teacher; set teachers.NAME.view")
        return self

    @model_validator(mode="after")
    def _a_server_for_its_engine(self):
        if (self.teacher_engine == "openai") != (self.teacher_openai is not None):
            raise ValueError("teacher_engine = 'openai' and teacher_openai belong together; give both or neither")
        return self

    @model_validator(mode="after")
    def _one_teacher_or_several(self):
        if self.teachers and self.teacher is not None:
            raise ValueError("teacher and teachers are both set; name the one among the several, or leave one key out")
        if self.teacher_column is not None and not self.teachers:
            raise ValueError(f"teacher_column = {self.teacher_column!r} chooses among teachers; set teachers too")
        for name in self.teachers:
            if not name.isidentifier():
                raise ValueError(f"teachers.{name} is no name of letters, digits and _; choose another")
        return self

    @model_validator(mode="after")
    def _a_prompt_for_each_minibatch(self):
        if self.minibatches > self.prompts_per_step:
            raise ValueError(
                f"minibatches = {self.minibatches} exceeds prompts_per_step = {self.prompts_per_step}; lower it"
            )
        return self
