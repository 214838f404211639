"""Training and evaluation rows as the stage would load them: counted for `vold check`, some of them shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from rich.console import Group

from vold.config.schema import RlConfig, SftConfig
from vold.data.packing import PromptEncoder
from vold.data.problems import column_use, load_problems
from vold.data.prompts import build_prompts
from vold.data.traces import load_samples
from vold.models.chat_template import load_chat_tokenizer
from vold.models.images import load_prompt_encoder
from vold.models.tokenizer import stop_ids
from vold.objectives import build_objective
from vold.planning.row_preview import row_preview
from vold.train.config_checks import check_trained_vision
from vold.train.reward_terms import check_judge_template, problem_options
from vold.types import Prompt, Sample

PREVIEWS = 2  # training rows that are shown


class DataCheck:
    """Loads a config's data; the methods raise ValueError as the stage itself would."""

    def __init__(self, config: SftConfig | RlConfig):
        self._config = config
        self._training: Sequence[Prompt] | Sequence[Sample] = ()
        self._with_images: list[Prompt] = []
        self._encode: PromptEncoder | None = None

    def check_training(self) -> str:
        """Load the training data. Returns how many rows there are, how long, and how many are left out."""
        config, skipped = self._config, []
        tokenizer, self._encode = (
            load_chat_tokenizer(config.student, config.prompt),
            load_prompt_encoder(config.student),
        )
        if isinstance(config, SftConfig):
            limits: dict[str, Any] = {"max_tokens": config.max_tokens, "stop_ids": stop_ids(config.student, tokenizer)}
            samples = load_samples(config.data, tokenizer, config.prompt, length=self._encode.length, **limits)
            self._training, kind = samples, "traces"
            prompts = _Prompts(samples)
        else:
            objective = build_objective(config.objective, config.rollout.max_new_tokens)
            problems = load_problems(config.data, skipped.append, **problem_options(config, objective))
            options = (config.prompt, config.data.on_error, self._encode.length)
            self._training = prompts = build_prompts(problems, tokenizer, *options)
            kind = "problems"
            skipped += ["too long"] * (len(problems) - len(prompts))
        if not prompts:
            raise ValueError(f"{config.data.path} holds no row within prompt.max_tokens = {config.prompt.max_tokens}")
        check_trained_vision(config, prompts)
        if isinstance(config, RlConfig):
            check_judge_template(config.reward, prompts)
        with_images = (prompt for prompt in islice(prompts, PREVIEWS, None) if prompt.images)
        self._with_images += islice(with_images, 1)
        return f"{config.data.path}: {_summary(prompts, kind, self._encode)}" + _left_out(skipped)

    def check_columns(self) -> str:
        """Returns which columns of the training data are read, and which are not."""
        data = self._config.data
        if data.layout == "traces":
            return "token ids of `vold traces`"
        use = column_use(data)
        return f"read: {', '.join(use.read)}; not read: {', '.join(use.unread) or 'none'}"

    def check_evaluation(self) -> str:
        """Load every evaluation set. Returns the same summary of each."""
        config, summaries = self._config, []
        tokenizer, encode = load_chat_tokenizer(config.student, config.prompt), load_prompt_encoder(config.student)
        for name, data in config.evaluation.sets.items():
            skipped: list[str] = []
            problems = load_problems(data, skipped.append)
            prompts = build_prompts(problems, tokenizer, config.prompt, data.on_error, encode.length)
            skipped += ["too long"] * (len(problems) - len(prompts))
            self._with_images += [prompt for prompt in prompts if prompt.images]
            summaries.append(f"{name}: {_summary(prompts, 'problems', encode)}" + _left_out(skipped))
        return "; ".join(summaries)

    def previews(self) -> Iterator[Group]:
        """The first training rows, and the first row with an image, from an evaluation set if training has none."""
        if self._encode is None:
            return
        tokenizer = load_chat_tokenizer(self._config.student, self._config.prompt)
        rows = [self._training[index] for index in range(min(PREVIEWS, len(self._training)))]
        for row in (*rows, *self._with_images[:1]):
            yield row_preview(row, tokenizer, self._encode)


class _Prompts(Sequence[Prompt]):
    """The prompts of traces, made on access."""

    def __init__(self, samples: Sequence[Sample]):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Prompt:
        return self._samples[index].prompt


def _summary(prompts: Sequence[Prompt], kind: str, encode: PromptEncoder) -> str:
    lengths, with_images = [], 0
    for prompt in prompts:
        lengths.append(encode.length(prompt))
        with_images += bool(prompt.images)
    images = f", {with_images} with images" if with_images else ""
    return f"{len(prompts)} {kind}{images}; prompts of {min(lengths)} to {max(lengths)} tokens"


def _left_out(skipped: Sequence[str]) -> str:
    return f"; {len(skipped)} rows left out, the first: {skipped[0]}" if skipped else ""
