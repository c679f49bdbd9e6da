"""The tokenizer of the echo engine: a token a byte, and a few control tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from headrace.errors import InvalidParameter, TooManyTokens
from headrace.models.control_tokens import ControlToken
from headrace.models.token_stream import TokenBytes
from headrace.ports import TokenStream

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ByteTokenizer:
    """256 byte tokens, then the control tokens."""

    def __init__(self) -> None:
        table = [bytes([value]) for value in range(256)] + [name.encode() for name in CONTROL]
        self._tokens = TokenBytes(table, frozenset(range(256, len(table))))

    @property
    def vocab_size(self) -> int:
        return 256 + len(CONTROL)

    @property
    def bos_ids(self) -> tuple[int, ...]:
        return ()

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({256, 258})

    @property
    def controls(self) -> Mapping[str, ControlToken]:
        return {name: ControlToken(256 + index) for index, name in enumerate(CONTROL)}

    def at_least(self, text: str) -> int:
        return len(text)

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        if limit is not None and len(text) > limit:
            raise TooManyTokens(len(text))
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidParameter("The text holds half of a surrogate pair, which is no character.") from None
        if limit is not None and len(raw) > limit:
            raise TooManyTokens(len(raw))
        return list(raw)

    def encode_after_control(self, text: str, *, limit: int | None = None) -> list[int]:
        return self.encode(text, limit=limit)

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join([self.token_bytes(token) for token in tokens]).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise InvalidParameter(f"{token} is not a token id; there are {self.vocab_size}.", param="tokens")
        raw = self._tokens.table[token]
        assert raw is not None
        return raw

    def stream(self) -> TokenStream:
        return self._tokens.stream()
