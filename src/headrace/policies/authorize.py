"""Which models a key may use."""

from __future__ import annotations

from collections.abc import Iterable

from headrace.call import Call
from headrace.errors import Forbidden, ModelNotFound
from headrace.records import KeyRecord
from headrace.served import ServedModel, ServedModels
from headrace.unwinding import before


class Authorize:
    """Refuses a model that the caller's key may not use, before any work on the prompt. Raises `Forbidden`, `ModelNotFound`."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    @before
    async def __call__(self, call: Call) -> None:
        if call.caller is not None and call.caller.models:
            asked = call.asked
            if asked is not None and asked[1] == call.model and asked[0] in call.caller.models:
                return  # the key is for the alias, whatever that stands for
            find_for(call.caller, self._models, call.model)


def may_use(key: KeyRecord | None, model: ServedModel, name: str = "") -> bool:
    """A key is for models by any of their names, or for all versions by the name without one; without any it is for all.

    `name`: an alias by which the model is found, which is enough, too.
    """
    return key is None or not key.models or name in key.models or any(each in key.models for each in (*model.names, model.family))


def find_for(key: KeyRecord | None, models: ServedModels, name: str | None) -> ServedModel:
    """The model of that name, the default for None, if the key may use it.

    Raises `Forbidden` and `ModelNotFound`, which name only what the key may use.
    """
    if key is None or not key.models:
        return models.find(name)
    try:
        found = models.find(name)
    except ModelNotFound as error:
        raise ModelNotFound(f"There is no such model here; {_offer(key, models)}", param=error.param) from None
    if not may_use(key, found, name or ""):
        which = f"the model {found.public_name!r}" if name is None else f"the model {name!r}"
        raise Forbidden(f"This key may not use {which}; {_offer(key, models)}", param="model")
    return found


def _offer(key: KeyRecord, models: Iterable[ServedModel]) -> str:
    usable = [name for model in models if may_use(key, model) for name in model.names]
    return f"it may use {', '.join(usable or key.models)}."
