"""Opens the database that a configuration names; whoever starts first makes it, and brings it up to date."""

from __future__ import annotations

import time

from headrace.config import StoreSection
from headrace.errors import ConfigError
from headrace.stores.data_dir import database_url, load_pepper, pepper_check, prepare_data_dir
from headrace.stores.database import Database
from headrace.stores.sql_keys import SqlKeys


async def prepare_stores(store: StoreSection) -> int:
    """Make the data folder, the pepper and the tables where they are missing, for all that is started after this.

    Returns how many keys there are that would work now.

    Raises `ConfigError`, also where the database's keys were made with another pepper, and `StoreUnavailable`.
    """
    folder = prepare_data_dir(store)
    pepper = load_pepper(folder)
    database = Database(database_url(store))
    try:
        await database.migrate()
        keys = SqlKeys(database)
        if not await keys.agree_on_pepper(pepper_check(pepper)):
            raise ConfigError(
                f"The keys in this database were made with another pepper than {folder / 'pepper'}, so none of them would work. "
                "Put the right file back; servers that share a database share a pepper."
            )
        now = time.time()
        return sum(key.revoked_at is None and (key.expires_at is None or key.expires_at > now) for key in await keys.keys())
    finally:
        await database.close()


def open_stores(store: StoreSection) -> tuple[Database, bytes]:
    """The database, once `prepare_stores` has run, and the pepper. Raises `ConfigError`."""
    return Database(database_url(store)), load_pepper(prepare_data_dir(store))
