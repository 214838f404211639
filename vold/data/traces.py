"""Teacher traces on disk: Parquet with the teacher's own token ids, loadable by `datasets`, never re-tokenised."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet
from transformers import PreTrainedTokenizerBase

from vold.config.schema import DataConfig, PromptConfig
from vold.data.problems import TextTrace, iterate_text_traces
from vold.data.prompts import build_prompt
from vold.data.renderings import Rendering, Rerendering
from vold.data.responses import response_ids
from vold.data.sources import find_files
from vold.data.token_table import TABLE, Batches, TraceStream, TraceTable, open_table
from vold.file_errors import file_error_line
from vold.io import atomic_path, log, one_line, one_line_errors
from vold.jsonl import parse_row
from vold.types import Prompt, Rollout, Sample
from vold.untrusted import as_vold_writes

PART = ".part.jsonl"
IDS = ("prompt_ids", "response_ids")
SCHEMA = pa.schema(
    {
        "prompt_id": pa.string(),
        "prompt": pa.string(),
        "gold": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "response": pa.string(),
        "response_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(),
        "images": pa.list_(pa.string()),
        "history": pa.string(),  # JSON: [role, text] of each turn before the prompt
    }
)
NEEDED = ("prompt_id", "prompt", "gold", *IDS)
ROWS = 64  # of a batch
PREVIEWED = 8  # files whose first rows are rendered before all are read


@dataclass(frozen=True)
class TraceShard:
    """One Parquet file of traces, written when all its prompts are answered. Until then the answers are in a part file
    beside it, one line for each batch that arrived: a line counts only if it is complete, whenever the process was
    killed. Each line, and the Parquet file's footer, hold a digest of the prompts, so that answers to other prompts are
    never mistaken for these."""

    directory: Path
    number: int
    prompts: tuple[Prompt, ...]
    max_tokens: int  # a trace, prompt included, is shorter
    rendering: Rendering | None = None  # of the prompts, kept in the footer

    @property
    def path(self) -> Path:
        return self.directory / f"shard-{self.number:05d}.parquet"

    @property
    def part(self) -> Path:
        return self.path.with_suffix(PART)

    @property
    def is_finished(self) -> bool:
        return self.path.exists()

    @property
    def is_closed(self) -> bool:
        """Finished, and no part file was left behind."""
        return self.is_finished and not self.part.exists()

    def answered(self) -> set[str]:
        """Ids of the prompts that have an answer. Raises ValueError when the answers are to other prompts."""
        if self.is_finished:
            self.counts()
            return {prompt.id for prompt in self.prompts}
        return set(self._answers())

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Append answers to the part file, flushed to disk. Raises ValueError when the file system refuses."""
        answers = [[r.prompt.id, r.finish_reason, r.response_ids.tolist(), r.text] for r in rollouts]
        line = json.dumps({"prompts": self._digest, "answers": answers}) + "\n"
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            with self.part.open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(f"{file_error_line(error) or error}; then continue with --resume") from None

    def repair(self) -> None:
        """Remove the line that a killed process left unfinished, so that the next one does not continue it."""
        if self.part.exists():
            complete_bytes = sum(len(line) for line, _ in self._lines())
            os.truncate(self.part, complete_bytes)

    def finish(self) -> None:
        """Write the kept traces, in the order of the prompts, as Parquet. Prompts without an answer are counted as
        failed."""
        if not self.is_finished:
            self._write_table()
        self.part.unlink(missing_ok=True)

    def _write_table(self) -> None:
        answers, rows = self._answers(), []
        counts = dict.fromkeys(("asked", "kept", "truncated", "too_long", "failed", "sampled_tokens", "kept_tokens"), 0)
        for prompt in self.prompts:
            finish_reason, ids, text = answers.get(prompt.id, (None, (), ""))
            outcome = _outcome(finish_reason, len(prompt.token_ids) + len(ids), self.max_tokens)
            for name, count in (("asked", 1), (outcome, 1), ("sampled_tokens", len(ids))):
                counts[name] += count
            if outcome == "kept":
                counts["kept_tokens"] += len(ids)
                images, history = [str(path) for path in prompt.images], json.dumps(prompt.history)
                row = (prompt.id, prompt.text, prompt.gold, prompt.token_ids, text, ids, finish_reason, images, history)
                rows.append(dict(zip(SCHEMA.names, row, strict=True)))
        facts = {"vold.prompts": self._digest, "vold.counts": json.dumps(counts)}
        if self.rendering is not None:
            facts["vold.rendering"] = self.rendering.to_json()
        self.directory.mkdir(parents=True, exist_ok=True)
        schema = SCHEMA.with_metadata(facts)
        with (
            atomic_path(self.path, durable=True) as partial,
            parquet.ParquetWriter(partial, schema, write_page_checksum=True) as writer,
        ):
            if rows:  # `datasets` cannot read an empty row group
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))

    def counts(self) -> dict[str, int]:
        """Numbers of a finished shard's prompts by outcome, and of tokens. Raises ValueError when its prompts are not
        these."""
        try:
            facts = parquet.read_schema(self.path).metadata or {}
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); delete it to have its prompts answered again"
            ) from None
        self._check_digest(facts.get(b"vold.prompts", b"").decode(), self.path)
        with as_vold_writes(self.path):
            return json.loads(facts[b"vold.counts"])

    def _answers(self) -> dict[str, tuple[str, list[int], str]]:
        """Prompt id -> finish reason, token ids, text."""
        answers = {}
        for _, row in self._lines():
            self._check_digest(row.get("prompts"), self.part)
            with as_vold_writes(self.part):
                answers |= {id: (finish_reason, ids, text) for id, finish_reason, ids, text in row["answers"]}
        return answers

    def _lines(self) -> Iterator[tuple[bytes, dict]]:
        """The part file's complete lines, raw and decoded."""
        if not self.part.exists():
            return
        with self.part.open("rb") as file:
            for line in file:
                row = parse_row(line)
                if row is None or not line.endswith(b"\n"):
                    return
                yield line, row

    @cached_property
    def _digest(self) -> str:
        prompts = [(prompt.id, prompt.token_ids.tolist()) for prompt in self.prompts]
        return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()

    def _check_digest(self, digest: str | None, file: Path) -> None:
        if digest != self._digest:
            raise ValueError(
                f"{file} answers other prompts than data.path now holds; put the file back as it was, or start "
                "another run_dir"
            )


def _outcome(finish_reason: str | None, tokens: int, max_tokens: int) -> str:
    """The outcome of one prompt. The paper keeps complete traces under 8192 tokens."""
    if finish_reason is None:
        return "failed"
    if finish_reason == "length":
        return "truncated"
    return "kept" if tokens < max_tokens else "too_long"


@one_line_errors()
def load_samples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: PromptConfig,
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    length: Callable[[Prompt], int] = lambda prompt: len(prompt.token_ids),
) -> TraceTable | TraceStream:
    """Training sequences of stage 1 with weights still unset: traces of `vold traces` by their token ids, text sets
    tokenised once. Sequences of more than max_tokens are left out, and counted. length: a prompt's tokens, see
    `build_prompts`. Raises ValueError for a file that does not fit."""
    if config.layout == "traces":
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        files = _trace_files(config)
        reader = _TraceReader(tokenizer, vocab_size, stop_ids, _rerendering(files, tokenizer, prompt, vocab_size))
        batches: Batches = partial(_trace_batches, config, files, reader, length)
        key: list = ["traces", vocab_size, *stop_ids]
        if reader.rerender is not None:
            key += [_digest_of(tokenizer), reader.rerender.config.model_dump(mode="json")]
    else:
        batches = _TextBatches(config, tokenizer, prompt.without_grading(), stop_ids, length)
        source = find_files(config)
        files = source.files or sorted(source.folder.rglob("*.arrow"))
        key = [_digest_of(tokenizer), prompt.without_grading().model_dump(), *stop_ids]
    if config.streaming:
        samples: TraceTable | TraceStream = TraceStream(batches, max_tokens)
    else:
        settings = config.model_dump(mode="json", exclude={"cache_dir", "shuffle", "streaming"})
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        samples = TraceTable(open_table(config, batches, [settings, stats, *key]), max_tokens)
    if not samples.rows:
        raise ValueError(
            f"data.path = {config.path} holds no trace: all answers were dropped; card.json there says why"
        )
    if not len(samples):
        raise ValueError(f"{config.path} holds no trace of at most max_tokens = {max_tokens}; raise it")
    if left_out := samples.rows - len(samples):
        log.warning(f"{config.path}: {left_out} of {samples.rows} traces are longer than max_tokens and left out")
    return samples


def _digest_of(tokenizer: PreTrainedTokenizerBase) -> str:
    content = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()


def _rerendering(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, vocab_size: int
) -> Rerendering | None:
    """What renders the traces anew, where they were asked otherwise than this run asks. The first rows of some files
    are rendered at once: what they say of the difference is logged also where a table of all rows is at hand."""
    recorded = {_recorded(file) for file in files}
    if len(recorded) > 1:
        raise ValueError(f"{files[0].parent} holds traces of several renderings; train on one folder at a time")
    rerender = Rerendering.needed(Rendering.from_json(recorded.pop()), tokenizer, prompt)
    if rerender is not None:
        for file in files[:: max(1, len(files) // PREVIEWED)]:
            rerender(_samples(next(_read(file, vocab_size), None)))
    return rerender


def _recorded(file: Path) -> bytes:
    try:
        return (parquet.read_schema(file).metadata or {}).get(b"vold.rendering", b"")
    except (pa.ArrowException, OSError):  # `_read` says what is wrong with the file
        return b""


def _samples(rows: pa.Table | None) -> list[Sample]:
    """The rows as samples, without weights."""
    return [
        Sample(
            Prompt(
                row["prompt_id"],
                row["prompt_ids"],
                row["prompt"],
                row["gold"],
                images=tuple(map(Path, row.get("images") or ())),
                history=tuple(map(tuple, json.loads(row.get("history") or "[]"))),
            ),
            row["response_ids"],
            advantage=0.0,
            pg_weight=0.0,
            kl_weight=0.0,
        )
        for row in (rows.to_pylist() if rows is not None else ())
    ]


@dataclass(frozen=True)
class _TraceReader:
    """Reads a file of traces. rerender: renders their prompts anew; None: as they are. stop_ids: of the student."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    stop_ids: Sequence[int]
    rerender: Rerendering | None

    def rows(self, file: Path) -> Iterator[pa.Table]:
        """Raises ValueError for a file that does not fit, or where a trace ends with a token at which the student does
        not stop."""
        for rows in _read(file, self.vocab_size):
            self._check_ends(rows)
            if self.rerender is not None:
                samples = self.rerender(_samples(rows))
                for name, ids in (
                    ("prompt_ids", [sample.prompt.token_ids for sample in samples]),
                    ("response_ids", [sample.response_ids for sample in samples]),
                ):
                    place = rows.column_names.index(name)
                    rows = rows.set_column(place, name, pa.array(ids, rows.schema.field(name).type))
            yield rows

    def _check_ends(self, rows: pa.Table) -> None:
        if not self.stop_ids:
            return
        responses = rows["response_ids"].combine_chunks()
        last = compute.list_parent_indices(responses).to_numpy()
        ends = set(responses.flatten().to_numpy()[np.flatnonzero(np.diff(last, append=-1))].tolist())
        if foreign := ends - set(self.stop_ids):
            raise ValueError(
                f"traces end with {self.tokenizer.convert_ids_to_tokens(min(foreign))!r} (id {min(foreign)}), at which "
                "the student does not stop: add it to eos_token_id in its generation_config.json (`vold "
                "prepare-student` does)"
            )


# -- batches of rows -----------------------------------------------------------------------------------------------


def _trace_files(config: DataConfig) -> list[Path]:
    files = sorted(config.path.glob("*.parquet")) if config.path.is_dir() else [config.path]
    if unfinished := sorted(config.path.glob(f"*{PART}")):
        raise ValueError(f"{unfinished[0]} is not finished; continue `vold traces` with --resume, or delete it")
    if not files or not files[0].is_file():
        raise ValueError(f"data.path = {config.path} holds no traces; write them first with `vold traces`")
    return files


def _trace_batches(
    config: DataConfig, files: Sequence[Path], reader: _TraceReader, length: Callable[[Prompt], int]
) -> Iterator[pa.RecordBatch]:
    """The rows of traces that `vold traces` wrote, at most `limit`."""
    left = config.limit
    for file in files:
        for batch in reader.rows(file):
            batch = batch if left is None else batch.slice(0, left)
            left = None if left is None else left - len(batch)
            if len(batch):
                yield _with_prompt_tokens(batch, length)
        if left == 0:
            return


def _read(file: Path, vocab_size: int) -> Iterator[pa.Table]:
    """Raises ValueError for a file that `vold traces` did not write, or not with this tokenizer."""
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=False) as table:
            names = [name for name in (*TABLE.names, "history") if name in table.schema_arrow.names]
            for name in (name for name in NEEDED if name not in names):
                raise ValueError(f"{file} is no table of traces ({name} is missing or empty); see data.layout")
            for batch in table.iter_batches(batch_size=ROWS, columns=names):
                schema = pa.schema([SCHEMA.field(name) if name == "history" else TABLE.field(name) for name in names])
                rows = pa.Table.from_batches([batch]).select(names).cast(schema)
                _check_rows(rows, file, vocab_size)
                yield rows
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as traces: {reason}; write it again with `vold traces`") from None


def _check_rows(rows: pa.Table, file: Path, vocab_size: int) -> None:
    for name in NEEDED:
        if rows[name].null_count:
            raise ValueError(f"{file} is no table of traces ({name} is missing or empty); see data.layout")
    for name in IDS:
        bounds = compute.min_max(compute.list_flatten(rows[name])).as_py()
        if not 0 <= (bounds["min"] or 0) <= (bounds["max"] or 0) < vocab_size:
            raise ValueError(
                f"{file}: {name} are {bounds['min']} to {bounds['max']} and the student's tokenizer has {vocab_size} "
                "ids; they are another teacher's traces"
            )


def _with_prompt_tokens(rows: pa.Table, length: Callable[[Prompt], int]) -> pa.RecordBatch:
    """The rows by the schema TABLE. Older traces have no column of images."""
    images = rows["images"].to_pylist() if "images" in rows.column_names else []
    if any(images):
        columns = (rows[name].to_pylist() for name in ("prompt_id", "prompt_ids", "prompt"))
        prompts = [
            Prompt(*cells, images=tuple(map(Path, paths or ()))) for *cells, paths in zip(*columns, images, strict=True)
        ]
        tokens = pa.array([length(prompt) for prompt in prompts], pa.int32())
    else:
        images = [[]] * len(rows)
        tokens = compute.list_value_length(rows["prompt_ids"]).combine_chunks()
    columns = [rows[name].combine_chunks() for name in NEEDED]
    return pa.RecordBatch.from_arrays([*columns, pa.array(images, TABLE.field("images").type), tokens], schema=TABLE)


class _TextBatches:
    """The rows of a text set, tokenised anew at each call; skipped rows are reported at the first."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        prompt: PromptConfig,
        stop_ids: Sequence[int],
        length: Callable[[Prompt], int],
    ):
        self._config, self._tokenizer, self._prompt = config, tokenizer, prompt
        self._stop_ids, self._length = stop_ids, length
        self._report: Callable[[str], None] = log.info

    def __call__(self) -> Iterator[pa.RecordBatch]:
        report, self._report = self._report, lambda line: None
        traces = iterate_text_traces(self._config, report)
        while window := list(islice(traces, ROWS)):
            rows = []
            for trace in window:
                try:
                    rows.append(self._row(trace))
                except ValueError as error:
                    if self._config.on_error == "stop":
                        raise ValueError(f"{error} (data.on_error=skip leaves such rows out)") from None
                    report(one_line(f"skipped {error}"))
            yield pa.RecordBatch.from_pylist(rows, TABLE)

    def _row(self, trace: TextTrace) -> dict:
        """A trace whose response begins and ends as a sampled one does."""
        prompt = build_prompt(trace.problem, self._tokenizer, self._prompt)
        return {
            "prompt_id": prompt.id,
            "prompt": prompt.text,
            "gold": prompt.gold,
            "prompt_ids": prompt.token_ids,
            "response_ids": response_ids(trace.response, prompt, self._tokenizer, self._stop_ids),
            "images": [str(path) for path in prompt.images],
            "prompt_tokens": self._length(prompt),
        }
