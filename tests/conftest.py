from __future__ import annotations

import pytest

from headrace.config import ModelSection
from headrace.models.resolve import resolve
from headrace.types import ModelFiles


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The default model, from the user's own cache folder; fetched if it isn't there."""
    return resolve(ModelSection())
