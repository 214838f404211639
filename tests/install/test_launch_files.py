"""Dockerfile and configs/launch, as far as a machine without Docker, SLURM and SkyPilot can check them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pins import PROJECT, ROOT, pins
from torch.distributed.run import get_args_parser

from vold.config import load_config, schema

LAUNCH = ROOT / "configs" / "launch"
SLURM, SKYPILOT = LAUNCH / "slurm.sbatch", LAUNCH / "skypilot.yaml"
CONFIGS = {"traces": schema.TracesConfig, "sft": schema.SftConfig, "rl": schema.RlConfig}
# Of SkyPilot's task schema (0.14): the keys used here or likely to be.
SKYPILOT_KEYS = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": dict,
    "envs": dict,
    "secrets": dict,
    "volumes": dict,
    "file_mounts": dict,
    "config": dict,
    "setup": str,
    "run": str,
}
SKYPILOT_RESOURCES = {"infra", "accelerators", "use_spot", "job_recovery", "cpus", "memory", "disk_size", "image_id"}


def test_launch_directory_is_covered():
    assert set(LAUNCH.iterdir()) == {SLURM, SKYPILOT}


# -- Dockerfile ----------------------------------------------------------------------------------------------------


def dockerfile() -> list[tuple[str, list[str]]]:
    """(instruction, words), continuation lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], shlex.split(line)[1:]) for line in lines]


def test_dockerfile_starts_from_a_pinned_image_with_the_vllm_that_is_declared():
    instruction, (image,) = dockerfile()[0]
    assert instruction == "FROM"
    assert image.partition(":")[2] == "v" + pins("constraints-vllm.txt")["vllm"]


def test_dockerfile_copies_what_exists_and_all_that_the_wheel_needs():
    sources = {word for instruction, words in dockerfile() if instruction == "COPY" for word in words[:-1]}
    assert all((ROOT / name).exists() for name in sources)
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "vold", "kernels"} <= sources
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not sources & set(ignored)


def test_dockerfile_installs_extras_that_exist_with_their_constraints():
    (words,) = [words for instruction, words in dockerfile() if instruction == "RUN"]
    extras = re.search(r"\.\[(.*)\]", " ".join(words)).group(1).split(",")
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    assert (ROOT / words[words.index("-c") + 1]).is_file()
    assert {instruction for instruction, _ in dockerfile()} <= {
        "FROM",
        "ENV",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENTRYPOINT",
        "CMD",
    }


# -- shell ---------------------------------------------------------------------------------------------------------


def scripts() -> dict[str, str]:
    """Every shell script of the repository, those inside of YAML too."""
    files = [SLURM, ROOT / ".ci" / "run", ROOT / "tests" / "vllm" / "run.sh"]
    task = yaml.safe_load(SKYPILOT.read_text())
    inner = {f"{SKYPILOT.name}:{key}": "#!/usr/bin/env bash\n" + task[key] for key in ("setup", "run")}
    return {str(path.relative_to(ROOT)): path.read_text() for path in files} | inner


@pytest.mark.parametrize("name", scripts())
def test_script(name, tmp_path):
    file = tmp_path / "script"
    file.write_text(scripts()[name])
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    checks = [["bash", "-n"]] + (
        [[shellcheck, "--exclude=SC2086"]] if shellcheck else []
    )  # $OVERRIDES is split on purpose
    for check in checks:
        answer = subprocess.run([*check, file], capture_output=True, text=True, timeout=60, check=False)
        assert answer.returncode == 0, answer.stdout + answer.stderr


def commented_commands(path: Path, program: str) -> list[list[str]]:
    """Words of the example commands in a file's opening comment."""
    comment = "\n".join(line[2:] for line in path.read_text().splitlines() if line.startswith("# "))
    lines = re.sub(r"\\\n", " ", comment).splitlines()
    return [shlex.split(line) for line in lines if line.split()[:1] == [program]]


def torchrun_words(script: str) -> list[str]:
    """The arguments of a script's torchrun, each shell expansion replaced by 1."""
    script = re.sub(r"\\\n", " ", script)
    (line,) = [line for line in script.splitlines() if "--nnodes" in line]
    line = re.sub(r'"?\$\(.*?\)"|"?\$\{[^}]*\}"?|"\$\w+[^"]*"|\$\w+', "1", line.rstrip(" &"))
    return shlex.split(line[line.index("--nnodes") :])


@pytest.mark.parametrize("path", [SLURM, SKYPILOT], ids=lambda path: path.name)
def test_torchrun_accepts_the_launch(path):
    script = yaml.safe_load(path.read_text())["run"] if path == SKYPILOT else path.read_text()
    parsed = get_args_parser().parse_args(torchrun_words(script))
    assert parsed.module and parsed.training_script == "vold"
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in script  # torch's own 30 s are less than a step
    assert "--resume" in script and "config.yaml" in script


def test_torch_knows_the_shutdown_timeout():
    import inspect

    from torch.distributed.launcher import api

    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in inspect.getsource(api)


FAKE_SRUN = """#!/usr/bin/env bash
trap 'echo saved >> "$LOG"; exit 0' TERM
echo "$@" >> "$LOG"
for _ in {1..600}; do sleep 0.1; done
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node1\\nnode2\\n'; else echo "$@" >> "$LOG"; fi
"""


@pytest.mark.parametrize("before", [False, True], ids=["first", "requeued"])
def test_slurm_job_saves_at_sigterm_and_is_requeued(tmp_path, before):
    """With stand-ins for srun and scontrol: the ranks get SIGTERM, the job waits for them, then asks for a requeue; it
    resumes where the run directory holds a run."""
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    run_dir.mkdir()
    if before:
        (run_dir / "config.yaml").touch()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "vold", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    environment = os.environ | slurm | {"RUN_DIR": str(run_dir), "LOG": str(log)}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    job = subprocess.Popen(["bash", SLURM, "rl", "config.yaml", "steps=3"], env=environment, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # the stand-in is in its loop, the job in its wait
        job.send_signal(signal.SIGTERM)
        job.wait(60)
    finally:
        job.kill()
    launch, *rest = log.read_text().splitlines()
    assert "--nnodes 2" in launch and "--rdzv-endpoint node1:29500" in launch
    assert launch.split(" -m vold ")[1].startswith(f"rl config.yaml steps=3 run_dir={run_dir}")
    assert launch.endswith("--resume") == before
    assert rest == ["saved", "requeue 7"]


# -- paths and keys ------------------------------------------------------------------------------------------------


def test_slurm_examples_name_what_exists():
    commands = commented_commands(SLURM, "sbatch")
    assert len(commands) >= 2
    for words in commands:
        after = words[words.index("configs/launch/slurm.sbatch") + 1 :]
        verb, config, *overrides = after
        load_config(CONFIGS[verb], ROOT / config, [*overrides, "run_dir=runs/a"])


def test_slurm_directives():
    """Grace between SIGTERM and the limit exceeds torchrun's; a requeued job appends to its log."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE)
    options = dict(lines)
    assert {"requeue", "open-mode", "nodes", "gpus-per-node", "time"} <= options.keys()
    assert options["ntasks-per-node"] == "1"
    grace = int(options["signal"].removeprefix("B:TERM@"))
    assert grace > int(re.search(r"SHUTDOWN_TIMEOUT:-(\d+)", SLURM.read_text()).group(1))


def test_skypilot_task():
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task.keys() <= SKYPILOT_KEYS.keys()
    assert all(isinstance(task[key], SKYPILOT_KEYS[key]) for key in task)
    assert task["resources"].keys() <= SKYPILOT_RESOURCES
    assert task["resources"]["job_recovery"].keys() <= {"strategy", "max_restarts_on_errors"}
    grace = task["config"]["kubernetes"]["pod_config"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(re.search(r"SHUTDOWN_TIMEOUT=(\d+)", task["run"]).group(1))


def test_skypilot_examples_name_what_exists():
    defaults = yaml.safe_load(SKYPILOT.read_text())["envs"]
    commands = commented_commands(SKYPILOT, "sky")
    assert len(commands) >= 2
    for words in commands:
        assert (ROOT / words[3]).is_file()
        given = dict(word.split("=", 1) for option, word in pairwise(words) if option == "--env")
        assert given.keys() <= defaults.keys()
        values = defaults | given
        load_config(
            CONFIGS[values["VERB"]],
            ROOT / values["CONFIG"],
            [*values["OVERRIDES"].split(), f"run_dir={values['RUN_DIR']}"],
        )
