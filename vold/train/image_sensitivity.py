"""How much a student's answers owe to the detail of what it sees: a metric of any training on images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from vold.data.packing import PromptEncoder, pack
from vold.run.job import Job
from vold.trainer.trainer import Trainer
from vold.types import Prompt, Sample


class ImageSensitivity:
    """image_sensitivity: the student's own log-prob of a response token behind the images minus that behind their
    degraded copies (see vold.objectives.visual_advantage), temperature 1, in nats; the mean over all tokens of a step's
    responses to images. The weights are those before the step's update, which drew the responses where rollouts do not
    lag. `every`: steps, 0 never. Raises ValueError where no prompt has an image."""

    def __init__(
        self, prompts: Iterable[Prompt], sharp: PromptEncoder, degraded: PromptEncoder, *, every: int, max_tokens: int
    ):
        if every and not any(prompt.images for prompt in prompts):
            raise ValueError(
                f"image_sensitivity_every = {every}, but no training prompt has an image; set image_sensitivity_every=0"
            )
        self._encoders = (sharp, degraded)
        self._every, self._max_tokens = every, max_tokens

    def measure(self, step: int, samples: Sequence[Sample], trainer: Trainer, job: Job) -> dict[str, float]:
        """The metric where it is due after 0-based `step`, and the step has responses to images. `samples` are those of
        the whole step, the same on every rank; all ranks call."""
        seen = [replace(sample, pg_weight=1.0) for sample in samples if sample.prompt.images]  # 0 would not be read
        if not seen or not self._every or (step + 1) % self._every:
            return {}
        with job.log.phase("reliance"):
            sharp, degraded = (
                trainer.logprobs(pack(seen, max_tokens=self._max_tokens, replicas=trainer.replicas, encode=encode))
                for encode in self._encoders
            )
        differences = [a - b for place in sharp for a, b in zip(sharp[place], degraded[place], strict=True)]
        # Every rank of a model copy tells the same: that changes sum and count alike.
        nats, tokens = (sum(found) for found in zip(*job.gather([(sum(differences), len(differences))]), strict=True))
        return {"image_sensitivity": nats / tokens}
