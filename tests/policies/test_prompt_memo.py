from __future__ import annotations

from headrace.policies.prompt_memo import LARGEST, LIFETIME, MOST_CHARACTERS, PromptMemo
from headrace.types import Message


def test_a_prompt_is_remembered_for_a_while() -> None:
    now = [0.0]
    memo = PromptMemo(clock=lambda: now[0])
    key = ("m", 1, (Message(role="user", content="hi"),))
    assert memo.get(key) is None
    memo.put(key, 2, [1, 2, 3])
    found = memo.get(("m", 1, (Message(role="user", content="hi"),)))
    assert found == [1, 2, 3]
    assert found is not None
    found.append(4)
    assert memo.get(key) == [1, 2, 3]
    assert memo.get(("m", 2, key[2])) is None
    now[0] = LIFETIME + 0.1
    assert memo.get(key) is None


def test_what_has_no_hash_and_what_is_too_large_is_not_remembered() -> None:
    memo = PromptMemo()
    called = ("m", (Message(role="assistant", content="", tool_calls=({"id": "1"},)),))
    memo.put(called, 1, [1])
    assert memo.get(called) is None
    memo.put("long", LARGEST + 1, [1])
    assert memo.get("long") is None


def test_memory_is_bounded() -> None:
    memo = PromptMemo()
    each = LARGEST // 2
    for n in range(200):
        memo.put(n, each, [1])
    kept = [n for n in range(200) if memo.get(n) is not None]
    assert kept == [*range(200 - len(kept), 200)]
    assert MOST_CHARACTERS // each - 1 <= len(kept) <= MOST_CHARACTERS // each
