"""From tokens to money, exactly."""

from __future__ import annotations

from collections.abc import Mapping

from headrace.config import LedgerSection, Price
from headrace.records import UsageRow

_UNITS = 10**6
"""Prices have at most six decimals and are for a million tokens, so one token costs a whole number of 10⁻¹² of the currency's unit."""


class Prices:
    """What rows of usage cost, by the model that served them: in 10⁻¹² of the currency's unit."""

    def __init__(self, section: LedgerSection) -> None:
        self._prices: Mapping[str, tuple[int, int, int]] = {name: _of_a_token(price) for name, price in section.prices.items()}

    def __call__(self, row: UsageRow) -> int | None:
        """None for a model without a price."""
        # That of NAME holds for NAME@VERSION that has none of its own.
        price = self._prices.get(row.model) or self._prices.get(row.model.partition("@")[0])
        if price is None:
            return None
        prompt, cached, completion = price
        return prompt * (row.prompt_tokens - row.cached_tokens) + cached * row.cached_tokens + completion * row.completion_tokens


def _of_a_token(price: Price) -> tuple[int, int, int]:
    """Prompt, cached prompt and completion."""
    cached = price.input if price.cached is None else price.cached
    return int(price.input * _UNITS), int(cached * _UNITS), int(price.output * _UNITS)
