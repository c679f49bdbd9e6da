"""`headrace bench URL`: the stress test, against any server that speaks the protocol."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from headrace.cli.load import LoadResult


def bench(
    url: str | None = typer.Argument(None, help="The server; default is this machine's, as configured.", show_default=False),
    users: int = typer.Option(16, "--users", "-u", min=1, max=10_000, help="Concurrent users, each with one request at a time."),
    requests: int = typer.Option(128, "--requests", "-n", min=1, max=10_000_000, help="Requests in all."),
    max_tokens: int = typer.Option(64, "--max-tokens", min=1, help="Most tokens to generate for each."),
    prompt_tokens: int = typer.Option(100, "--prompt-tokens", min=1, help="Length of the prompts, about."),
    model: str | None = typer.Option(None, "--model", help="Default is the first that the server lists.", show_default=False),
    key: str | None = typer.Option(None, "--key", help="Bearer token.", show_default=False),
    native: bool = typer.Option(False, "--native", help="Ask /chat/stream instead of /v1/chat/completions."),
    ignore_eos: bool = typer.Option(False, "--ignore-eos", help="Always generate --max-tokens (for servers that know ignore_eos)."),
    seed: int = typer.Option(0, "--seed", help="Another seed makes other prompts."),
    timeout: float = typer.Option(300.0, "--timeout", min=0.1, help="Seconds for one request."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object; times are seconds."),
) -> None:
    """Stress test: concurrent users send streaming requests with prompts that differ, and the figures are printed."""
    if native and ignore_eos:
        raise typer.BadParameter("/chat/stream has no ignore_eos; leave --native or --ignore-eos out.")
    from headrace.cli.load import LoadFailed, run_load, run_quickly
    from headrace.cli.target import target

    server = target(url, key)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Redrawn seldom: the bar shares the cores with the server.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task(f"{users} users", total=requests)
        try:
            result = run_quickly(
                run_load(
                    server.root,
                    users=users,
                    requests=requests,
                    max_tokens=max_tokens,
                    prompt_tokens=prompt_tokens,
                    model=model,
                    key=server.key,
                    api="native" if native else "openai",
                    ignore_eos=ignore_eos,
                    seed=seed,
                    timeout=timeout,
                    on_done=lambda _: progress.advance(task),
                )
            )
        except LoadFailed as error:
            progress.stop()
            typer.echo(f"headrace: {error}", err=True)
            raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(result.figures()))
    else:
        _print_figures(result)
    if not result.succeeded:
        raise typer.Exit(1)


def _print_figures(result: LoadResult) -> None:
    figures = result.figures()
    mean = figures["mean_time"]
    rows = [
        ("Model", str(figures["model"] or "the server's default")),
        ("Requests", str(figures["requests"])),
        ("Users", str(figures["users"])),
        ("Total time", f"{figures['total_time']:.2f} s"),
        ("Mean time", "-" if mean is None else f"{mean:.2f} s"),
        ("QPS", f"{figures['qps']:.2f}"),
        ("Output", f"{figures['output_tokens_per_second']:.1f} tok/s ({figures['output_tokens']} tokens)"),
        ("TTFT p50/p90/p99", _milliseconds(figures["ttft"])),
        ("TPOT p50/p90/p99", _milliseconds(figures["tpot"])),
        ("Errors", str(figures["errors"])),
    ]
    rows += [("", f"{count} × {kind}") for kind, count in figures["errors_by_kind"].items()]
    for title, value in rows:
        typer.echo(f"{title:<18}{value}")


def _milliseconds(percentiles: dict[str, Any]) -> str:
    values = ["-" if value is None else f"{value * 1000:.1f}" for value in percentiles.values()]
    return " / ".join(values) + " ms"
