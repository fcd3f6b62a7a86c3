"""Where requests come from: production traces in the Azure format, or a synthetic mix of the two classes.

A workload is a list of `Arrival` in order of time. It says when a request arrives and how big it is; the
prompt's token ids are drawn at random, because traces hold no text.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path

import numpy as np

from qllm_ops.arguments import is_integer
from qllm_ops.scheduler.request import BE, LS

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?", flags=re.ASCII
)


class TraceError(ValueError):
    """A trace that cannot be read: says file, line, what came and what was wanted."""


@dataclass(frozen=True)
class Arrival:
    """One request of a workload.

    Attributes:
        id: unique in the workload, such as "ls-0" or "be-3".
        priority: 1 (LS) or 0 (BE).
        arrival_s: seconds after the start of the workload.
        prompt_tokens: length of the prompt.
        output_tokens: number of tokens to generate.
    """

    id: str
    priority: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def prompt_ids(arrival: Arrival, vocab_size: int, seed: int) -> list[int]:
    """The prompt of one request: ``prompt_tokens`` ids drawn evenly from ``[0, vocab_size)``.

    The ids depend on the seed, the request's id and its length alone, so a request has the same prompt
    whatever else is in the workload and in whichever process it is made.
    """
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be at least 1, got {vocab_size!r}")
    # Not hash(): Python salts it per process.
    entropy = hashlib.sha256(f"{seed}:{arrival.id}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(entropy, "little"))
    return generator.integers(vocab_size, size=arrival.prompt_tokens).tolist()


def read_azure_trace(
    path: str | Path,
    priority: int,
    prefix: str,
    *,
    duration_s: float | None = None,
    max_requests: int | None = None,
    time_scale: float = 1.0,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
) -> list[Arrival]:
    """Read a trace in the form of the Azure Public Dataset: a row per request, with the columns `COLUMNS`.

    Args:
        path: the CSV file. It is read no further than ``duration_s`` and ``max_requests`` need.
        priority: class of every request in it, 1 (LS) or 0 (BE).
        prefix: ids are ``f"{prefix}-{row}"``, counted from 0.
        duration_s: keep the requests that arrive before this many seconds, counted after ``time_scale``.
        max_requests: keep at most so many.
        time_scale: arrival times are multiplied by this: 0.5 makes the load twice as dense.
        max_prompt_tokens: cut longer prompts to this length; a warning says how many were cut.
        max_output_tokens: the same for outputs.

    Returns:
        Arrivals in order, timed from the first row, which arrives at 0.0.

    Raises:
        TraceError: the file is missing, empty or has a malformed row; the message is ``file:line: ...``.
        ValueError: an argument is out of range.
    """
    _check_priority(priority)
    _check_positive("time_scale", time_scale)
    limits = {"max_requests": max_requests, "max_prompt_tokens": max_prompt_tokens}
    for name, value in {**limits, "max_output_tokens": max_output_tokens}.items():
        if value is not None:
            _check_count(name, value)
    if duration_s is not None:
        _check_positive("duration_s", duration_s)

    arrivals: list[Arrival] = []
    start_ns = None
    for when_ns, prompt_tokens, output_tokens in islice(_rows(Path(path)), max_requests):
        start_ns = when_ns if start_ns is None else start_ns
        arrival_s = (when_ns - start_ns) * 1e-9 * time_scale
        if duration_s is not None and arrival_s >= duration_s:
            break
        arrivals.append(
            Arrival(f"{prefix}-{len(arrivals)}", priority, arrival_s, prompt_tokens, output_tokens)
        )
    if not arrivals:
        raise TraceError(f"{path}: no rows after the header; wanted at least one request")
    arrivals = _cut(arrivals, "prompt_tokens", max_prompt_tokens, path)
    return _cut(arrivals, "output_tokens", max_output_tokens, path)


def synthetic(
    rate: float,
    duration_s: float,
    seed: int,
    *,
    ls_fraction: float = 0.2,
    ls_prompt: tuple[int, int] = (16, 128),
    be_prompt: tuple[int, int] = (1024, 4096),
    ls_output: tuple[int, int] = (8, 32),
    be_output: tuple[int, int] = (8, 32),
) -> list[Arrival]:
    """Poisson arrivals of two classes: short chat turns (LS) among long documents (BE).

    Lengths are log-uniform between their bounds, both included: every factor of two is equally likely, so
    short requests are common and long ones never rare, as in chat and document traces, and nothing piles up
    at a bound as it does when a lognormal is clipped.

    Args:
        rate: arrivals per second, both classes together.
        duration_s: requests arrive in ``[0, duration_s)``.
        seed: the workload is a function of it and of the other arguments. A longer duration only adds
            requests at the end; another ``ls_fraction`` keeps the arrival times.
        ls_fraction: share of requests that are LS; the paper has 20 %.
        ls_prompt, be_prompt, ls_output, be_output: ``(least, most)`` tokens.

    Returns:
        Arrivals in order, ids "ls-0", "ls-1", ... and "be-0", ...; empty if none fell into the duration.
    """
    _check_positive("rate", rate)
    _check_positive("duration_s", duration_s)
    if not 0.0 <= ls_fraction <= 1.0:
        raise ValueError(f"ls_fraction must be from 0 to 1, got {ls_fraction!r}")
    sizes = {LS: (ls_prompt, ls_output), BE: (be_prompt, be_output)}
    for name, bounds in zip(
        ("ls_prompt", "ls_output", "be_prompt", "be_output"), (*sizes[LS], *sizes[BE]), strict=True
    ):
        _check_bounds(name, bounds)

    generator = np.random.default_rng(seed)
    arrivals: list[Arrival] = []
    count = {LS: 0, BE: 0}
    now = 0.0
    while True:
        # Four draws per request, used or not: that is what makes a longer workload extend a shorter one.
        gap, which, prompt, output = generator.random(4)
        now -= math.log1p(-gap) / rate
        if now >= duration_s:
            return arrivals
        priority = LS if which < ls_fraction else BE
        prompt_bounds, output_bounds = sizes[priority]
        name = f"{'ls' if priority == LS else 'be'}-{count[priority]}"
        count[priority] += 1
        arrivals.append(
            Arrival(
                name, priority, now, _log_uniform(prompt, prompt_bounds), _log_uniform(output, output_bounds)
            )
        )


def merge(ls: Iterable[Arrival], be: Iterable[Arrival]) -> list[Arrival]:
    """One workload out of two, in order of time; at equal times ``ls`` comes first and order is kept."""
    together = [*ls, *be]
    seen: set[str] = set()
    for arrival in together:
        if arrival.id in seen:
            raise ValueError(f"the id {arrival.id!r} comes twice; wanted ids that are unique in the workload")
        seen.add(arrival.id)
    return sorted(together, key=lambda arrival: arrival.arrival_s)


# -- reading rows ----------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[int, int, int]]:
    """(time in ns, prompt tokens, output tokens) of each row, read one line at a time."""
    try:
        # utf-8-sig drops a byte order mark; undecodable bytes stay visible in the error message.
        with path.open(encoding="utf-8-sig", errors="backslashreplace") as lines:
            yield from _parse(path, lines)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}; wanted a readable trace file") from error


def _parse(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, int, int]]:
    wanted = ",".join(COLUMNS)
    previous_ns = None
    header = None
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        fields = [field.strip() for field in line.split(",")]
        if header is None:
            header = tuple(fields)
            if header != COLUMNS:
                raise TraceError(f"{where}: the header is {_shown(line)}; wanted {wanted}")
            continue
        if not line.strip():
            continue
        if len(fields) != len(COLUMNS):
            raise TraceError(f"{where}: {len(fields)} fields in {_shown(line)}; wanted 3: {wanted}")
        when_ns = _nanoseconds(where, fields[0])
        if previous_ns is not None and when_ns < previous_ns:
            raise TraceError(
                f"{where}: {fields[0]} is earlier than the row before; wanted rows in order of time"
            )
        previous_ns = when_ns
        yield when_ns, _tokens(where, COLUMNS[1], fields[1]), _tokens(where, COLUMNS[2], fields[2])
    if header is None:
        raise TraceError(f"{path}:1: the file is empty; wanted the header {wanted}")


def _nanoseconds(where: str, text: str) -> int:
    # By hand: datetime holds six fractional digits, the traces have seven.
    match = _TIMESTAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        second, fraction, zone = match.groups()
        whole = datetime.fromisoformat(second + ("+00:00" if zone in (None, "Z") else zone))
    except ValueError:
        raise TraceError(
            f"{where}: TIMESTAMP is {_shown(text)}; wanted one such as 2023-11-16 18:17:03.9799600"
        ) from None
    return int(whole.timestamp()) * 10**9 + int((fraction or "").ljust(9, "0"))


def _tokens(where: str, column: str, text: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", text) is None or int(text) == 0:
        raise TraceError(f"{where}: {column} is {_shown(text)}; wanted a whole number from 1 to 999999999")
    return int(text)


def _shown(text: str) -> str:
    text = text.rstrip("\r\n")
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _cut(arrivals: list[Arrival], field: str, most: int | None, path: str | Path) -> list[Arrival]:
    long = 0 if most is None else sum(getattr(arrival, field) > most for arrival in arrivals)
    if not long:
        return arrivals
    warnings.warn(f"{path}: {field} of {long} of {len(arrivals)} requests cut to {most}", stacklevel=3)
    return [replace(a, **{field: min(getattr(a, field), most)}) for a in arrivals]


# -- small things ----------------------------------------------------------------------------------------


def _log_uniform(u: float, bounds: tuple[int, int]) -> int:
    least, most = bounds
    return min(int(most), int(least * ((most + 1) / least) ** u))


def _check_priority(priority: int) -> None:
    if priority not in (LS, BE):
        raise ValueError(f"priority must be 1 (LS) or 0 (BE), got {priority!r}")


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_count(name: str, value: int) -> None:
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _check_bounds(name: str, bounds: tuple[int, int]) -> None:
    if len(bounds) != 2:
        raise ValueError(f"{name} must be (least, most) tokens, got {bounds!r}")
    for value in bounds:
        _check_count(name, value)
    if bounds[0] > bounds[1]:
        raise ValueError(f"{name} must be (least, most) tokens with least <= most, got {bounds!r}")
