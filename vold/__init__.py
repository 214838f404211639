"""vold: train vision-language models to reason from text alone (VOLD, two stages).

    import vold

    config = vold.load_config("rl.yaml", "objective.beta=0.1")
    vold.train_rl(config)

load_config      a YAML file and overrides -> the frozen config of its stage
train_sft        stage 1: maximum likelihood on traces
train_rl         stage 2: GRPO and on-policy distillation on the student's own rollouts
evaluate         accuracy of a checkpoint on text and image problems
build_objective  `objective` section of a config -> Objective
Objective        an algorithm as a value: advantage, routing, ratio, normaliser, schedule, numbers
PRESETS          name of a method -> Objective
Grader           verdicts on boxed answers, in worker processes that can be killed

Each name is imported when it is first used: `import vold` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vold.api import load_config
    from vold.evaluation.evaluator import evaluate
    from vold.grading import Grader
    from vold.objectives import PRESETS, Objective, build_objective
    from vold.train.rl import train_rl
    from vold.train.sft import train_sft

    __version__: str

__all__ = [
    "PRESETS",
    "Grader",
    "Objective",
    "__version__",
    "build_objective",
    "evaluate",
    "load_config",
    "train_rl",
    "train_sft",
]

_MODULES = {
    "PRESETS": "vold.objectives",
    "Grader": "vold.grading",
    "Objective": "vold.objectives",
    "build_objective": "vold.objectives",
    "evaluate": "vold.evaluation.evaluator",
    "load_config": "vold.api",
    "train_rl": "vold.train.rl",
    "train_sft": "vold.train.sft",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value = version("vold")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'vold' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for tab completion: neither helpers nor the imports of this file."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
