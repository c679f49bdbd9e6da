"""What every route is handed: the models, the journey, and the words to the supervisor."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from headrace.call import Call
from headrace.config import Config
from headrace.control import ModelsAction
from headrace.errors import ModelNotFound, Overloaded
from headrace.http.exchange import Exchange
from headrace.http.wishes import PRIORITY_HEADER, priority_of, timeout_of
from headrace.policies.authorize import find_for
from headrace.policies.identify import introduce
from headrace.served import ServedModel, ServedModels
from headrace.types import Event, Message, Priority, Sampling


class Control(Protocol):
    """What an API process knows of the server around it."""

    @property
    def draining(self) -> bool:
        """True from the moment the server was told to stop."""
        ...

    @property
    def leaving(self) -> bool:
        """True from the moment this process was told to leave, also if others go on: clients shall make new connections."""
        ...

    @property
    def refusing(self) -> bool:
        """True a moment after the server was told to stop: requests that come now are refused."""
        ...

    @property
    def started_at(self) -> float:
        """`time.monotonic()` when the server was started; that clock is the same in all its processes."""
        ...

    async def ps(self) -> dict[str, Any]:
        """The process list that `headrace ps` shows: `{"workers": [...], …}`."""
        ...

    async def reload(self) -> list[str]:
        """Have the configuration read again; the settings that changed, in force for every new connection. Raises `ConfigRefused`."""
        ...


@runtime_checkable
class ControlsModels(Protocol):
    """The supervisor, where it loads and unloads models."""

    async def models(self, action: ModelsAction, model: str = "", watch: float | None = None) -> dict[str, Any]:
        """List the models, show one, or do something with one. Raises `ModelRefused` and `ModelNotFound`."""
        ...


class Runs(Protocol):
    """The journey, as the HTTP floor sees it."""

    def run(self, call: Call) -> AsyncGenerator[list[Event]]:
        """Event batches of one call; closing the generator hangs up. Raises `HeadraceError`s."""
        ...


@dataclass(frozen=True, slots=True)
class Serving:
    """The parts that routes are made with."""

    config: Config
    models: ServedModels
    journey: Runs
    control: Control

    def wishes(self, exchange: Exchange) -> tuple[float | None, Priority]:
        """Seconds that each call of this exchange may take, and how important they are.

        Raises as `call`: what is wrong with the whole request refuses all of its parts.
        """
        if self.control.refusing:
            raise Overloaded("The server is shutting down.", retry_after=5)
        return timeout_of(exchange.timeout), priority_of(exchange.priority)

    def call(
        self,
        exchange: Exchange,
        sampling: Sampling,
        *,
        model: str | None,
        messages: tuple[Message, ...] | None = None,
        text: str | None = None,
        tokens: list[int] | None = None,
        stream: bool = False,
        cache: bool | None = None,
        key_required: bool = False,
    ) -> Call:
        """A new call of this exchange.

        Raises `InvalidParameter` for headers that wish for what isn't there, and `Overloaded` once a server that stops refuses calls.
        """
        timeout, priority = self.wishes(exchange)
        part = len(exchange.calls)
        made = Call(
            id=exchange.id if part == 0 else f"{exchange.id}-{part}",
            route=exchange.route,
            model=model,
            sampling=sampling,
            messages=messages,
            text=text,
            tokens=tokens,
            stream=stream,
            cache=cache,
            cache_control=exchange.cache_control,
            token=exchange.token,
            address=exchange.address,
            key_required=key_required,
            timeout=timeout,
            priority=priority,
            started_at=exchange.started_at,
        )
        if exchange.caller is not None:
            introduce(made, exchange.caller)
        if exchange.priority is not None:
            made.headers[PRIORITY_HEADER.lower()] = made.priority
        if self.models.several:
            self._choose(made, exchange)
        exchange.calls.append(made)
        return made

    def chosen(self, exchange: Exchange, name: str | None) -> ServedModel:
        """The model that this caller's requests for that name go to. Raises `ModelNotFound`."""
        return self.models.choose(name, _caller(exchange))

    def _choose(self, call: Call, exchange: Exchange) -> None:
        name = call.model
        try:
            served = self.chosen(exchange, name)
        except ModelNotFound:
            return  # the journey says so, in words for this caller
        call.model = served.files.name
        if name is not None and name != call.model:
            call.asked = name, call.model
        shadow = self.models.shadow_of(name)
        if shadow is not None and shadow[0] is not served and random.random() < shadow[1]:
            call.shadow = shadow[0].files.name

    def served(self, call: Call) -> ServedModel:
        """The model that answers a call: the one the journey chose, or else the one asked for."""
        return self.models.find(call.served_model or call.model)

    def find(self, exchange: Exchange, name: str | None) -> ServedModel:
        """The model of that name, for a route without a call. Raises `ModelNotFound`, and `Forbidden` where the key isn't for it."""
        return find_for(exchange.caller.key if exchange.caller is not None else None, self.models, name)


def _caller(exchange: Exchange) -> bytes:
    """Who calls, for keeping them with one model: the key, or else the address."""
    caller = exchange.caller
    if caller is None:
        return exchange.address.encode()
    return caller.key.id.encode() if caller.key is not None else b"%d" % caller.number
