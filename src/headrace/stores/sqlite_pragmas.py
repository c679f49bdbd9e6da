"""How a connection to SQLite is set up."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import Any

PAUSE = 0.005
"""Seconds between attempts."""


def set_pragmas(cursor: Any, pragmas: Sequence[str], timeout: float) -> None:
    """Set them, within `timeout` seconds. Raises `sqlite3.Error`.

    SQLite doesn't wait where two connections turn the same new file into a WAL database at once: one is told that it's locked.
    """
    end = time.monotonic() + timeout
    for pragma in pragmas:
        while True:
            try:
                cursor.execute(f"PRAGMA {pragma}")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= end:
                    raise
            time.sleep(PAUSE)
