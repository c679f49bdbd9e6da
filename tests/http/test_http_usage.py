from __future__ import annotations

from decimal import Decimal
from typing import Any

import httpx
import pytest
from http_access_stand import house
from serving_echo import client

from headrace.policies.bill import as_csv, groups_of
from headrace.records import UsageLine, UsageRow
from headrace.stores.ledger_memory import MemoryLedger

pytestmark = pytest.mark.anyio

DAY = 86400.0


def row(number: int, **more: Any) -> UsageRow:
    usual: dict[str, Any] = {
        "opened_at": DAY * number,
        "settled_at": DAY * number,
        "tenant": "acme",
        "model": "m",
        "completion_tokens": number,
    }
    return UsageRow(id=str(number), **usual | more)


async def bill(http: httpx.AsyncClient, secret: str, path: str) -> Any:
    answer = await http.get(path, headers={"Authorization": f"Bearer {secret}"})
    assert answer.headers["content-type"] == "application/json"
    return answer.json()["usage"] if answer.status_code == 200 else answer.status_code


async def test_who_sees_what() -> None:
    ledger = MemoryLedger()
    made = house(ledger, auth="keys")
    acme = await made.key("acme", {"inference"}, tenant="acme")
    own = await made.key("own", {"admin"}, tenant="acme")
    every = await made.key("every", {"admin"})
    await ledger.write([], [row(1, key=made.ids["acme"]), row(2, key=made.ids["own"]), row(4, key="key_x", tenant="other", model="n")])
    async with client(made.stand) as http:
        assert [line["completion_tokens"] for line in await bill(http, acme, "/usage")] == [1]
        assert await bill(http, acme, "/usage?model=n") == []
        assert await bill(http, acme, "/admin/usage") == 403
        assert await bill(http, acme, f"/usage?key={made.ids['own']}") == 400
        assert await bill(http, own, "/usage") == 403
        assert [line["completion_tokens"] for line in await bill(http, own, "/admin/usage")] == [3]
        assert await bill(http, own, "/admin/usage?tenant=other") == 403
        assert [line["completion_tokens"] for line in await bill(http, every, "/admin/usage")] == [7]
        lines = await bill(http, every, "/admin/usage?group_by=tenant,day")
        assert [(line["tenant"], line["day"], line["total_tokens"]) for line in lines] == [
            ("acme", "1970-01-02", 1),
            ("acme", "1970-01-03", 2),
            ("other", "1970-01-05", 4),
        ]
        assert [line["completion_tokens"] for line in await bill(http, every, "/admin/usage?since=1970-01-03&until=1970-01-05")] == [2]
        for wrong in ("group_by=week", "since=yesterdayish", "format=xml", "colour=red"):
            assert await bill(http, every, f"/admin/usage?{wrong}") == 400


async def test_without_a_ledger_there_is_no_bill() -> None:
    made = house(None, auth="keys")
    secret = await made.key("k", {"usage"})
    async with client(made.stand) as http:
        assert await bill(http, secret, "/usage") == 404


async def test_groups_are_checked() -> None:
    assert groups_of(" day , model") == ("day", "model")
    assert groups_of("") == ()
    for wrong in ("week", "day,day"):
        with pytest.raises(ValueError):
            groups_of(wrong)


async def test_csv_is_safe_in_a_spreadsheet() -> None:
    line = UsageLine(
        group={"model": "=cmd()", "tenant": 'a,"b"'},
        requests=1,
        prompt_tokens=2,
        cached_tokens=0,
        completion_tokens=3,
        price=Decimal("1E-7"),
        currency="EUR",
    )
    titles, values = as_csv(("model", "tenant"), [line]).splitlines()
    assert titles == "model,tenant,requests,prompt_tokens,cached_tokens,completion_tokens,total_tokens,price,currency"
    assert values == '\'=cmd(),"a,""b""",1,2,0,3,5,0.0000001,EUR'
