"""Memory that a rank needs for a large set of traces: `python benchmarks/trace_memory.py [--rows N] [--tokens N]`.

Writes N traces as `vold traces` does (Parquet, token ids), then opens and reads them in processes of their own, once
with the memory-mapped table made, once with it found, and once streamed. Memory is RssAnon of /proc/self/status: pages
of mapped files are the kernel's page cache, which it takes back at need, and are given apart (RssFile). Reported is the
difference to the same process before the set is opened.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

SHARD = 1000
READS = 2000  # samples that a process reads, in random order


class Vocabulary:
    """Of the tokenizer nothing is asked but its ids, and a chat template, which it has not."""

    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {"": 151_935}


def write(directory: Path, rows: int, tokens: int) -> None:
    """Shards of random ids; they are links to one file, so that only the memory-mapped table takes room on disk."""
    from vold.data.traces import SCHEMA

    rng = np.random.default_rng(0)
    offsets = pa.array(np.arange(SHARD + 1, dtype=np.int32) * (tokens - 100))
    ids = pa.array(rng.integers(0, 151_936, SHARD * (tokens - 100), dtype=np.int32))
    columns = {
        "prompt_id": [f"p:{row}" for row in range(SHARD)],
        "prompt": ["What is asked?"] * SHARD,
        "gold": ["2"] * SHARD,
        "prompt_ids": pa.array([rng.integers(0, 151_936, 100, dtype=np.int32) for _ in range(SHARD)]),
        "response": ["text"] * SHARD,
        "response_ids": pa.ListArray.from_arrays(offsets, ids),
        "finish_reason": ["stop"] * SHARD,
        "images": pa.array([[]] * SHARD, pa.list_(pa.string())),
        "history": ["[]"] * SHARD,
    }
    directory.mkdir(parents=True)
    first = directory / "shard-00000.parquet"
    parquet.write_table(pa.table(columns, schema=SCHEMA), first)
    for shard in range(1, rows // SHARD):
        (directory / f"shard-{shard:05d}.parquet").hardlink_to(first)


def memory() -> dict[str, float]:
    """MiB of this process: RssAnon, RssFile, and the peak of both together (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM")}


def read(directory: Path, streaming: bool) -> None:
    """Open the set, read some of it, and print the memory that this took."""
    import datasets  # noqa: F401 - counted before the set is opened

    from vold.config.schema import DataConfig, PromptConfig
    from vold.data.traces import load_samples

    before, start = memory(), time.perf_counter()
    settings = {"shuffle": False, "streaming": True} if streaming else {}
    config = DataConfig(path=directory, layout="traces", **settings)
    samples = load_samples(config, Vocabulary(), PromptConfig(), max_tokens=100_000)  # type: ignore[arg-type]
    opened = time.perf_counter() - start
    order = range(READS) if streaming else np.random.default_rng(0).integers(0, len(samples), READS)
    total = sum(len(samples[int(row)].response_ids) for row in order)
    after = memory()
    print(
        json.dumps(
            {
                "rows": len(samples),
                "seconds_to_open": round(opened, 1),
                "ms_a_sample": round((time.perf_counter() - start - opened) / READS * 1e3, 3),
                "tokens_read": total,
                **{f"{name}_MiB": round(after[name] - before[name], 1) for name in before},
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--tokens", type=int, default=8_000)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--streaming", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        return read(options.read, options.streaming)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "traces"
        write(directory, options.rows, options.tokens)
        print(json.dumps({"rows": options.rows, "tokens": options.tokens}))
        for name, more in {"table made": [], "table found": [], "streamed": ["--streaming"]}.items():
            command = [sys.executable, __file__, "--read", str(directory), *more]
            result = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(name, result.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
