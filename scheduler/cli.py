"""The command line: ``qllm replay`` and ``qllm doctor``.

Bad input ends with one line on stderr and exit code 2, a replay or self-test that found something wrong
with exit code 1, Ctrl-C with 130. Anything else that goes wrong is a bug and shows its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

# What brings transformers or matplotlib is imported in the commands, so that --help stays quick.

app = typer.Typer(
    name="qllm",
    help="Urgent and patient requests on one Mixture-of-Experts model, preempted inside a layer.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True, soft_wrap=True, highlight=False)

BAD_INPUT, INTERRUPTED = 2, 130

# typer has a copy of click in newer versions and uses click itself in older ones.
UsageError = typer.BadParameter.__base__


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Backend(str, Enum):
    auto = "auto"
    torch = "torch"
    triton = "triton"


class Gate(str, Enum):
    host = "host"
    stream = "stream"


class Format(str, Enum):
    fp8 = "fp8"
    mxfp4 = "mxfp4"
    int4 = "int4"


def main(args: Sequence[str] | None = None) -> None:
    """The entry point of ``qllm``."""
    try:
        code = app(args=args, prog_name="qllm", standalone_mode=False)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "qllm"
        _complain(f"{error.format_message()} (see {command} --help)")
        code = BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # newer versions of typer return it, older ones raise
        _complain("interrupted")
    sys.exit(code or 0)


def _complain(message: str) -> None:
    err.print(Text.assemble(("error: ", "bold red"), " ".join(message.split())))


def _version(wanted: bool) -> None:
    if wanted:
        import qllm_ops

        out.print(f"qllm {qllm_ops.__version__}", highlight=False)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _qllm(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        out.print(ctx.get_help())


@app.command()
def doctor() -> None:
    """Say what this machine has, which backend is chosen and why, and test the operator with preemption."""
    from qllm_ops.scheduler import doctor

    raise typer.Exit(0 if doctor.examine(out) else 1)


# -- replay ----------------------------------------------------------------------------------------------

MODEL, LOAD, SYNTHETIC, ENGINE, REPORT = "Model", "Load", "Load, where no trace is given", "Engine", "Report"


def _in(panel: str, flag: str, help: str, **more: Any) -> Any:
    return typer.Option(flag, rich_help_panel=panel, help=help, **more)


def _tokens(flag: str, what: str) -> Any:
    return _in(SYNTHETIC, flag, f"Least and most tokens of {what}.", metavar="MIN MAX")


@app.command()
def replay(
    ctx: typer.Context,
    model: Annotated[
        Path | None, _in(MODEL, "--model", "Folder of a Hugging Face MoE model, in safetensors.")
    ] = None,
    preset: Annotated[str, _in(MODEL, "--preset", "Or a small model of random weights, by name.")] = "demo",
    dtype: Annotated[
        Dtype | None,
        _in(MODEL, "--dtype", "Of the weights; by default as stored (presets: float32 on a CPU)."),
    ] = None,
    quantize: Annotated[
        Format | None,
        _in(MODEL, "--quantize", "Of the experts, as they are read; by default as stored."),
    ] = None,
    device: Annotated[
        str | None, _in(MODEL, "--device", '"cpu", "cuda" or "cuda:N"; by default CUDA where there is one.')
    ] = None,
    backend: Annotated[Backend, _in(MODEL, "--backend", "Of the experts.")] = Backend.auto,
    gate: Annotated[
        Gate, _in(MODEL, "--gate", "Where paused work waits on a GPU: in its thread or in its stream.")
    ] = Gate.host,
    threads: Annotated[int | None, _in(MODEL, "--threads", "CPU threads per operation.")] = None,
    policy: Annotated[
        list[str] | None,
        _in(LOAD, "--policy", "Repeatable: fcfs, priority, layer, tile; by default all four."),
    ] = None,
    ls_trace: Annotated[
        Path | None, _in(LOAD, "--ls-trace", "Azure-format CSV of latency-sensitive requests.")
    ] = None,
    be_trace: Annotated[
        Path | None, _in(LOAD, "--be-trace", "Azure-format CSV of best-effort requests.")
    ] = None,
    time_scale: Annotated[
        float, _in(LOAD, "--time-scale", "Stretches the time of traces: 0.5 makes them twice as dense.")
    ] = 1.0,
    max_prompt: Annotated[
        int | None, _in(LOAD, "--max-prompt", "Cut prompts of traces to so many tokens.")
    ] = None,
    max_output: Annotated[
        int | None, _in(LOAD, "--max-output", "Cut outputs of traces to so many tokens.")
    ] = None,
    duration: Annotated[float, _in(LOAD, "--duration", "Seconds in which requests arrive.")] = 13.0,
    max_requests: Annotated[
        int | None, _in(LOAD, "--max-requests", "At most so many requests, the earliest ones.")
    ] = None,
    seed: Annotated[int, _in(LOAD, "--seed", "Of arrivals, prompts and a preset's weights.")] = 0,
    rate: Annotated[float, _in(SYNTHETIC, "--rate", "Arrivals per second, Poisson, both classes.")] = 1.25,
    ls_fraction: Annotated[
        float, _in(SYNTHETIC, "--ls-fraction", "Share of requests that are latency-sensitive.")
    ] = 0.2,
    ls_prompt: Annotated[tuple[int, int], _tokens("--ls-prompt", "an LS prompt")] = (16, 128),
    ls_output: Annotated[tuple[int, int], _tokens("--ls-output", "an LS output")] = (8, 32),
    be_prompt: Annotated[tuple[int, int], _tokens("--be-prompt", "a BE prompt")] = (1024, 4096),
    be_output: Annotated[tuple[int, int], _tokens("--be-output", "a BE output")] = (8, 32),
    kv_tokens: Annotated[
        int, _in(ENGINE, "--kv-tokens", "KV memory in tokens, shared by all requests.")
    ] = 32768,
    kv_reserve: Annotated[
        int | None, _in(ENGINE, "--kv-reserve", "Tokens of it that BE may not take; by default 1/8.")
    ] = None,
    max_batch: Annotated[int, _in(ENGINE, "--max-batch", "Rows of a decode iteration.")] = 8,
    prefill_tokens: Annotated[
        int,
        _in(ENGINE, "--prefill-tokens", "Tokens of a prefill iteration; longer prompts in chunks."),
    ] = 2048,
    top_up_tokens: Annotated[
        int, _in(ENGINE, "--top-up-tokens", "BE prompt tokens that may ride in an LS prefill.")
    ] = 0,
    be_floor: Annotated[
        float, _in(ENGINE, "--be-floor", "Share of contended time that BE is sure of, 0 to below 1.")
    ] = 0.05,
    batch_invariant: Annotated[
        bool,
        _in(
            ENGINE,
            "--batch-invariant",
            "Give a request the tokens that it gets alone, bit by bit, whatever else is served; costs speed.",
        ),
    ] = False,
    aging: Annotated[
        float | None, _in(ENGINE, "--aging", "Age in seconds at which a BE request becomes urgent.")
    ] = None,
    slo: Annotated[
        float | None, _in(REPORT, "--slo", "Bound on LS TTFT, seconds; by default ten decode iterations.")
    ] = None,
    drain_timeout: Annotated[
        float, _in(REPORT, "--drain-timeout", "Seconds after the last arrival at which a run is cut short.")
    ] = 600.0,
    out_dir: Annotated[
        Path, _in(REPORT, "--out", "Folder for report.json, report.png and timeline.json.")
    ] = Path("qllm-replay"),
) -> None:
    """Replay a mixed load under each policy, and the LS requests alone, and compare.

    Open-loop: requests arrive when the load says so, however busy the engine is.

    The load comes from traces, or is made: Poisson arrivals of two classes.
    """
    from qllm_ops.scheduler import replay_command

    # typer wants every option spelled out above; from here on they travel as one record.
    given = {name for name in ctx.params if ctx.get_parameter_source(name).name == "COMMANDLINE"}
    try:
        wrong = replay_command.run(SimpleNamespace(**ctx.params), given, out)
    except replay_command.BadInput as error:
        _complain(str(error))
        raise typer.Exit(BAD_INPUT) from None
    for line in wrong:
        _complain(line)
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
