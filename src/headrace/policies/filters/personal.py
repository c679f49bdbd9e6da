"""The built-in detectors: personal data and secrets, each a set of patterns and, where there is one, a checksum.

Where a detector has a check, its patterns fix where a match began from how much of it has been seen, because only the oldest
match under way is remembered at each place (`automaton`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date


@dataclass(frozen=True, slots=True)
class Personal:
    kind: str
    patterns: tuple[str, ...]
    check: Callable[[str], bool] | None = None


def luhn(text: str) -> bool:
    """The checksum of card numbers (ISO/IEC 7812-1, annex B), over the digits of `text`."""
    digits = [int(character) for character in text if "0" <= character <= "9"]
    if not any(digits):
        return False
    doubled = [digit * 2 - 9 if digit > 4 else digit * 2 for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def cn_id(text: str) -> bool:
    """The checksum of Chinese identity numbers (GB 11643-1999: ISO 7064 MOD 11-2), and that the birthday is a day."""
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, text[:17], strict=True))
    if "10X98765432"[total % 11] != text[17].upper():
        return False
    try:
        date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    return True


def random_looking(text: str) -> bool:
    """Keys mix letters and digits; `sk-` in front of ordinary words is no key."""
    return any("0" <= character <= "9" for character in text) and any(character.isalpha() for character in text[3:])


_EMAIL = Personal(
    "email",
    # RFC 5321 allows 64 characters before the @ and 253 behind it. What dots and dashes lead up to an address are taken with it, so
    # that they can't make it too long; names are cut to what mail really uses, so that little is held back.
    (r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,256}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,126}[A-Za-z0-9])?\.[A-Za-z]{2,24}",),
)

_PHONE = Personal(
    "phone",
    (
        # International: + and 7 to 15 digits (ITU-T E.164), grouped at will.
        r"\+[1-9](?:[ .()-]{0,2}[0-9]){6,14}(?!\d)",
        # Chinese mobile numbers, with or without the country's code.
        r"(?<!\d)(?:86[ -]?)?1[3-9][0-9][ -]?[0-9]{4}[ -]?[0-9]{4}(?!\d)",
        # Chinese landlines with their area code.
        r"(?<!\d)(?:0[0-9]{2,3}-|\(0[0-9]{2,3}\) ?)[0-9]{7,8}(?!\d)",
        # North America, grouped; ten digits in a row are more often something else.
        r"(?<!\d)(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}(?!\d)",
    ),
)

_CARD = Personal(
    "card",
    tuple(
        r"(?<!\d)" + number + r"(?!\d)"
        for gap in ("", " ", "-")
        for number in (
            (r"[2-6][0-9]{12,18}",)
            if not gap
            else (
                rf"[2-6][0-9]{{3}}(?:{gap}[0-9]{{4}}){{3}}(?:{gap}[0-9]{{1,3}})?",
                rf"3[0-9]{{3}}{gap}[0-9]{{6}}{gap}[0-9]{{4,5}}",
            )
        )
    ),
    luhn,
)

_CN_ID = Personal("cn_id", (r"(?<!\d)[1-9][0-9]{5}(?:19|20)[0-9]{2}[01][0-9][0-3][0-9]{4}[0-9Xx](?!\d)",), cn_id)

_WORDY_SECRET = Personal(
    "secret",
    (r"(?<![A-Za-z0-9_-])(?:sk|pk|rk|hr)[-_][A-Za-z0-9_-]{16,256}",),  # OpenAI, Anthropic, Stripe, and this server's own
    random_looking,
)

_SECRET = Personal(
    "secret",
    (
        r"(?<![A-Za-z0-9_-])(?:AKIA|ASIA)[A-Z2-7]{16}",  # AWS
        r"(?<![A-Za-z0-9_-])gh[pousr]_[A-Za-z0-9]{36,255}",  # GitHub
        r"(?<![A-Za-z0-9_-])github_pat_[A-Za-z0-9_]{22,255}",
        r"(?<![A-Za-z0-9_-])glpat-[A-Za-z0-9_-]{20,64}",  # GitLab
        r"(?<![A-Za-z0-9_-])hf_[A-Za-z0-9]{30,64}",  # Hugging Face
        r"(?<![A-Za-z0-9_-])xox[abeoprs]-[A-Za-z0-9-]{10,128}",  # Slack
        r"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}",  # Google
        r"(?<![A-Za-z0-9_-])pypi-[A-Za-z0-9_-]{40,255}",
        r"(?<![A-Za-z0-9_-])npm_[A-Za-z0-9]{36}",
        # A private key in PEM, also while its end is missing: its lines are long, prose behind it is not.
        r"-----BEGIN (?:[A-Z]{1,12} ){0,2}PRIVATE KEY-----(?:\s{1,4}[A-Za-z0-9+/=]{24,80}){0,64}"
        r"(?:(?:\s{1,4}[A-Za-z0-9+/=]{1,80})?\s{1,4}-----END (?:[A-Z]{1,12} ){0,2}PRIVATE KEY-----)?",
    ),
)

PERSONAL: dict[str, tuple[Personal, ...]] = {
    "email": (_EMAIL,),
    "phone": (_PHONE,),
    "card": (_CARD,),
    "cn_id": (_CN_ID,),
    "secret": (_WORDY_SECRET, _SECRET),
}
"""By kind, in the order in which they name what several of them match."""
