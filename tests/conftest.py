"""One CPU thread and no network for every test; `--fast`; the miniature's untrained checkpoints; torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import count
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

TESTS = Path(__file__).parent
pytest_plugins = ("support.stage_world",)
if find_spec("hypothesis"):  # not in the environments of vLLM and of the peers
    from hypothesis import settings

    settings.register_profile("suite", deadline=None)  # no test asserts a wall-clock time
    settings.load_profile("suite")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# What `--fast` leaves out besides: files that are slow, or whose tests start a process by way of what they call.
SLOW = (
    "benchmarks",
    "evaluation/test_vlmevalkit.py",
    "grading/test_grading_cases.py",
    "grading/test_public_faults.py",
    "kernels",
    "miniature/test_miniature_checkpoints.py",
    "miniature/test_miniature_pipeline.py",
    "miniature/test_miniature_second_act.py",
    "miniature/test_miniature_selfplay.py",
    "security/test_hostile_data.py",
    "security/test_hostile_fuzz.py",
    "security/test_hostile_templates.py",
    "security/test_hostile_text.py",
    "selfplay/test_questions.py",
    "selfplay/test_selfplay.py",
    "train",
    "trainer/test_methods_train.py",
)
assert all((TESTS / name).exists() for name in SLOW), "SLOW in tests/conftest.py names a file that is not there"
STARTS_PROCESSES = re.compile(
    r"^(import|from) (subprocess|multiprocessing|chromium|support\.ranks)\b|^from support import .*\branks\b",
    re.M,
)


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="only tests that start no process and are not slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fast"):
        slow = {path for path in {item.path for item in items} if _is_slow(path)}
        starts = {"torchrun", "launch", "stand_in"}
        left_out = {item for item in items if item.path in slow or starts & {*getattr(item, "fixturenames", ())}}
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


@pytest.hookimpl(optionalhook=True)  # a GPU machine may lack xdist
def pytest_xdist_make_scheduler(config, log):
    """A worker takes whole files, which share fixtures; of the file with the longest tests, single ones; of tests/docs,
    which share a process, all."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/docs/"):
                return "tests/docs"
            return nodeid if "test_kernel_interpreter.py" in nodeid else super()._split_scope(nodeid)

    return Files(config, log) if config.getoption("dist") == "loadfile" else None


def _is_slow(path: Path) -> bool:
    return any(path.is_relative_to(TESTS / name) for name in SLOW) or bool(STARTS_PROCESSES.search(path.read_text()))


@pytest.fixture(scope="session")
def layout():
    """tp = pp = dp = 1 in this process."""
    from vold.parallel.launch import initialise, shutdown

    yield initialise(1, 1, seed=0)
    shutdown()


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory) -> Path:
    """An untrained Qwen3 with the miniature's tokenizer and chat template."""
    from vold.miniature import models

    return _saved(models, models.teacher_config(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def tiny_student_dir(tmp_path_factory) -> Path:
    """An untrained Qwen2.5-VL with the miniature's tokenizer, chat template and image processor."""
    from vold.miniature import models

    return _saved(models, models.base_config(), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def tiny_qwen3_vl_dir(tmp_path_factory) -> Path:
    """An untrained Qwen3-VL with the miniature's tokens, but a chat template and a patch size of its own: prompts and
    images become other ids, and fewer, than they do for the student."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from vold.miniature import models
    from vold.miniature.tokenizer import make_tokenizer

    base = models.base_config()
    text = base.text_config.to_dict() | {"head_dim": 32, "model_type": "qwen3_vl_text"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": models.ROPE_THETA, "mrope_section": [6, 5, 5]}
    text["rope_parameters"]["mrope_interleaved"] = True  # as in the published config; vLLM asks, transformers does not
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16}
    vision |= {"out_hidden_size": models.HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **{name: getattr(base, name) for name in ids})
    torch.manual_seed(1)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = models.new_model(base, seed=0).generation_config
    directory = tmp_path_factory.mktemp("qwen3_vl")
    models.save_checkpoint(model, directory)
    processor, tokenizer = models.make_image_processor(), make_tokenizer()
    processor.patch_size = 16
    processor.save_pretrained(directory)
    tokenizer.chat_template = "<w0>" + tokenizer.chat_template
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_qwen3_5_dir(tmp_path_factory) -> Path:
    """An untrained Qwen3.5 with the miniature's tokenizer, chat template and image processor."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    from vold.miniature import models, world

    base = models.base_config()
    text = {name: value for name, value in models._text_settings().items() if name != "tie_word_embeddings"}
    text |= {"num_hidden_layers": 4, "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    rope = {"rope_type": "default", "rope_theta": models.ROPE_THETA, "partial_rotary_factor": 0.5}
    text["rope_parameters"] = rope | {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": world.PATCH}
    vision |= {"out_hidden_size": models.HIDDEN, "num_position_embeddings": 16}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")
    config = Qwen3_5Config(text_config=text, vision_config=vision, **{name: getattr(base, name) for name in ids})
    torch.manual_seed(2)
    model = Qwen3_5ForConditionalGeneration(config)
    model.generation_config = models.new_model(base, seed=0).generation_config
    directory = tmp_path_factory.mktemp("qwen3_5")
    models.save_checkpoint(model, directory)
    return directory


@pytest.fixture(scope="session")
def torchrun():
    """torchrun(processes, *arguments): a script or `-m module` in a clean launch environment, output captured."""

    def run(processes: int, *arguments: str) -> subprocess.CompletedProcess:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        environment = {k: v for k, v in os.environ.items() if k not in ranks} | {"OMP_NUM_THREADS": "1"}
        paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]  # support, benchmarks
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    return run


@pytest.fixture
def launch(tmp_path):
    """As `torchrun`, without a launcher, in processes that have imported everything: seconds of each are saved."""
    from support import ranks

    numbers = count()
    return lambda world, *words: ranks.run_program(world, *words, logs=tmp_path / f"launch-{next(numbers)}")


def _saved(models, config, directory: Path) -> Path:
    models.save_checkpoint(models.new_model(config, seed=0), directory)
    return directory
