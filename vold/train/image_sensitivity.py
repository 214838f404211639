"""Image sensitivity: how much the student's responses depend on the detail of their images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from vold.data.packing import PromptEncoder, pack
from vold.run.job import Job
from vold.trainer.trainer import Trainer
from vold.types import Prompt, Sample


class ImageSensitivity:
    """Measures `image_sensitivity`: the student's log-prob of a response token given the images minus that given their
    degraded copies (see vold.objectives.visual_advantage), at temperature 1, in nats; the mean over all tokens of a
    step's responses to images. The weights are those before the step's update.

    sharp, degraded: encoders of a prompt with its images, and with degraded ones. every: steps between measurements, 0
    never. Raises ValueError where no prompt has an image.
    """

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
        """The metric where it is due after 0-based `step` and the step has responses to images, else nothing.

        samples: those of the whole step, the same on every rank. All ranks call.
        """
        # A weight of 0 would leave the sample out of the batch.
        with_images = [replace(s, pg_weight=1.0, experts=None) for s in samples if s.prompt.images]
        if not with_images or not self._every or (step + 1) % self._every:
            return {}
        with job.log.phase("image_sensitivity"):
            sharp, degraded = (
                trainer.logprobs(
                    pack(with_images, max_tokens=self._max_tokens, replicas=trainer.replicas, encode=encode)
                )
                for encode in self._encoders
            )
        gaps = [a - b for index in sharp for a, b in zip(sharp[index], degraded[index], strict=True)]
        # All ranks of a model copy have the same gaps, which multiplies sum and count alike.
        nats, tokens = (sum(values) for values in zip(*job.gather([(sum(gaps), len(gaps))]), strict=True))
        return {"image_sensitivity": nats / tokens}
