"""The name of an answer: a hash over everything that determines it."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from headrace.types import GenerateRequest

FORMAT = 2
"""Raised whenever the same request would be answered, or stored, in another way."""

_encode = msgspec.msgpack.Encoder(order="deterministic").encode


def answer_key(request: GenerateRequest, *, tenant: str, model: str, fingerprint: str, salt: bytes = b"") -> bytes:
    """32 bytes, the same in every process and on every machine.

    `fingerprint` stands for the weights and the engine's numerics, `salt` for whatever else shapes answers on this server, such as its
    filters. The request's id, deadline and priority don't count. The template's part is in the prompt's tokens. Raises
    `UnicodeEncodeError` for text with half a surrogate pair.
    """
    sampling = request.sampling
    bias: list[tuple[int, float]] = []
    if sampling.logit_bias:
        # The encoder sorts dictionaries by text alone.
        bias = sorted(sampling.logit_bias.items())
        sampling = msgspec.structs.replace(sampling, logit_bias={})
    what = (
        FORMAT,
        salt,
        tenant,
        request.tenant,
        model,
        fingerprint,
        request.prompt,
        request.messages,
        request.text,
        sampling,
        bias,
    )
    return blake2b(_encode(what), digest_size=32).digest()
