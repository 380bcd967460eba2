"""Who may ask: the API key, and who a server on this machine is meant for."""

from __future__ import annotations

import hmac
from hashlib import sha256
from ipaddress import ip_address

LONGEST_KEY = 4096


class Keys:
    """API keys, compared in a time that does not tell how much of a guess was right.

    Without keys everyone may ask.
    """

    def __init__(self, keys: list[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, header: str | None) -> bool:
        """Whether an `Authorization` header brings one of the keys."""
        if not self._digests:
            return True
        scheme, _, given = (header or "").partition(" ")
        digest = _digest(given.strip()[:LONGEST_KEY])
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them
        return scheme.lower() == "bearer" and any(matches)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def host_allowed(header: str, bound: str) -> bool:
    """Whether a `Host` header names a server that is bound to `bound`.

    A server for this machine answers to its names only: a web page can have its own name resolve
    to 127.0.0.1 and then talk to it (DNS rebinding).
    """
    if not is_loopback(bound):
        return True
    host = header.rsplit(":", 1)[0] if not header.endswith("]") else header
    return is_loopback(host)


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
