"""Wheels for a machine without a network: collected here by a manifest, installed there beside what it has.

    python -m benchmarks.gpu_day.wheels [--all]     downloads those of wheels.txt into .gpu-wheels/ and checks them

wheels.txt is pip's requirements format, name==version with the file's SHA-256, which pip verifies at both ends; all are
for CPython 3.12 on x86-64 Linux or for any. --all adds those of wheels-large.txt, for machines with a network: they do
not fit into what may be carried.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MANIFEST, LARGE = HERE / "wheels.txt", HERE / "wheels-large.txt"
FOLDER = ".gpu-wheels"
LIMIT_MIB = 50
"""Of all wheels: 64 MiB may be carried, with the checkout."""
TARGET = ("--python-version=3.12", "--implementation=cp", "--only-binary=:all:", "--no-deps")
PLATFORMS = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17")
SECONDS = 60
"""Of one call of pip without a network."""


def entries(*manifests: Path) -> dict[str, str]:
    """Name -> its line, in the order of the files."""
    lines = [line for path in manifests for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {line.split("==")[0]: line for line in lines}


def collect(folder: Path, *manifests: Path) -> list[Path]:
    """Downloads and verifies the wheels; others in the folder are removed. Raises ValueError where they are too big."""
    fresh = Path(tempfile.mkdtemp(prefix="gpu-wheels-"))
    platforms = [f"--platform=manylinux_{x}_x86_64" for x in PLATFORMS] + ["--platform=manylinux2014_x86_64"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(entries(*manifests).values()))
        file.flush()
        options = (*TARGET, *platforms, "--require-hashes", f"--dest={fresh}", f"--requirement={file.name}")
        subprocess.run([*_pip("download"), *options], check=True)
    wheels = sorted(fresh.glob("*.whl"))
    mib = sum(path.stat().st_size for path in wheels) / 2**20
    if mib > LIMIT_MIB and LARGE not in manifests:
        shutil.rmtree(fresh)
        raise ValueError(f"{FOLDER} would hold {mib:.0f} MiB, at most {LIMIT_MIB} travel: move a line to {LARGE.name}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(fresh, folder)
    print(f"{folder}: {len(wheels)} wheels, {mib:.1f} MiB")
    return sorted(folder.glob("*.whl"))


def install(folder: Path, site: Path) -> dict[str, str]:
    """Installs into `site`, without a network, what this Python lacks. Name -> why it is not there, or "". All in one
    call of pip; where that fails, each alone, so that one that does not fit is missing alone."""
    lines = entries(MANIFEST, LARGE)
    wanted = {name: line for name, line in lines.items() if not _is_installed(name)}
    if not wanted:
        return {}
    there = {name for path in folder.glob("*.whl") for name in [_normal(path.name.split("-")[0])]}
    carried = {name: line for name, line in wanted.items() if _normal(name) in there}
    reasons = {name: f"no wheel in {folder.name}" for name in wanted if name not in carried}
    if carried and _install(list(carried.values()), folder, site):
        reasons |= {name: _install([line], folder, site) for name, line in carried.items()}
    else:
        reasons |= dict.fromkeys(carried, "")
    return {name: reasons[name] for name in wanted}


def _install(lines: list[str], folder: Path, site: Path) -> str:
    """Why pip refused; "" where it did not."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        options = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--require-hashes", "--upgrade")
        where = (f"--find-links={folder.resolve()}", f"--target={site}", f"--requirement={file.name}")
        command = [*_pip("install"), *options, *where]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return type(error).__name__
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (errors or done.stderr.splitlines() or ["pip failed"])[0]


def _pip(verb: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pip",
        verb,
        "--quiet",
        "--disable-pip-version-check",
        *(["--isolated"] if verb == "install" else []),
    ]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the large ones too")
    parser.add_argument("--into", type=Path, default=HERE.parents[1] / FOLDER)
    options = parser.parse_args()
    collect(options.into, *([MANIFEST, LARGE] if options.all else [MANIFEST]))
