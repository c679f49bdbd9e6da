"""The words of one of several models, its tokenizer and template: loaded when they are first needed, and the model fetched before that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from headrace.errors import HeadraceError
from headrace.models.template import load_template
from headrace.models.tokenizer import load_tokenizer
from headrace.served import ServedModel
from headrace.types import ModelFiles


class WordsLater:
    """What a `ServedModel.bring` is. `want` has the supervisor fetch the model, `done` says that nobody waits for that here any more."""

    def __init__(self, served: ServedModel, want: Callable[[], None], done: Callable[[], None]) -> None:
        self._served = served
        self._want = want
        self._done = done
        self._known: asyncio.Future[None] | None = None
        self._waiting = 0
        self._loading: asyncio.Task[None] | None = None

    @property
    def in_use(self) -> bool:
        """Whether anybody waits."""
        return self._waiting > 0

    async def __call__(self) -> None:
        """Raises `ModelNotLoaded` and `ModelTooLarge`."""
        self._waiting += 1
        try:
            while self._served.files.pending:
                if self._known is None:
                    self._known = asyncio.get_running_loop().create_future()
                self._want()
                # Shielded: a future that is awaited by many must not be cancelled by one.
                await asyncio.shield(self._known)
            if self._served.bring is not None:
                if self._loading is None:
                    self._loading = asyncio.create_task(asyncio.to_thread(self._load), name="words")
                await asyncio.shield(self._loading)
                self._served.bring = None
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._done()

    def known(self, files: ModelFiles) -> None:
        """It is on this machine."""
        self._served.files = files
        known, self._known = self._known, None
        if known is not None and not known.done():
            known.set_result(None)

    def failed(self, error: HeadraceError) -> None:
        """It can't be fetched, or not be loaded."""
        known, self._known = self._known, None
        if known is not None and not known.done():
            known.set_exception(error)
            known.exception()  # whoever waited may have hung up

    def _load(self) -> None:
        files = self._served.files
        if files.kind != "remote":
            template = load_template(files)
            self._served.tokenizer, self._served.template = load_tokenizer(files), template
