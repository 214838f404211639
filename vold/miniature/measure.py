"""Accuracies of a checkpoint directory, measured by transformers alone: `generate`, saved tokenizer, saved image
processor, saved picture files. A check of the miniature that is independent of vold's evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from vold.miniature.data import EXPRESSIONS_FILE
from vold.miniature.examples import IGNORED, collate, facts_example
from vold.miniature.make import MiniatureWorld
from vold.miniature.tokenizer import BOXED, CLOSE, END_BOXED, IMAGE, OPEN, THINK
from vold.miniature.world import IMAGE_MARK

MAX_NEW_TOKENS = 40


@dataclass(frozen=True)
class Item:
    """One question: `messages` as for `apply_chat_template`, `image` the file of its picture."""

    messages: list[dict]
    answer: str
    image: Path | None = None


@dataclass(frozen=True)
class Measured:
    """`responses` decoded with special tokens dropped; accuracy is exact match of the last box, greedy decoding."""

    responses: list[str]
    accuracy: float


def load_text_items(path: Path) -> list[Item]:
    """Items of a file in the orz-57k layout."""
    rows = json.loads(path.read_text())
    return [Item([_user(human["value"])], gold["ground_truth"]["value"]) for human, gold in rows]


def load_image_items(path: Path) -> list[Item]:
    """Items of a file in the Geometry3K layout; pictures are relative to the file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Item([_user(_content(row["problem"]))], row["answer"], path.parent / row["images"][0]) for row in rows]


def _user(content: str | list[dict]) -> dict:
    return {"role": "user", "content": content}


def _content(problem: str) -> list[dict]:
    before, after = problem.split(IMAGE_MARK)
    return [{"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}]


class Checkpoint:
    """A directory loaded with the Auto classes: model, tokenizer and, for a student, image processor."""

    def __init__(self, directory: Path):
        has_vision = hasattr(AutoConfig.from_pretrained(directory), "vision_config")
        auto_model = AutoModelForImageTextToText if has_vision else AutoModelForCausalLM
        self.model: Any = auto_model.from_pretrained(directory).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.image_processor: Any = AutoImageProcessor.from_pretrained(directory) if has_vision else None

    def measure(self, items: list[Item], batch: int = 100, *, sample: bool = False) -> Measured:
        """Responses to all items (all with pictures or none), greedy or drawn, and the share that is correct."""
        responses = [text for k in range(0, len(items), batch) for text in self.respond(items[k : k + batch], sample)]
        correct = [boxed(text) == item.answer for text, item in zip(responses, items, strict=True)]
        return Measured(responses, sum(correct) / len(correct))

    @torch.no_grad()
    def respond(self, items: list[Item], sample: bool = False) -> list[str]:
        """One response each, greedy or drawn at temperature 1, special tokens dropped."""
        prompts = [
            self.tokenizer.apply_chat_template(item.messages, add_generation_prompt=True, tokenize=False)
            for item in items
        ]
        images = self._image_inputs(items)
        if images:
            merged = images["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2
            prompts = [text.replace(IMAGE, IMAGE * n) for text, n in zip(prompts, merged.tolist(), strict=True)]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        if images:
            image_id = self.tokenizer.convert_tokens_to_ids(IMAGE)
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_id).int()
        elif self.image_processor is not None:
            self.model.model.rope_deltas = None  # else the last picture's shift would move this text
        out = self.model.generate(
            **inputs, **images, max_new_tokens=MAX_NEW_TOKENS, do_sample=sample, **({"top_k": 0} if sample else {})
        )
        return self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _image_inputs(self, items: list[Item]) -> dict[str, torch.Tensor]:
        pictures = [Image.open(item.image) for item in items if item.image is not None]
        return dict(self.image_processor(images=pictures, return_tensors="pt")) if pictures else {}


def boxed(response: str) -> str | None:
    """The content of the response's last closed box, or None."""
    _, opened, tail = response.rpartition(BOXED)
    content, closed, _ = tail.partition(END_BOXED)
    return content if opened and closed else None


@torch.no_grad()
def facts_accuracy(checkpoint: Checkpoint, examples: int = 100) -> float:
    """Share of unchained single steps (four an example) that the model gets right; chance .1."""
    rng = np.random.default_rng(1)
    batch = collate([facts_example(rng) for _ in range(examples)], checkpoint.tokenizer, rng)
    labels = batch.pop("labels")[:, 1:]
    predicted = checkpoint.model(**batch).logits[:, :-1].argmax(-1)
    supervised = labels != IGNORED
    return (predicted == labels)[supervised].float().mean().item()


def measure_world(world: MiniatureWorld, split: str = "val") -> dict[str, float]:
    """Measure both checkpoints in seconds of work. Targets: teacher ≥ .99, both `read` ≥ .95, base at chance (.1).

    `read` is the share of problems whose expression the base writes down without a mistake before it guesses. `facts`
    are single steps: a base that reads but does not know them (.1) passes every other check and SFT stalls on it.
    """
    text, image = load_text_items(world.text(split)), load_image_items(world.image(split))
    teacher = Checkpoint(world.teacher).measure(text)
    base = Checkpoint(world.base)
    base_text, base_image = base.measure(text), base.measure(image)
    expressions = json.loads((world.data / EXPRESSIONS_FILE).read_text())
    pictured = [expressions[f"images/{item.image.name}"] for item in image if item.image]
    return {
        "teacher_text": teacher.accuracy,
        "base_text": base_text.accuracy,
        "base_image": base_image.accuracy,
        "base_text_read": _read_share(base_text, [expression_of(item.messages[0]["content"]) for item in text]),
        "base_facts": facts_accuracy(base),
        "base_image_read": _read_share(base_image, pictured),
    }


def expression_of(question: str) -> str:
    """The expression of a text question, with spelled symbols undone."""
    inside = question[question.index(OPEN) + 1 : question.index(CLOSE)]
    return inside.replace("<", "").replace(">", "")


def _read_share(measured: Measured, expressions: list[str]) -> float:
    starts = [f"{THINK}{expression}" for expression in expressions]
    hits = [text.startswith(start) for text, start in zip(measured.responses, starts, strict=True)]
    return sum(hits) / len(hits)
