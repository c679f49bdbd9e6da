"""Transactions on SQLite that are known whole before they begin: one way to a thread and back, instead of one for each statement."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from headrace.stores.lone_thread import LoneThread
from headrace.stores.sqlite_pragmas import set_pragmas

PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON")
"""Of every connection. FULL: what was committed survives the loss of power, which bills have to."""


class SqliteThread:
    """A thread with a connection of its own. `timeout`: seconds that it waits for another process's transaction."""

    def __init__(self, path: str, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._thread = LoneThread("sqlite")
        self._connection: sqlite3.Connection | None = None

    async def run(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """One transaction, with the write lock from its beginning. Raises `sqlite3.Error`; then nothing of it is there.

        Whoever stops waiting for it doesn't end it.
        """
        await self._thread.do(lambda: self._transact(work))

    def close(self) -> None:
        """Waits for what is under way. Idempotent."""
        self._thread.close()
        self._let_go()

    def _transact(self, work: Callable[[sqlite3.Connection], None]) -> None:
        connection = self._connection
        try:
            if connection is None:
                connection = self._connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            work(connection)
            connection.execute("COMMIT")
        except BaseException:
            # That ends the transaction as well; the next one finds whatever the path leads to by then.
            self._let_go()
            raise

    def _open(self) -> sqlite3.Connection:
        # Transactions begin where we say: no isolation level. Only one thread at a time has it, but `close` may be called by another.
        connection = sqlite3.connect(self._path, timeout=self._timeout, isolation_level=None, check_same_thread=False)
        set_pragmas(connection, PRAGMAS, self._timeout)
        return connection

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
