from __future__ import annotations

from collections.abc import Iterator

import pytest

from headrace.config import ModelSection
from headrace.models.engine_choice import Machine
from headrace.models.resolve import resolve
from headrace.types import ModelFiles
from real_servers import PostgresServer, RedisServer


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _data_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No server that a test starts touches the user's own keys and bills."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run wherever a GPU is, and say why where they don't."""
    if Machine.found().gpus == 0:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The default model, from the user's own cache folder; fetched if it isn't there."""
    return resolve(ModelSection())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One for the whole run: who stops it needs one of his own."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def postgres_url(postgres_server: PostgresServer) -> str:
    """A database that all tests share; `postgres_server.new_database()` makes an empty one."""
    return postgres_server.url


@pytest.fixture
def empty_postgres_url(postgres_server: PostgresServer) -> str:
    return postgres_server.new_database()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One for the whole run: who stops it needs one of his own."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    """Shared by all tests: use keys with a prefix of your own, or flush."""
    return redis_server.url
