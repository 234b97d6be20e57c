"""Names of datasets and of the files in them: honest ones pass unchanged, others are refused with a reason.

A name that passes is one component of a path on every file system, and means nothing else to any of them.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from detour import UserError, files

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST = 220  # bytes of the 255 that file systems allow; the rest is for the suffix of a temporary name
_DEVICES = re.compile(r"^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³])\s*(\.|$)", re.IGNORECASE)
_FORBIDDEN = frozenset('/\\:*?"<>|')
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, invisible signs, halves of signs, line ends
_JOINERS = frozenset("\u200c\u200d")  # invisible, but a part of emoji and of Persian words


def checked(text: str, what: str = "name") -> str:
    """The name, composed (NFC); UserError that begins with `what` where it cannot be one."""
    name = unicodedata.normalize("NFC", text)
    problem = next(_problems(name), None)
    if problem is not None:
        shown = name.encode("ascii", "backslashreplace").decode() if not name.isprintable() else name
        raise UserError(f"{what}: {shown[:80]!r} {problem}")
    return name


def folded(name: str) -> str:
    """Equal for names that some file system takes for the same: capitals, and accents apart or together."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _problems(name: str) -> Iterator[str]:
    """What is wrong with a composed name."""
    wrong = sorted(_FORBIDDEN.intersection(name))
    if not name.strip():
        yield "is empty; use letters or digits"
    if wrong:
        yield f"has {' '.join(wrong)} in it, which not every system allows in names; leave it out"
    if any(unicodedata.category(sign) in _UNSEEN and sign not in _JOINERS for sign in name):
        yield "has control or invisible signs in it; type it again"
    if name.startswith("."):
        yield "begins with a dot, which hides files; leave the dot out"
    if name != name.strip() or name.endswith("."):
        yield "begins or ends with a blank, or ends with a dot; leave it out"
    if _DEVICES.match(name):
        yield "is the name of a device on Windows; choose another"
    if (length := len(name.encode(errors="surrogatepass"))) > LONGEST:
        yield f"is too long: {length} bytes, {LONGEST} are allowed; shorten it"
    if files.is_temporary(Path(name)):
        yield "looks like one of Detour's temporary files; choose another"
