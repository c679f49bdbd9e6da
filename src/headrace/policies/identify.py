"""Who calls: fills in the call's tenant and key, unless the HTTP floor has done so already."""

from __future__ import annotations

from headrace.call import Call
from headrace.policies.callers import Callers
from headrace.records import Caller
from headrace.types import PRIORITIES, Priority
from headrace.unwinding import before


class Identify:
    """Sets `call.tenant`, `call.key` and what else the call says of its caller. Raises as `Callers.admit`."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    @before
    async def __call__(self, call: Call) -> None:
        if not call.identified:
            await self.identify(call)

    async def identify(self, call: Call) -> None:
        introduce(call, await self._callers.admit(call.token, call.address, "inference", required=call.key_required))


def introduce(call: Call, caller: Caller) -> None:
    """Tell the call who its caller is."""
    call.identified = True
    call.tenant = caller.number
    highest: Priority = "default" if caller.key is None else caller.key.priority
    call.priority = min(call.priority, highest, key=PRIORITIES.index)
    if caller.key is not None and caller.tenant is not None:
        call.key = caller.key.id
        call.caller = caller.key
        call.caller_tenant = caller.tenant
        call.subject_tenant = caller.tenant.name
