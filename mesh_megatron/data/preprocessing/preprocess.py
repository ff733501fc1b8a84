"""Preprocess text to Megatron's indexed dataset: worker processes encode blocks of documents, results keep their order.

Memory is bounded by the blocks in flight: at most ``2 * workers + 2`` blocks of 4 MiB (or of one longest document) with
their tokens, and the tokenizer's cache in each worker. Results are the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, Literal

import xxhash
from tqdm import tqdm

from mesh_megatron.config.tokenizer import TokenizerConfig
from mesh_megatron.data.indexed import dtype_for
from mesh_megatron.data.preprocessing.documents import describe
from mesh_megatron.data.preprocessing.encode import Encoder, Job, Result, encode_block, start_worker
from mesh_megatron.data.preprocessing.readers import TRAILING, Block, SplitOptions, read_blocks
from mesh_megatron.data.preprocessing.sources import STDIN, Source
from mesh_megatron.data.preprocessing.writer import DatasetWriter, Progress
from mesh_megatron.data.tokenizers import require_tokenizer
from mesh_megatron.data.tokenizers.base import Tokenizer
from mesh_megatron.data.tokenizers.proof_store import Choice, choose

EXAMPLES = 10
FIX = "fix the input, or leave such documents out with --on-error skip"
_LONGEST_KEY = 128  # bytes: file names have at most 255, and the prefix needs some of them


@dataclass(frozen=True)
class Summary:
    """The result of a run."""

    prefixes: list[str]
    progress: Progress
    reason: str
    """Why gigatoken was not used; empty if it was."""
    seconds: float
    already_there: bool = False
    passed_over: str = ""
    """Files of folders and globs that were not read, as text."""

    def __str__(self) -> str:
        if self.already_there:
            return "\n".join(f"{prefix}: already complete, unchanged" for prefix in self.prefixes)
        tokens = sum(self.progress.tokens.values())
        text = f"{self.progress.documents:,} documents, {tokens:,} tokens in {self.seconds:.1f} s; {self._ways()}"
        if self.progress.empty:
            text += f"\n{self.progress.empty:,} of them without tokens, stored empty as Megatron-LM stores them"
        if self.progress.problems:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.progress.problems.items()))
            text += "\n".join([f"\nleft out: {kinds}; the first of them:", *self.progress.examples])
        if self.passed_over:
            text += f"\nfiles passed over: {self.passed_over}"
        return "\n".join([text, *(f"--data-path {prefix}" for prefix in self.prefixes)])

    def _ways(self) -> str:
        """Describe how many documents each library tokenized."""
        if self.reason:
            return f"all by the tokenizer's own library ({self.reason})"
        rest = self.progress.documents - self.progress.by_gigatoken
        return (
            f"{self.progress.by_gigatoken:,} by gigatoken, {rest:,} by the tokenizer's own library (text on which the "
            "two are not proven equal)"
        )


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Options of ``preprocess``; only ``append_eod`` and, with faults in the input, ``on_error`` change the output."""

    append_eod: bool = False
    workers: int = 1
    backend: Choice = "auto"
    cache_bytes: int = 1 << 30
    on_error: Literal["stop", "skip"] = "stop"
    resume: bool = False
    overwrite: bool = False
    commit_seconds: float = 5.0
    """Seconds between two entries of the journal."""
    show_progress: bool = True


def preprocess(
    sources: Sequence[Source],
    output_prefix: str,
    tokenizer: TokenizerConfig,
    split_options: SplitOptions,
    options: PreprocessOptions,
) -> Summary:
    """Write ``output_prefix_KEY_document.{bin,idx,json}``.

    ``ValueError`` for bad input (it names the file, the line and the fault), for an output that exists, and for one
    that another run is writing. Whatever ends a run, finished blocks are kept for ``resume``.
    """
    start = time.perf_counter()
    vendor = require_tokenizer(tokenizer)
    if options.append_eod and vendor.eod is None:
        raise ValueError(f"--append-eod: --tokenizer-model {vendor.model} has no end of document token")
    if options.resume and any(source.path == STDIN for source in sources):
        raise ValueError("--resume: standard input cannot be read again; give a file")
    plan = _plan(sources, vendor, split_options, options.append_eod)
    targets = _targets(output_prefix, split_options.json_keys)
    output = DatasetWriter(output_prefix, targets, dtype_for(vendor.vocab_size), plan)
    if options.resume and output.finished():
        return Summary(list(targets.values()), output.progress, "", 0.0, already_there=True)
    output.open(resume=options.resume, overwrite=options.overwrite)
    try:
        tasks = _tasks(sources, split_options, output.progress)
        proof = choose(vendor, options.backend)
        job = Job(tokenizer.tokenizer(), split_options, options.append_eod, proof, options.cache_bytes)
        results = _in_order(tasks, sources, job, options.workers)
        try:
            _write(results, sources, output, options)
        finally:
            with contextlib.suppress(OSError):  # a full disk: the last journal entry is used
                output.commit()
        made_with = {"identity": vendor.unique_identifiers, "vocab_size": vendor.vocab_size, "eod": vendor.eod}
        note = {"format": "mesh_megatron", "tokenizer": made_with, "append_eod": options.append_eod}
        prefixes = output.finish(note)
    finally:
        output.close()
    return Summary(prefixes, output.progress, proof.refusal, time.perf_counter() - start)


def _plan(
    sources: Sequence[Source], tokenizer: Tokenizer, split_options: SplitOptions, append_eod: bool
) -> dict[str, Any]:
    """Return everything that determines the output; two runs with the same plan write the same bytes."""
    digest = xxhash.xxh3_128()
    for source in sources:
        digest.update(source.identity())
    return {
        "input": {"files": len(sources), "bytes": sum(s.size for s in sources), "xxh3_128": digest.hexdigest()},
        "tokenizer": tokenizer.unique_identifiers,
        "documents": asdict(split_options),
        "append_eod": append_eod,
    }


def _targets(output_prefix: str, keys: Sequence[str]) -> dict[str, str]:
    """Return the output prefix of each key."""
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"--json-keys {' '.join(keys)}: {key} is listed twice; name each key once")
        if "/" in key or "\0" in key or len(key.encode("utf-8", "replace")) > _LONGEST_KEY:
            raise ValueError(
                f"--json-keys {key}: the output is named {output_prefix}_{key}_document, which cannot name a file; "
                f"rename the key in the input (no / in it, at most {_LONGEST_KEY} bytes)"
            )
    return {key: f"{output_prefix}_{key}_document" for key in keys}


def _tasks(sources: Sequence[Source], split_options: SplitOptions, progress: Progress) -> Iterator[tuple[int, Block]]:
    """Yield (source, block), starting where ``progress`` ends."""
    done = progress.block  # copied now: progress advances while this generator is read ahead
    for index in range(progress.source, len(sources)):
        yield from (
            (index, block) for block in itertools.islice(read_blocks(sources[index], split_options), done, None)
        )
        done = 0


def _in_order(
    tasks: Iterator[tuple[int, Block]], sources: Sequence[Source], job: Job, workers: int
) -> Iterator[tuple[int, int, Result]]:
    """Yield (source, position on disk, result) of each task in order."""
    if workers <= 1:
        encoder = Encoder(job)
        yield from ((index, block.position, encoder(block, sources[index])) for index, block in tasks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (job,))
    waiting: deque[tuple[int, int, Future[Result]]] = deque()
    try:
        for index, block in tasks:
            waiting.append((index, block.position, pool.submit(encode_block, block, sources[index])))
            if len(waiting) >= 2 * workers + 2:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    except BrokenProcessPool as error:
        raise RuntimeError("a worker process died (killed, or out of memory); run again with --resume") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _next(waiting: deque[tuple[int, int, Future[Result]]]) -> tuple[int, int, Result]:
    index, position, future = waiting.popleft()
    return index, position, future.result()


def _write(
    results: Iterator[tuple[int, int, Result]],
    sources: Sequence[Source],
    output: DatasetWriter,
    options: PreprocessOptions,
) -> None:
    """Append results to the output and count lines and problems."""
    progress, last_commit = output.progress, time.monotonic()
    before = list(itertools.accumulate((source.size for source in sources), initial=0))
    bar = tqdm(total=before[-1] or None, unit="B", unit_scale=True, disable=not options.show_progress, mininterval=0.5)
    with bar, contextlib.closing(results):  # type: ignore[type-var]
        bar.update(before[min(progress.source, len(sources) - 1)])
        for index, position, result in results:
            problems = sorted(result.problems, key=lambda problem: problem.line)
            line = progress.line if index == progress.source else 0
            stops = [problem for problem in problems if problem.kind != TRAILING]
            if stops and options.on_error == "stop":
                raise ValueError(f"{describe(stops[0], sources[index], line)}; {FIX}")
            with output.block():
                if index != progress.source:
                    progress.source, progress.block, progress.line = index, 0, 0
                for problem in problems:
                    progress.problems[problem.kind] = progress.problems.get(problem.kind, 0) + 1
                    if len(progress.examples) < EXAMPLES:
                        progress.examples.append(describe(problem, sources[index], line))
                for key, tokens in zip(output.keys, result.keys, strict=True):
                    output.append(key, *tokens)
                progress.block += 1
                progress.line += result.lines
                progress.documents += result.documents
                progress.by_gigatoken += result.by_gigatoken
                progress.empty += result.empty
            bar.update(before[index] + position - bar.n)
            bar.set_postfix(documents=progress.documents, tokens=sum(progress.tokens.values()), refresh=False)
            if time.monotonic() - last_commit >= options.commit_seconds:
                output.commit()
                last_commit = time.monotonic()
