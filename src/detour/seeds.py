"""Every random draw is a pure function of (seed, step, purpose): this turns those parts into one number."""

import hashlib


def seed_for(*parts: int | str) -> int:
    """A 63-bit seed from its parts, the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(f"{type(part).__name__}:{part}" for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
