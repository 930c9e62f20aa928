"""Who made the network card with a MAC: from what the machine's own packages know, asking nobody.

The IEEE registers the first 24 bits of a MAC (MA-L), or 28 (MA-M) or 36 (MA-S) where it divides a block
among several. Debian and others have the registry as text: udev's hardware database (hwdb(7)), ieee-data,
nmap. None of them is a dependency; without any, no vendor is known.
"""

from __future__ import annotations

import functools
import re

LONGEST = 40  # characters of a name; the longest ones registered have three times as many

#: A file, and what stands there between the line before and the name; {} is the prefix in upper case hexadecimal.
SOURCES = (
    ("/usr/lib/udev/hwdb.d/20-OUI.hwdb", "\nOUI:{}*\n ID_OUI_FROM_DATABASE="),
    ("/lib/udev/hwdb.d/20-OUI.hwdb", "\nOUI:{}*\n ID_OUI_FROM_DATABASE="),  # where /lib is no link to /usr/lib
    ("/usr/share/ieee-data/oui.txt", "\n{}     (base 16)\t\t"),
    ("/usr/share/nmap/nmap-mac-prefixes", "\n{} "),
)

_MAC = re.compile(r"[0-9A-Fa-f]{2}(?::[0-9A-Fa-f]{2}){5}")
_DIGITS = (9, 7, 6)  # of a prefix: MA-S, MA-M, MA-L; a longer one says more
_MOST_BYTES = 16 << 20
_LOCAL_OR_GROUP = 0x02 | 0x01  # bits of the first byte (IEEE 802): no vendor gave it; no card has it
# Whose block it is does not say who made the card; and some pay to be unnamed.
_NOBODY = frozenset({"ieee registration authority", "private"})


def vendor_of(mac: str) -> str:
    """The vendor's name, one printable line of at most LONGEST characters; '' when none is known. Never raises.

    A MAC that software made up (a container's, a virtual machine's, a telephone's private one) has no
    vendor, whatever the registry says of its first bytes.
    """
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & _LOCAL_OR_GROUP:
        return ""
    return _registered(mac.replace(":", "").upper()[: max(_DIGITS)])


@functools.lru_cache(maxsize=1024)
def _registered(digits: str) -> str:
    for path, before in SOURCES:
        name = _name(_read(path), digits, before)
        if name:
            return name
    return ""


def _read(path: str) -> bytes:
    # Read, which takes some milliseconds, and not mapped: a file that is cut short under a mapping (an update that
    # writes it in place) ends the process by SIGBUS.
    try:
        with open(path, "rb") as file:
            return file.read(_MOST_BYTES)
    except OSError:
        return b""


def _name(data: bytes, digits: str, before: str) -> str:
    for length in _DIGITS:
        start = before.format(digits[:length]).encode()
        at = data.find(start)
        if at >= 0:
            line = data[at + len(start) :][: 4 * LONGEST].partition(b"\n")[0]
            words = " ".join(line.decode("utf-8", "replace").split())
            name = "".join(letter for letter in words if letter.isprintable())[:LONGEST].strip()
            return "" if name.lower() in _NOBODY else name
    return ""
