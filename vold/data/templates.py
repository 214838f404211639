"""A tokenizer's chat template, rendered in a worker process of bounded time and memory."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from vold.grading.workers import Job, WorkerCommand, WorkerPool

CHATS_AT_ONCE = 64
SECONDS, MAX_BYTES = 5.0, 1 << 29  # CPU time of so many chats, which take real templates about 10 ms; address space
_PATIENCE = 50.0  # seconds without CPU time after which the machine is too busy
_LIMITS = {
    "timeout": f"computes for more than {SECONDS:g} s",
    "memory": f"needs more than {MAX_BYTES >> 20} MiB",
    "crashed": "crashes the process that renders it",
    "length": "makes more than 16 million characters of a prompt",
}


class ChatRefused(TemplateError):
    """The template refuses a chat, or cannot render it. number: of the chat."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number


def render_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Sequence[Mapping[str, Any]]], **options: Any
) -> list[str]:
    """For each chat the text of `tokenizer.apply_chat_template(chat, tokenize=False, **options)`.

    Raises ChatRefused; ValueError that names the tokenizer where it has no template, or one without end or bounds.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise ValueError(f"{name} has no chat template: copy the original checkpoint's") from None
    variables = {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}
    variables |= {"tools": None, "documents": None, "add_generation_prompt": False} | options
    texts: list[str] = []
    while len(texts) < len(chats):
        part = chats[len(texts) : len(texts) + CHATS_AT_ONCE]
        reply = _renderer().render({"template": template, "chats": part, "variables": variables})
        texts += reply["texts"]
        if "refused" in reply:
            raise ChatRefused(len(texts), " ".join(reply["refused"].split()))
        if "error" in reply:
            reason = _LIMITS.get(reply["error"], f"could not be rendered ({reply['error']}: this machine is too busy)")
            raise ValueError(f"the chat template of {name} {reason}: take the original checkpoint's")
    return texts


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


class _Renderer(WorkerPool):
    """One worker, for all threads and templates of this process."""

    what = "the chat template's worker"

    def __init__(self, seconds: float = SECONDS) -> None:
        command = WorkerCommand("vold.data.template_worker", (str(seconds), str(MAX_BYTES)), _PATIENCE)
        super().__init__(1, command)
        self._lock = threading.Lock()

    def render(self, message: dict) -> dict:
        """The worker's reply, or one with an "error" of its own."""
        job = Job(message=message)
        with self._lock:
            self._run([job])
        return job.question if job.outcome == "done" else {"texts": [], "error": job.rule}

    def finish_job(self, job: Job, reply: Mapping[str, Any]) -> None:
        """See WorkerPool."""
        job.question = reply
        job.close("done", "")

    def start_error(self, reason: str) -> str:
        """See WorkerPool."""
        return f"{self.what} cannot start: {reason}"


@cache
def _renderer() -> _Renderer:
    renderer = _Renderer()
    atexit.register(renderer.close)
    return renderer
