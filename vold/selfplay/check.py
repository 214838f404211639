"""`vold check selfplay`: the checks that need no GPU and no model's weights."""

from __future__ import annotations

from vold.config.schema import DataConfig, SelfplayConfig
from vold.data.problems import Problem
from vold.data.prompts import build_prompts
from vold.io import configure_logging, log
from vold.models.chat_template import load_chat_tokenizer
from vold.models.tokenizer import load_tokenizer
from vold.planning.check import print_rank_memory
from vold.selfplay.components import check_objectives, request_prompt, training_config
from vold.selfplay.iteration import Iteration


def check_selfplay(config: SelfplayConfig, processes: int) -> None:
    """Show the bytes by rank of both trainings, the same in every iteration, and check that the models and the request
    can be read. Raises ValueError as `vold check rl` does."""
    configure_logging()
    check_objectives({"challenger": config.challenger, "solver": config.solver})
    for checkpoint in (config.embedder, config.coder and config.coder.checkpoint):
        if checkpoint is not None:
            load_tokenizer(checkpoint)
    request = Problem("pose.request", config.pose.request)
    prompt = request_prompt(config.pose, config.prompt)
    build_prompts([request], load_chat_tokenizer(config.student, prompt), prompt)
    data, first = (
        DataConfig(path=config.run_dir / "solver.json", layout="orz"),
        Iteration.of(config.run_dir, config.student, 1),
    )
    for player in ("challenger", "solver"):
        log.info(f"{player}, which trains while the other does not:")
        print_rank_memory(training_config(config, first, player, data), processes)
