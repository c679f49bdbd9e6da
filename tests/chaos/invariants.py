"""What must be true of every request and every bill, whatever was done to the server meanwhile. Each function tells what isn't."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from chaos.books import Row
from chaos.load import Asked
from chaos.witness import Made

NEVER = {"internal_error", "request_failed", "engine_died", "upstream_error", "request_quarantined", "circuit_open", "engine_unavailable"}
"""Codes that nobody may get for what is done to processes and stores here: engines come back long before anybody gives up."""
LIMITS = {"rate_limited"}
TOO_LATE = {"deadline_exceeded", "deadline_unmeetable"}
CUT_WITHIN = 1.0
"""Seconds between the death of an API process and the end of what its clients read."""


def ends_are_right(asked: list[Asked], api_deaths: list[float]) -> Iterator[str]:
    """Every request is complete, or was ended by one typed error, or was in the hands of a process that was killed."""
    for each in asked:
        for nonsense in each.nonsense:
            yield f"{each}: {nonsense}"
        # Who reads nothing for too long is cut off.
        if each.broken and each.kind != "deaf" and not any(each.begun - CUT_WITHIN <= death <= each.over for death in api_deaths):
            yield f"{each}: the connection broke ({each.broken}) and no API process was killed meanwhile"
        if len(each.errors) > 1 or (each.errors and each.done):
            yield f"{each}: more than one end: {each.errors}, {each.done} times done"
        for code in each.errors:
            if code in NEVER or (code in LIMITS and not each.key.limited) or (code in TOO_LATE and each.kind != "deadline"):
                yield f"{each}: ended with {code}"


def texts_are_whole(asked: list[Asked]) -> Iterator[str]:
    """No token is lost, none comes twice, none is somebody else's."""
    for each in asked:
        if each.kind == "bad":
            continue
        wanted = each.text if each.kind != "deaf" else each.text * (1 + 2000 // len(each.text))
        complete = each.end == "complete"
        for index in range(each.choices):
            said, finish = each.said.get(index, ""), each.finishes.get(index)
            cut = finish == "length" and (each.kind == "deaf" or (each.limit_note and each.key.limited))
            if not wanted.startswith(said.rstrip("\N{REPLACEMENT CHARACTER}") if cut else said):
                common = next((at for at, (one, other) in enumerate(zip(said, wanted, strict=False)) if one != other), len(wanted))
                yield f"{each}: choice {index} is wrong from character {common}: {said[common : common + 40]!r}"
            elif complete and not cut and (said != wanted or finish != "stop"):
                yield f"{each}: choice {index} ended as {finish!r} after {len(said)} of {len(wanted)} characters"
        if complete and (each.done != 1 or each.total is None):
            yield f"{each}: complete, and {each.done} times done, with usage {each.total}"
        if complete and each.total is not None and not each.limit_note and each.kind not in ("deaf", "repeated"):
            completion = len(each.text.encode()) * each.choices
            if each.total <= completion:
                yield f"{each}: it was told {each.total} tokens, and got {completion}"


def ledger_equals_engine(asked: list[Asked], account: dict[str, Made], ledger: list[Row]) -> Iterator[str]:
    """Every request that an engine worked for has one row, which says what the engine made."""
    rows = {row.id: row for row in ledger}
    if len(rows) < len(ledger):
        yield f"{len(ledger) - len(rows)} rows are there twice"
    for row in ledger:
        if row.settled_at is None:
            yield f"{row} is not settled"
    yield from _marks_are_single(account)
    clients = {each.id: each for each in asked if each.id}
    by_mark = {each.mark: each for each in asked if each.kind != "repeated"}
    for id, made in account.items():
        row, client = rows.get(id), clients.get(id) or by_mark.get(made.mark)
        if row is None:
            yield f"{client or id}: an engine made {len(made.tokens)} tokens for it, and it has no row"
        elif not made.mark.startswith("9999."):
            yield from _row_is_right(row, made, client)
    for row in ledger:
        if row.id in account:
            continue
        client = clients.get(row.id)
        if (client is None or client.kind != "repeated") and (row.completion or row.prompt):
            yield f"{row}: no engine worked for it"
    for each in clients.values():
        if each.end == "complete" and each.id not in rows:
            yield f"{each}: complete, and has no row"


def _marks_are_single(account: dict[str, Made]) -> Iterator[str]:
    seen: defaultdict[str, list[str]] = defaultdict(list)
    for id, made in account.items():
        if made.mark != "-" and not made.mark.startswith("9999."):
            seen[made.mark].append(id)
    for mark, ids in seen.items():
        if len(ids) > 1:
            yield f"<{mark}> was made for {len(ids)} requests: {ids}"


def _row_is_right(row: Row, made: Made, client: Asked | None) -> Iterator[str]:
    who = f"{client or row.id}, billed {row.prompt} + {row.completion} as {row.status}"
    count = len(made.tokens)
    received = 0 if client is None else client.received
    if client is not None and client.end == "complete":
        # One that was interrupted was settled for a process that died before it could. One whose budget ended was told what came until
        # then, and the engine made a little more before it stopped.
        told, billed = client.total or 0, row.prompt + row.completion
        if row.status not in ("ok", "interrupted") or billed < told or (billed > told and not (client.limit_note and client.key.limited)):
            yield f"{who}: the client was told {client.total} in all"
    if row.completion > count:
        yield f"{who}: engines made only {count}"
    if row.completion < received:
        yield f"{who}: the client received {received} bytes of text"
    if len(made.workers) == 1 and made.ended and row.completion != count:
        yield f"{who}: its one engine made {count}"
    if row.prompt != made.prompt and (row.prompt or row.completion):
        yield f"{who}: its prompt has {made.prompt} tokens"


def ends_of(asked: list[Asked]) -> str:
    """How many requests of each kind ended how, as a table."""
    kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for each in asked:
        kinds[each.kind][each.end] += 1
    return "\n".join(f"  {kind:<18}{dict(ends.most_common())}" for kind, ends in sorted(kinds.items()))
