"""The key desk as the command line reaches it: the database itself, whether a server runs or not."""

from __future__ import annotations

import asyncio
import getpass
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from headrace.policies.key_desk import KeyDesk
    from headrace.policies.mint import Actor

Result = TypeVar("Result")


def at_the_desk(config: Path | None, work: Callable[[KeyDesk, Actor], Awaitable[Result]]) -> Result:
    """Do something with the configured database's keys, as the operator. Makes the database if this is the first thing done to it.

    Raises `ConfigError`, also where the desk says that the command is wrong, and what else `work` raises.
    """
    from headrace.cli.sources import load
    from headrace.errors import ConfigError, InvalidParameter
    from headrace.policies.key_desk import KeyDesk
    from headrace.policies.mint import Actor
    from headrace.stores.opening import open_stores, prepare_stores
    from headrace.stores.sql_keys import SqlKeys

    store = load(file=config).config.store

    async def run() -> Result:
        await prepare_stores(store)
        database, pepper = open_stores(store)
        try:
            keys = SqlKeys(database)
            return await work(KeyDesk(keys, keys, pepper), Actor(f"cli:{_user()}"))
        except InvalidParameter as error:
            raise ConfigError(error.message) from None
        finally:
            await database.close()

    return asyncio.run(run())


def _user() -> str:
    """The machine's user; behind sudo the one who typed it."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def moment(seconds: float | None) -> str:
    """Unix time for people, in this machine's zone."""
    from datetime import datetime

    return "-" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def limits(shown: dict[str, Any]) -> str:
    """The limits of a key or a tenant, in a few words."""
    words = [f"{shown[name]:,}/min {what}" for name, what in (("rpm", "requests"), ("tpm", "tokens")) if shown[name] is not None]
    if shown["concurrency"] is not None:
        words.append(f"{shown['concurrency']:,} at a time")
    if shown["budget_tokens"] is not None:
        period = shown["budget_period"]
        words.append(f"{shown['budget_tokens']:,} tokens {'in total' if period == 'total' else f'a {period}'}")
    return ", ".join(words) or "none"


UNFOLDED = 10_000
"""Columns of what isn't read on a terminal: a line for each row, for `grep` and its like."""


def table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, header_style="bold", pad_edge=False)
    for number, title in enumerate(titles):
        made.add_column(title, overflow="fold", no_wrap=number == 0)
    for row in rows:
        made.add_row(*map(Text, row))
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=UNFOLDED)).print(made)
