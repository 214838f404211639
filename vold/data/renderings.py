"""How prompts were rendered: recorded with traces, and compared with how the training run renders them. A trace that
was asked otherwise is trained behind this run's rendering, so that SFT, RL and evaluation ask with the same ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from vold.config.schema import PromptConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompt, render_prompts
from vold.data.responses import END_THINK, THINK, open_thought
from vold.io import log, visible
from vold.types import Prompt, Sample

_QUESTION = "…"


@dataclass(frozen=True)
class Rendering:
    """A rendering of problems.

    template  SHA-256 of the chat template
    system, suffix  as in the prompt section
    example   the text of a prompt whose question is "…"
    """

    template: str
    system: str | None
    suffix: str
    example: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> Rendering:
        """The rendering of `config` with the tokenizer's chat template. Raises ValueError where it has none."""
        digest = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()
        example = tokenizer.decode(build_prompt(Problem("example", _QUESTION), tokenizer, config).token_ids)
        return cls(digest, config.system, config.suffix_text, example)

    def to_json(self) -> str:
        """One line, for a file's metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Rendering | None:
        """None where nothing was recorded."""
        return cls(**json.loads(text)) if text else None


class Rerendering:
    """Renders the prompts of traces anew, every one. config: of the training run, with the suffix that the traces were
    asked with. The first prompt that comes out otherwise is logged, with how it was asked and how it is trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig):
        self.config, self._tokenizer, self._said = config, tokenizer, False

    @classmethod
    def needed(
        cls, recorded: Rendering | None, tokenizer: PreTrainedTokenizerBase, config: PromptConfig
    ) -> Rerendering | None:
        """None where the traces were asked as this run asks, by their record, or where the tokenizer has no template to
        ask with. Traces without a record are rendered anew."""
        if tokenizer.chat_template is None:
            return None
        if recorded is not None and config.suffix is None:
            config = config.model_copy(update={"suffix": recorded.suffix})
        config = config.without_grading()
        return None if recorded == Rendering.of(tokenizer, config) else cls(tokenizer, config)

    def __call__(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples behind this run's rendering. Raises ValueError for a response without a thought where the chat
        template opens one."""
        problems = [
            Problem(p.id, p.text, p.gold, p.images, history=p.history) for p in (sample.prompt for sample in samples)
        ]
        prompts = render_prompts(problems, self._tokenizer, self.config)
        pairs = [(sample.prompt, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
        differing = (pair for pair in pairs if pair[0].token_ids.tolist() != pair[1].token_ids.tolist())
        if not self._said and (pair := next(differing, None)):
            self._said = True
            log.warning(self._line(*pair))
        return [self._behind(prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]

    def _behind(self, prompt: Prompt, sample: Sample) -> Sample:
        """The sample with another prompt; a `<think>` that only one of the two prompts has moves to the other side."""
        opened = open_thought(sample.prompt.token_ids, self._tokenizer)
        opens = open_thought(prompt.token_ids, self._tokenizer)
        ids = sample.response_ids if opened == opens else np.array([*opened, *sample.response_ids], np.int32)
        if opens and opened != opens:
            ids = ids[self._length_of_tag(ids, opens, prompt.id) :]
        return replace(sample, prompt=prompt, response_ids=ids)

    def _length_of_tag(self, ids: np.ndarray, opens: list[int], id: str) -> int:
        """How many ids at the start of a response spell the `<think>` that its prompt opens already."""
        if ids[: len(opens)].tolist() == opens:
            return len(opens)
        for length in range(1, len(opens) + 1):
            if self._tokenizer.decode(ids[:length]).strip() == THINK:
                return length
        raise ValueError(
            f"{id}: the trace does not begin with {THINK} and this run's chat template opens a thought, which "
            f"a response without {END_THINK} would not end; set prompt.chat_template to the teacher's"
        )

    def _line(self, before: Prompt, after: Prompt) -> str:
        asked, trained = (self._tokenizer.decode(p.token_ids).replace(p.text, _QUESTION) for p in (before, after))
        return visible(
            f"these traces were asked with another rendering than this run's and are trained behind this run's: "
            f"{trained!r} instead of {asked!r} (prompt.chat_template decides for all stages)"
        )
