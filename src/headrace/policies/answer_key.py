"""The name of an answer: a hash over everything that determines it."""

from __future__ import annotations

from array import array
from hashlib import sha256

import msgspec

from headrace.types import GenerateRequest

FORMAT = 1
"""Raised whenever the same request would be answered, or stored, in another way."""

_encode = msgspec.msgpack.Encoder(order="deterministic").encode


def answer_key(request: GenerateRequest, *, tenant: str, model: str, fingerprint: str, salt: bytes = b"") -> bytes:
    """32 bytes, the same in every process and on every machine.

    `fingerprint` stands for the weights and the engine's numerics, `salt` for whatever else shapes answers on this server, such as its
    filters. The request's id and deadline don't count. The template's part is in the prompt's tokens. Raises `UnicodeEncodeError` for
    text with half a surrogate pair.
    """
    what = (
        FORMAT,
        salt,
        tenant,
        request.tenant,
        model,
        fingerprint,
        array("q", request.prompt).tobytes(),
        request.messages,
        request.text,
        request.sampling,
    )
    return sha256(_encode(what)).digest()
