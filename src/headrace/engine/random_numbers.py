"""Random numbers by counter: the one for a token depends on its seed, choice and position, and on nothing else.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): its n-th number is a
mix of key + n × γ, so that any position is had without those before it, after a preemption or in any batch.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_CHOICE = 0xD1342543DE82EF95
_UNIT = 2.0**-53


def stream_key(seed: int, choice: int) -> int:
    """The stream of one choice of a request. Seeds are taken modulo 2^64."""
    return _mix((_mix((seed + _GAMMA) & _MASK) + choice * _CHOICE) & _MASK)


def uniform(key: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2^-53, for a position of a stream."""
    return (_mix((key + (position + 1) * _GAMMA) & _MASK) >> 11) * _UNIT


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
