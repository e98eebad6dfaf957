"""Keys: how they are made, stored and compared.

Only a hash of a key is stored, so a key is shown once. A fast hash is enough for the keys of `keys add`,
which have 256 random bits.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True)
class KeyLimits:
    """What a key may use. None means no limit."""

    requests_per_minute: int | None = None
    """How many predictions the key may create."""
    at_once: int | None = None
    """How many of the key's predictions run at the same time; others wait."""
    monthly_tokens: int | None = None
    """How many tokens, input and output together, the key may use in a calendar month (UTC)."""
    monthly_dollars: Decimal | None = None
    """How much the tokens of a calendar month may cost."""


@dataclass(frozen=True)
class Key:
    """A key as the gateway uses it. It does not contain the secret."""

    id: int
    name: str
    limits: KeyLimits = KeyLimits()
    webhook_secret: str = ""
    """What signs the webhooks of this key's predictions: `whsec_` and base64."""


def new_key() -> str:
    """Return a new random key."""
    return f"llama_{secrets.token_urlsafe(32)}"


def new_webhook_secret() -> str:
    """Return a new secret in the form of Standard Webhooks.

    It uses base64's standard alphabet: Replicate's Python client does not accept an underscore after the
    prefix.
    """
    return "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()


def hash_of(key: str) -> str:
    """The hash that is stored instead of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def same(one: str, other: str) -> bool:
    """Compare two hashes in constant time."""
    return hmac.compare_digest(one, other)
