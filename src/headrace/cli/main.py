"""The command line. Each command has a file of its own; what is heavy is imported when the command runs."""

from __future__ import annotations

import sys

import typer

from headrace import __version__
from headrace.cli import audit, bench, cache, chat, doctor, errors, keys, models, ps, pull, reload, serve, tenants, usage
from headrace.cli import config as show_config
from headrace.errors import ConfigError, HeadraceError

app = typer.Typer(
    name="headrace",
    help="Serve a language model over HTTP: the OpenAI API with continuous batching on plain CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def headrace(
    version: bool = typer.Option(False, "--version", is_eager=True, help="Print the version and leave.", callback=lambda on: _version(on)),
) -> None:
    """Serve a language model over HTTP: the OpenAI API with continuous batching on plain CPUs."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"headrace {__version__}")
        raise typer.Exit


app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("pull")(pull.pull)
app.add_typer(models.app)
app.command("ps")(ps.ps)
app.command("reload")(reload.reload)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(keys.app)
app.add_typer(tenants.app)
app.add_typer(cache.app)
app.command("audit")(audit.audit)
app.command("usage")(usage.usage)
app.command("errors")(errors.errors)
app.command("config")(show_config.config)


def main() -> None:
    """Run the command line and exit: 0 done, 1 it didn't work, 2 the command or the configuration is wrong."""
    try:
        app()
    except HeadraceError as error:
        sys.stderr.write(f"headrace: {error.message}\n")
        sys.exit(2 if isinstance(error, ConfigError) else 1)
