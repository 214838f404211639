"""Objective and the prompts of a self-teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vold.config.schema.base import NonNegativeFloat, Positive, PositiveFloat, Share, Strict


class ObjectiveConfig(Strict):
    """A preset of vold.objectives and what is changed of it. A key that is null keeps the preset's value
    (docs/methods.md)."""

    preset: str = "vold"
    """Method: grpo, grpo-reference, top-d, uni-opd, vold, vold-unmasked, mopd, vold-gspo, opd, va-opd, dr-grpo, dapo,
    gspo, dcpo, cispo, sapo, kdrl, kdrl-response, kdrl-group, sdpo, srpo or fixed-negative."""
    advantage: str | None = None
    """group-normalised, smoothed, mean-centred, fixed-negative or none."""
    ratio: str | None = None
    """Importance ratio: token, sequence, adaptive, constant or gated."""
    routing: str | None = None
    """Responses with a KL term: nowhere, every, failed or failed-groups."""
    routing_term: str = "accuracy"
    """Term of the reward that routing reads as success, in [0, 1]: accuracy, format, judge, the NAME of a function, or
    NAME.KEY of what it returns. With sdpo and srpo it also says which sibling is right: one of value 1."""
    normaliser: str | None = None
    """Weight of a token: tokens, sequences or constant."""
    divergence: Literal["k1", "k2", "k3", "reverse_kl", "forward_kl", "jsd"] | None = None
    """k2 of the sampled tokens, or a divergence over the whole vocabulary; k1 and k3 are refused, with the reason."""
    top_k: Positive | None = None
    """For reverse_kl, forward_kl and jsd: the student's most probable ids are compared one by one, all others as
    one."""
    beta: NonNegativeFloat | None = None
    """Weight of the KL term; for vold 1e-3 (the paper's table 4; its text says 0.1)."""
    beta_end: NonNegativeFloat | None = None
    """Linear schedule: the last beta."""
    beta_step: PositiveFloat | None = None
    """Linear schedule: change of beta per step."""
    target_kl: PositiveFloat | None = None
    """Automatic schedule: the metric kl_teacher, in nats per token, is held at this value."""
    reference_beta: NonNegativeFloat | None = None
    """Weight of the KL to a frozen reference (reference), on every response; 0: no reference."""
    reference_divergence: Literal["k3", "reverse_kl", "forward_kl", "jsd"] | None = None
    """Of the reference: k3 of the sampled tokens, or a divergence over the whole vocabulary; k3 when null."""
    teacher_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Of the teacher in its mixture with the policy that sampled, the target of k2 (TOP-D): no token is more than
    -log(1 - teacher_share) nats from it. 1: the teacher alone."""
    margin: NonNegativeFloat | None = None
    """Nats a token by which the teacher should prefer a prompt's right responses to its wrong ones, compared with the
    student (Uni-OPD); what is missing becomes an advantage."""
    clip_eps_low: Share | None = None
    """The ratio is clipped to at least 1 - clip_eps_low."""
    clip_eps_high: NonNegativeFloat | None = None
    """The ratio is clipped to at most 1 + clip_eps_high."""
    kl_clamp: PositiveFloat | None = None
    """Nats of |logp - logp_teacher| beyond which the gradient of a token's KL no longer grows."""
    entropy_bonus: float | None = None
    """Weight of the policy's entropy in nats, subtracted from the loss."""
    average_rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """sdpo, srpo: rate per step of the moving average that teaches."""
    feedback: bool | None = None
    """sdpo, srpo: the self-teacher of a failed response without a correct sibling reads what was wrong with it: the
    `feedback` that a reward function returns, else, where routing_term is accuracy, what the grader found."""
    overlong_share: Share | None = None
    """Last part of rollout.max_new_tokens over which the penalty on the reward grows; 0: no penalty."""
    overlong_penalty: PositiveFloat = 0.5
    """Penalty at max_new_tokens; rewards lie in [0, 1]."""
    visual_advantage: bool | Literal["absolute"] | None = None
    """VA-OPD: weight each token's KL by how much the image's detail raises the teacher's log-prob of it. absolute: by
    how much it changes it, which also counts tokens that the student read wrong (ours)."""

    @model_validator(mode="after")
    def _one_schedule(self):
        if (self.beta_end is None) != (self.beta_step is None):
            raise ValueError("objective.beta_end and objective.beta_step belong together; give both or neither")
        if self.target_kl is not None and self.beta_end is not None:
            raise ValueError("objective.target_kl and objective.beta_end both steer beta; leave one out")
        return self


class TeacherViewConfig(Strict):
    """What a teacher reads in the place of the student's prompt. A row in which a column is empty is read as it is."""

    own_template: bool = False
    """Ask in the teacher's own chat template, not in the student's (or prompt.chat_template)."""
    prompt_column: str | None = None
    """Column of the data with the text that the teacher reads instead of the problem: a hint, a solution, what is to be
    seen in the image."""
    images_column: str | None = None
    """Column with the teacher's images: a crop, a higher resolution, a marked copy."""
    degraded_column: str | None = None
    """With objective.visual_advantage: column with the images of the second reading; copies without detail when
    null."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(c for c in (self.prompt_column, self.images_column, self.degraded_column) if c is not None)


class SelfTeacherConfig(Strict):
    """The prompt of a self-teacher (sdpo, srpo). A section without content is left out."""

    template: str = "{problem}{demonstration}{feedback}\n\nSolve the problem correctly."
    """The whole prompt."""
    demonstration: str = "\n\nA correct solution of this problem:\n\n{demonstration}"
    """Section with a correct sibling's answer."""
    feedback: str = "\n\nYour earlier attempt failed:\n\n{feedback}"
    """Section with what was wrong with the response, with objective.feedback."""

    @model_validator(mode="after")
    def _template_has_all_sections(self):
        for name in ("problem", "demonstration", "feedback"):
            if f"{{{name}}}" not in self.template:
                raise ValueError(
                    f"self_teacher.template = {self.template!r} lacks {{{name}}}; put it in (a section that is not "
                    "wanted may be empty: self_teacher.feedback='')"
                )
        return self
