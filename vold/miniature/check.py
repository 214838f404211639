"""Whether a world is what its keys say: measured facts, by transformers alone, in `world.json` of its folder.

Shape letters: B sequences, T tokens, N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from vold.io import configure_logging, log, visible, write_atomically
from vold.miniature import world as arithmetic
from vold.miniature.examples import IGNORED, Example, chat_example, collate, styled_trace, teacher_example
from vold.miniature.measure import Checkpoint, Item, boxed, expression_of, load_text_items
from vold.miniature.pretrain import PretrainPhase, train
from vold.miniature.tokenizer import BOXED, END_BOXED, FILLERS, TOKEN_ID
from vold.miniature.world import Problem
from vold.miniature.worlds import DEGRADED_SCALE, World, WorldKeys, fact_table, open_world, world_root

FILE = "world.json"
STYLED = 200  # traces on which the style's KL is measured
DRAWS, BAND = 10, (3, 7)
"""Responses to a problem, and how many must agree for self-play to train on it: vold's defaults."""
START_TRACES, START_PHASE = 120, PretrainPhase(steps=100, text_rows=64, image_rows=0, lr=5e-4, warmup=10)
"""The SFT of the demo, in vold/miniature/configs/sft.yaml."""


def check_world(world: World, keys: WorldKeys, problems: int = 400) -> dict[str, float]:
    """Facts of the world, each a share unless its name says nats, on its first `problems` test problems. Measured once
    and kept in world.json: what is not there yet (a solver, a vision teacher) is measured by a later call, what no
    key of this world is about is among the facts of the plain one.

    teacher_accuracy, teacher_accuracy_on_wrong_facts   greedy; of all problems, of those that meet a wrong fact
    teacher_follows_facts        of those problems: how often it gives the answer that its facts give
    base_reads, start_accuracy   first line written down; the base after the demo's SFT on this world's traces; this
                                 line and the next two where a key is about them
    hint_*                       the base's and the start's values in right traces, without and with the answer shown
    words, kl_words_nats, kl_others_nats   share of filler words in a trace; KL(start || teacher) a token
    solver_*, labels_right, labels_right_in_band   drawn, greedy; by the majority of 10, and where 3 to 7 agree
    read_large, read_small, read_large_degraded, read_small_degraded   digits that the vision teacher reads
    """
    path = world.folder / FILE
    found = json.loads(path.read_text()) if path.exists() else {"keys": keys.model_dump(), "facts": {}, "seconds": {}}
    is_plain = keys == WorldKeys(seed=keys.seed)
    parts: dict[str, tuple[bool, Callable[[World, WorldKeys, int], dict[str, float]]]] = {
        "teacher": (True, _teacher_facts),
        "start": (keys.reads_hints or keys.style == "wordy", _start_facts),
        "solver": (world.solver.exists() and (keys.errors == "scattered" or is_plain), _solver_facts),
        "pictures": (world.vision_teacher.exists() and (keys.degraded == "shapes" or is_plain), _picture_facts),
    }
    for name, (there, measure) in parts.items():
        if there and name not in found["seconds"]:
            started = time.process_time()
            found["facts"] |= {key: round(value, 4) for key, value in measure(world, keys, problems).items()}
            found["seconds"][name] = round(time.process_time() - started, 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(found, indent=1) + "\n")
    return found["facts"]


def world_facts(path: Path) -> str:
    """A world.json in a line of Markdown: its name and its facts, in % unless they are nats."""
    found = json.loads(path.read_text())
    facts = " · ".join(f"{name.replace('_', ' ')} {_value(name, x)}" for name, x in found["facts"].items())
    return f"`{world_root(Path(), WorldKeys(**found['keys'])).name}`: {facts}"


def _value(name: str, value: float) -> str:
    return f"{value:.2f}" if name.endswith("nats") else f"{100 * value:.1f}"


# -- the teacher and the start -------------------------------------------------------------------------------------


def _teacher_facts(world: World, keys: WorldKeys, problems: int) -> dict[str, float]:
    items = load_text_items(world.text("test"))[:problems]
    expressions = [expression_of(item.messages[0]["content"]) for item in items]
    answers = [boxed(text) for text in Checkpoint(world.teacher).measure(items).responses]
    held = [fact_table(keys).solve(expression) for expression in expressions]
    right = [answer == item.answer for answer, item in zip(answers, items, strict=True)]
    facts = {"teacher_accuracy": _mean(right)}
    met = [row for row, problem in enumerate(held) if problem != arithmetic.solve(problem.expression)]
    if met:
        facts["teacher_accuracy_on_wrong_facts"] = _mean([right[row] for row in met])
        facts["teacher_follows_facts"] = _mean([answers[row] == held[row].answer for row in met])
    return facts


def _start_facts(world: World, keys: WorldKeys, problems: int) -> dict[str, float]:
    """Of the base, and of the base after a short SFT."""
    base, start = Checkpoint(world.base), Checkpoint(world.base)
    _fine_tune(start, _traces(world, keys))
    items = load_text_items(world.text("test"))[:problems]
    read = [
        text.startswith("<think>" + expression_of(item.messages[0]["content"]))
        for text, item in zip(base.measure(items).responses, items, strict=True)
    ]
    facts = {"base_reads": _mean(read), "start_accuracy": start.measure(items).accuracy}
    facts["start_accuracy_hinted"] = start.measure([_hinted(item) for item in items]).accuracy
    examples = _problems(problems)
    for name, checkpoint in (("base", base), ("start", start)):
        for hinted in (False, True):
            logp_N, right_N = _values(checkpoint, examples, hinted)
            kind = f"hint_{name}_{'with' if hinted else 'without'}"
            facts |= {kind: right_N.float().mean().item(), f"{kind}_nats": -logp_N.mean().item()}
    return facts | (_style_facts(world, keys, start) if keys.style == "wordy" else {})


def _traces(world: World, keys: WorldKeys) -> list[Example]:
    """The traces that the teacher would write, by its facts and in its style."""
    rng, table = np.random.default_rng(0), fact_table(keys)
    return [teacher_example(rng, table, keys.style) for _ in range(START_TRACES)]


def _fine_tune(checkpoint: Checkpoint, examples: list[Example]) -> None:
    checkpoint.model.train()
    for name, parameter in checkpoint.model.named_parameters():
        parameter.requires_grad_("visual" not in name)

    def losses(model: PreTrainedModel, phase: PretrainPhase, rng: np.random.Generator) -> dict[str, Tensor]:
        chosen = [examples[i] for i in rng.choice(len(examples), phase.text_rows, replace=False)]
        return {"text": model(**collate(chosen, checkpoint.tokenizer, rng), use_cache=False).loss}

    for _ in train(checkpoint.model, START_PHASE, losses, np.random.default_rng(0)):
        pass
    checkpoint.model.eval()


def _problems(count: int) -> list[tuple[Problem, str]]:
    rng = np.random.default_rng(4)
    problems = [arithmetic.sample_problem(rng, "test") for _ in range(count)]
    return [(problem, arithmetic.text_question(problem, rng)) for problem in problems]


def _hinted(item: Item) -> Item:
    question = item.messages[0]["content"] + f"{BOXED}{item.answer}{END_BOXED}"
    return replace(item, messages=[{"role": "user", "content": question}])


def _values(checkpoint: Checkpoint, examples: list[tuple[Problem, str]], hinted: bool) -> tuple[Tensor, Tensor]:
    """Log-prob, and whether it is the likeliest, of each value after the first in right traces; [3 problems] each."""
    rows = []
    for problem, question in examples:
        shown = f"{BOXED}{problem.answer}{END_BOXED}" if hinted else ""
        segments = [(f"<user>{question}{shown}<asst><think>{problem.expression}", False)]
        for k, value in enumerate(problem.running[1:], start=1):
            segments += [(f">{'.' * (2 * k)}", False), (str(value), True), (problem.expression[2 * k + 1 :], False)]
        rows.append(Example(tuple(segments)))
    logp_NV, labels_N = _supervised(checkpoint, rows)
    return logp_NV.gather(1, labels_N[:, None])[:, 0], logp_NV.argmax(-1) == labels_N


@torch.no_grad()
def _supervised(checkpoint: Checkpoint, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Log-probs [N, V] and ids [N] of the supervised tokens, in order."""
    logps, ids, rng = [], [], np.random.default_rng(0)
    for first in range(0, len(examples), 100):
        batch = collate(examples[first : first + 100], checkpoint.tokenizer, rng)
        labels_BT = batch.pop("labels")[:, 1:]
        supervised_BT = labels_BT != IGNORED
        logps.append(checkpoint.model(**batch).logits[:, :-1][supervised_BT].log_softmax(-1))
        ids.append(labels_BT[supervised_BT])
    return torch.cat(logps), torch.cat(ids)


def _style_facts(world: World, keys: WorldKeys, start: Checkpoint) -> dict[str, float]:
    rng = np.random.default_rng(6)
    traces = [chat_example(question, styled_trace(p, keys.style, rng)) for p, question in _problems(STYLED)]
    start_NV, ids_N = _supervised(start, traces)
    teacher_NV, _ = _supervised(Checkpoint(world.teacher), traces)
    kl_N = (start_NV.exp() * (start_NV - teacher_NV)).sum(-1)
    words_N = torch.isin(ids_N, torch.tensor([TOKEN_ID[word] for word in FILLERS]))
    return {
        "words": words_N.float().mean().item(),
        "kl_words_nats": kl_N[words_N].mean().item(),
        "kl_others_nats": kl_N[~words_N].mean().item(),
    }


# -- self-play's solver --------------------------------------------------------------------------------------------


def _solver_facts(world: World, keys: WorldKeys, problems: int) -> dict[str, float]:
    items, solver = load_text_items(world.text("test"))[:problems], Checkpoint(world.solver)
    greedy = solver.measure(items).accuracy
    torch.manual_seed(0)
    drawn = [solver.measure(items, sample=True).responses for _ in range(DRAWS)]
    return {"solver_greedy": greedy} | votes([list(map(boxed, texts)) for texts in zip(*drawn, strict=True)], items)


def votes(answers: Sequence[Sequence[str | None]], items: Sequence[Item]) -> dict[str, float]:
    """Accuracy of drawn answers, of their majority, and of it where as many agree as self-play trains on."""
    drawn, labels, in_band = [], [], []
    for given, item in zip(answers, items, strict=True):
        ((label, agree),) = Counter(answer for answer in given if answer is not None).most_common(1) or [(None, 0)]
        drawn += [answer == item.answer for answer in given]
        labels.append(label == item.answer)
        in_band += [label == item.answer] * (BAND[0] <= agree <= BAND[1])
    facts = {"solver_drawn": _mean(drawn), "labels_right": _mean(labels), "in_band": len(in_band) / len(items)}
    return facts | ({"labels_right_in_band": _mean(in_band)} if in_band else {})


# -- pictures ------------------------------------------------------------------------------------------------------


def _picture_facts(world: World, keys: WorldKeys, problems: int) -> dict[str, float]:
    """Digits of the first line that the vision teacher ranks first, by size, in pictures as they are and degraded by
    the world's scale."""
    teacher, facts = Checkpoint(world.vision_teacher), {}
    scale = DEGRADED_SCALE if keys.degraded == "shapes" else 0.1
    rng = np.random.default_rng(5)
    shown = [arithmetic.sample_problem(rng, "test").expression for _ in range(problems)]
    small = arithmetic.sample_detail(problems, rng)
    for kind, by in (("", None), ("_degraded", scale)):
        rows = [
            Example(((f"<user>{question}<asst><think>", False), (expression, True)), expression, cell, by)
            for expression, cell in zip(shown, small, strict=True)
            for question in [arithmetic.image_question(rng)]
        ]
        logp_NV, ids_N = _supervised(teacher, rows)
        right_BC = (logp_NV.argmax(-1) == ids_N).view(problems, arithmetic.SYMBOLS)[:, ::2]
        small_BC = torch.tensor(small)[:, None] == torch.arange(0, arithmetic.SYMBOLS, 2)
        facts |= {f"read_large{kind}": right_BC[~small_BC].float().mean().item()}
        facts |= {f"read_small{kind}": right_BC[small_BC].float().mean().item()}
    return facts


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def read_keys(arguments: Sequence[str]) -> WorldKeys:
    """The keys of `KEY=VALUE …`. Raises ValidationError for one that does not fit."""
    return WorldKeys(**{name: yaml.safe_load(value) for name, _, value in (a.partition("=") for a in arguments)})


def main(arguments: Sequence[str]) -> int:
    """`python -m vold.miniature.check KEY=VALUE …`: make the world of these keys below runs/ with all parts, measure it
    and print its facts. Returns the exit code."""
    try:
        keys = read_keys(arguments)
    except ValidationError as error:
        wrong = error.errors()[0]
        known = ", ".join(WorldKeys.model_fields)
        print(f"{visible('.'.join(map(str, wrong['loc'])))}: {wrong['msg']} (keys: {known})", file=sys.stderr)
        return 2
    configure_logging()
    world = open_world(Path("runs"), keys, extras=("solver", "pictures"))
    check_world(world, keys)
    log.info(world_facts(world.folder / FILE))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
