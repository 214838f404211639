"""The reward of a response: the answer, its form, functions of one's own, and a judge."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from vold.config.schema.base import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Strict

_SPEC = re.compile(r"(?P<path>.+\.py):(?P<name>[^\W\d]\w*)")
_BUILT_IN = ("accuracy", "format", "judge")


def function_spec(function: Callable | str | Any) -> Any:
    """`PATH.py:NAME` of a function, and other values as they are. Raises ValueError for one that no worker process
    could find: a lambda, a nested function, one typed into an interpreter."""
    if not callable(function):
        return function
    path, name = None, getattr(function, "__qualname__", type(function).__name__)
    if inspect.isfunction(function):
        path = inspect.getsourcefile(inspect.unwrap(function))
    spec = f"{path}:{name}"
    if path is None or not Path(path).is_file() or not _SPEC.fullmatch(spec):
        raise ValueError(
            f"reward.function = {name}: worker processes import it, so it must be a function at the top level of a "
            ".py file; move it to one"
        )
    return spec


def function_specs(value: Any) -> Any:
    """`function_spec` of a function, or of each in a mapping to weights."""
    if isinstance(value, Mapping):
        return {function_spec(function): weight for function, weight in value.items()}
    return function_spec(value)


Weight = Annotated[float, Field(allow_inf_nan=False)]
Functions = Annotated[str | dict[str, Weight] | None, BeforeValidator(function_specs)]


class JudgeConfig(Strict):
    """A language model that scores responses, behind an OpenAI-compatible endpoint (`vllm serve`, a hosted model)."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(/[^\s?#]*)?$")]
    """Address that /chat/completions is added to: http://localhost:8000/v1."""
    model: str
    """Name of the model in each request."""
    template: str = (
        "Problem:\n{prompt}\n\nReference answer: {gold}\n\nResponse:\n{response}\n\n"
        "Rate the response from 0 (wrong or useless) to 10 (right and clear). End with one line: Score: N"
    )
    """Rubric, the user message; {prompt}, {gold}, {response} and columns of the data that nothing else reads are put
    in."""
    system: str | None = None
    """System message; none when null."""
    pattern: str = r"(?i)score[\s:=*_]{0,8}(\d+(?:\.\d+)?)"
    """Regular expression; the group of its last match in the judge's answer is the score."""
    scores: dict[str, Weight] = Field({})
    """Values of scores that are words: {yes: 1, no: 0}. A number is scaled from [lowest, highest] to [0, 1]."""
    lowest: Weight = 0.0
    """Number that counts 0."""
    highest: Weight = 10.0
    """Number that counts 1."""
    weight: Weight = 1.0
    """Weight in the reward."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the judge."""
    max_tokens: Positive = 512
    """Tokens of the longest answer of the judge."""
    body: dict[str, Any] = Field({})
    """Further fields of each request, laid over ours; a field that is null is not sent."""
    concurrency: Positive = 16
    """Requests under way at once, for each rank."""
    seconds: PositiveFloat = 60.0
    """Time limit of one request."""
    retries: NonNegative = 3
    """Further attempts after a time-out, a broken connection or status 408, 409, 429 or 5xx."""
    budget: NonNegative | None = None
    """Requests of the whole run, failed ones included; responses beyond it are masked. Unlimited when null."""
    cache: Path | None = None
    """Folder of scores by request, which runs may share; run_dir/judge when null."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; no key is sent when null."""

    @model_validator(mode="after")
    def _can_read_a_score(self):
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"reward.judge.pattern = {self.pattern!r} is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"reward.judge.pattern = {self.pattern!r} has {groups} groups; it needs one, the score")
        if self.lowest >= self.highest:
            raise ValueError(f"reward.judge.lowest = {self.lowest} must be below highest = {self.highest}")
        if "{response}" not in self.template:
            raise ValueError("reward.judge.template lacks {response}; put it in")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise ValueError("reward.judge.api_key_env is the name of an environment variable, not the key itself")
        return self


class RewardConfig(Strict):
    """Reward = sum of weight x value over its terms: accuracy (the answer is right), format (<think>...</think>, then a
    boxed answer), functions of your own and a judge (docs/rewards.md). VOLD: accuracy 1; EasyR1: accuracy .9, format
    .1; VLM-R1, which adds the two up: .5 and .5."""

    accuracy: NonNegativeFloat = 1.0
    """Weight of a right answer; 0 where function or judge is given and this key is not."""
    format: NonNegativeFloat = 0.0
    """Weight of the right form."""
    function: Functions = None
    """PATH.py:NAME of a function, or several with their weights: {PATH.py:NAME: weight}."""
    seconds: PositiveFloat = 10.0
    """CPU time of one call of a function; one that waits is ended a little later."""
    memory_gib: PositiveFloat = 8.0
    """Address space of a process that calls functions, GiB."""
    judge: JudgeConfig | None = None
    """Language model that scores responses; nothing is sent anywhere when null."""

    @model_validator(mode="before")
    @classmethod
    def _own_terms_replace_accuracy(cls, values: Any) -> Any:
        if isinstance(values, dict) and (values.get("function") or values.get("judge")):
            return {"accuracy": 0.0} | values
        return values

    @model_validator(mode="after")
    def _terms_fit(self):
        if self.function is not None and not self.functions:
            raise ValueError("reward.function names no function; give PATH.py:NAME, or leave it out")
        names = []
        for spec in self.functions:
            if not (match := _SPEC.fullmatch(spec)):
                raise ValueError(f"reward.function = {spec!r} must be PATH.py:NAME, a file and a function in it")
            names.append(match["name"])
        for name in names:
            if names.count(name) > 1 or name in _BUILT_IN:
                raise ValueError(f"reward.function: {name} is the name of another term; rename the function")
        weights = self.weights
        if not any(weights.values()) or not all(map(math.isfinite, weights.values())):
            raise ValueError(f"reward: weights {weights} must be finite and not all 0")
        if not self.has_own_terms and (abs(self.accuracy + self.format - 1.0) > 1e-6 or not self.accuracy):
            values = f"reward.accuracy = {self.accuracy} and reward.format = {self.format}"
            raise ValueError(f"{values} must add up to 1, the first above 0")
        return self

    @property
    def functions(self) -> dict[str, float]:
        """PATH.py:NAME -> weight."""
        return {self.function: 1.0} if isinstance(self.function, str) else self.function or {}

    @property
    def has_own_terms(self) -> bool:
        """Whether a function or a judge is asked."""
        return bool(self.functions) or self.judge is not None

    @property
    def weights(self) -> dict[str, float]:
        """Name of each term -> weight."""
        weights = {"accuracy": self.accuracy, "format": self.format}
        weights |= {spec.rpartition(":")[2]: weight for spec, weight in self.functions.items()}
        return weights | ({"judge": self.judge.weight} if self.judge else {})
