"""Teacher traces on disk: Parquet with the teacher's own token ids, loadable by `datasets`, never re-tokenised."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet
from transformers import PreTrainedTokenizerBase

from vold.config.schema import DataConfig, PromptConfig
from vold.data.problems import TextTrace, load_text_traces
from vold.data.prompts import build_prompt
from vold.data.responses import response_ids
from vold.io import atomic_path, log, one_line_errors
from vold.jsonl import parse_row
from vold.types import Prompt, Rollout, Sample, TokenIds

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
    }
)
READ = pa.schema([field for field in SCHEMA if field.name not in ("response", "finish_reason")])  # what training needs


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
            raise ValueError(f"{error}; make room, then continue with --resume") from None

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
                row = (prompt.id, prompt.text, prompt.gold, prompt.token_ids, text, ids, finish_reason)
                rows.append(dict(zip(SCHEMA.names, row, strict=True)))
        facts = {"vold.prompts": self._digest, "vold.counts": json.dumps(counts)}
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
        return json.loads(facts[b"vold.counts"])

    def _answers(self) -> dict[str, tuple[str, list[int], str]]:
        """Prompt id -> finish reason, token ids, text."""
        answers = {}
        for _, row in self._lines():
            self._check_digest(row["prompts"], self.part)
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

    def _check_digest(self, digest: str, file: Path) -> None:
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
) -> Sequence[Sample]:
    """Training sequences of stage 1 with weights still unset: traces of `vold traces` by their token ids, public text
    sets tokenised once. Sequences of more than max_tokens are left out. Raises ValueError for a file that does not
    fit."""
    if config.layout == "traces":
        samples = _Traces(_table(config, max(tokenizer.get_vocab().values()) + 1), max_tokens)
        rows = samples.rows
    else:
        prompt = prompt.without_grading()
        all_samples = [_from_text(trace, tokenizer, prompt, stop_ids) for trace in load_text_traces(config)]
        samples = [s for s in all_samples if len(s.prompt.token_ids) + len(s.response_ids) <= max_tokens]
        rows = len(all_samples)
    if not samples:
        raise ValueError(f"{config.path} holds no trace of at most max_tokens = {max_tokens}; raise it")
    if len(samples) < rows:
        log.warning(f"{config.path}: {rows - len(samples)} of {rows} traces are longer than max_tokens and left out")
    return samples


class _Traces(Sequence[Sample]):
    """Samples made from the rows of a table on access: all of them at once would take more memory."""

    def __init__(self, table: pa.Table, max_tokens: int):
        lengths = compute.add(*(compute.list_value_length(table[name]) for name in IDS))
        self._table, self._kept = table, compute.indices_nonzero(compute.less_equal(lengths, max_tokens))
        self.rows = len(table)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        row = self._kept[index].as_py()
        prompt_ids, response_ids = (self._table[name][row].values.to_numpy() for name in IDS)
        id, text, gold = (self._table[name][row].as_py() for name in ("prompt_id", "prompt", "gold"))
        return _sample(Prompt(id, prompt_ids, text, gold), response_ids)


def _table(config: DataConfig, vocab_size: int) -> pa.Table:
    files = sorted(config.path.glob("*.parquet")) if config.path.is_dir() else [config.path]
    if unfinished := sorted(config.path.glob(f"*{PART}")):
        raise ValueError(f"{unfinished[0]} is not finished; continue `vold traces` with --resume, or delete it")
    if not files or not files[0].is_file():
        raise ValueError(f"data.path = {config.path} holds no traces; write them first with `vold traces`")
    table = pa.concat_tables([_read(file, vocab_size) for file in files]).slice(0, config.limit)
    if not len(table):
        raise ValueError(
            f"data.path = {config.path} holds no trace: all answers were dropped; card.json there says why"
        )
    return table


def _read(file: Path, vocab_size: int) -> pa.Table:
    """Raises ValueError for a file that `vold traces` did not write, or not with this tokenizer."""
    try:
        table = parquet.read_table(file, schema=READ, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as traces: {reason}; write it again with `vold traces`") from None
    for name in READ.names:
        if table[name].null_count:
            raise ValueError(f"{file} is no table of traces ({name} is missing or empty); see data.layout")
    for name in IDS:
        bounds = compute.min_max(compute.list_flatten(table[name])).as_py()
        if len(table) and not 0 <= (bounds["min"] or 0) <= (bounds["max"] or 0) < vocab_size:
            raise ValueError(
                f"{file}: {name} are {bounds['min']} to {bounds['max']} and the student's tokenizer has {vocab_size} "
                "ids; they are another teacher's traces"
            )
    return table


def _from_text(
    trace: TextTrace, tokenizer: PreTrainedTokenizerBase, config: PromptConfig, stop_ids: Sequence[int]
) -> Sample:
    """A sample whose response begins and ends as a sampled one does."""
    prompt = build_prompt(trace.problem, tokenizer, config)
    return _sample(prompt, response_ids(trace.response, prompt, tokenizer, stop_ids))


def _sample(prompt: Prompt, response_ids: TokenIds) -> Sample:
    return Sample(prompt, response_ids, advantage=0.0, pg_weight=0.0, kl_weight=0.0)
