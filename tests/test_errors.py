"""Errors cross the socket from a worker and come out as they were."""

from __future__ import annotations

import pytest

from headrace import errors
from headrace.errors import BadRequest, HeadraceError, TooManyTokens, revive
from headrace.http.problems import InvalidBody  # derived from them, with a code of theirs

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HeadraceError) and kind is not TooManyTokens]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_a_workers_error_comes_back_as_what_it_was(kind: type[HeadraceError]) -> None:
    revived = revive(kind.code, "why", "field", 2.5)
    assert (type(revived), revived.message, revived.param, revived.retry_after) == (kind, "why", "field", 2.5)


def test_errors_of_other_modules_never_stand_in() -> None:
    assert InvalidBody.code == BadRequest.code
    assert type(revive("invalid_request", "why")) is BadRequest
    assert type(revive("too_many_tokens", "why")) is type(revive("of a later version", "why")) is HeadraceError
