"""What a careless or hostile hand may leave in etcd: values, texts and keys, for everything that reads the register.

`corpus(prefix)` is all of it as (key, value), put under every family of keys: values that cannot be read, and records
that can be, each of whose texts and numbers is hostile. Records are made from the types of model.py, so that a new
field is hostile without a word here. Keys are str with surrogate escapes, as etcd.py has them.

Whoever shows a text of the register to somebody tests it with `TEXTS`: `MARK` must arrive as that text and nothing of
it may act (a terminal's escape sequence, an element of a page, a second line of a log).
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any

import msgspec

from ipam_plugin import model
from ipam_plugin.model import KINDS, Keys

MARK = "hostile"
HUGE = 1_500_000  # bytes; with its key and what is around it still inside etcd's limit of 1.5 MiB for a request
ADDRESS = "198.18.99.1"
CLEAN, SUBNET = "clean", "198.18.0.0/16"  # a segment whose settings are good, and where its hostile leases are

TEXTS = {
    "ANSI colour": f"\x1b[31m{MARK}\x1b[0m",
    "ANSI clears the screen": f"\x1b[2J\x1b[H{MARK}",
    "OSC title": f"\x1b]0;{MARK}\x07",
    "OSC 8 link": f"\x1b]8;;http://example.org/\x1b\\{MARK}\x1b]8;;\x1b\\",
    "C1 CSI": f"\x9b31m{MARK}",
    "new lines": f"{MARK}\n2026-01-01 00:00:00,000 ERROR root: forged\r\nsecond\x0b\x0c\x85\u2028\u2029",
    "carriage return": f"{MARK}\rfree",
    "NUL, bell, backspace, DEL": f"{MARK}\x00\x07\x08\x7f",
    "bidirectional": f"{MARK}\u202eeerf\u202c\u2066\u200f\u061c",
    "zero width": f"{MARK}\u200b\u2060\ufeff\u00ad",
    "HTML script": f"<script>document.title='{MARK}'</script>",
    "HTML attribute": f"\"'><img src=x onerror=\"document.title='{MARK}'\">",
    "HTML entity": f"&lt;{MARK}&gt;&#60;b&#62;</td></table></textarea></style></script>",
    "URL": f"javascript:document.title='{MARK}'",
    "template": f"{{{{ {MARK} }}}}{{% raw %}}${{7*7}}",
    "rich markup": f"[bold red]{MARK}[/bold red][link=http://example.org/]x[/link][/]",
    "format": f"%s %n %(name)s {{0}} {{name!r}} {MARK}",
    "shell": f"$(touch /tmp/{MARK}); `id` | sh & ' \" \\",
    "path": f"../../../etc/passwd/{MARK}/..",
    "formula": f'=HYPERLINK("http://example.org/","{MARK}")',
    "Prometheus": f'{MARK}"}} 1\nforged_total 1\n# \\',
    "combining": MARK + "\u0301" * 500,
    "wide": MARK + "漢" * 500,
    "outside the BMP": f"{MARK}\U0001f4a9\U000e0041\U0010ffff",
    "empty": "",
    "blanks": f" \t{MARK} \t",
    "long": f"{MARK} " * 2_000,
    "one long word": MARK * 2_000,
}
"""Texts that JSON can carry, so a record with them is read as any other."""

WHOLE = {
    "empty": b"",
    "a word": b"printer, 2nd floor",
    "blank": b" \n",
    "NUL": b"\0",
    "invalid UTF-8": b"\xff\xfe\x80hostile",
    "UTF-16": '{"kind": "endpoint"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "overlong UTF-8": b'{"kind":"endpoint","note":"\xc0\xaf"}',
    "a lone surrogate": b'{"kind":"endpoint","note":"\\ud800","host":"\\udfff"}',
    "ANSI": b"\x1b[31mhostile\x1b[0m\x07",
    "ANSI as a name": b'{"\\u001b[31m\\n\\u0007hostile":1}',
    "ANSI as a name inside": b'{"reserved":[{"range":"10.0.0.1","\\u001b]0;hostile\\u0007\\n":1}]}',
    "HTML": b"<script>document.title='hostile'</script>",
    "null": b"null",
    "true": b"true",
    "a number": b"-1e308",
    "a text": b'"hostile"',
    "an empty list": b"[]",
    "a list": b'[{"kind":"endpoint"}]',
    "an empty object": b"{}",
    "cut off": b'{"kind":"endpoint","host":"h',
    "something after it": b'{"kind":"endpoint"}{"kind":"reserved"}',
    "a kind of tomorrow": b'{"kind":"\\u001b[31mhostile"}',
    "names twice": b'{"kind":"reserved","kind":"endpoint","host":"a","host":"b"}',
    "NaN": b'{"kind":"endpoint","noted":NaN}',
    "a huge number": b'{"kind":"endpoint","noted":' + b"9" * 5000 + b"}",
    "a huge exponent": b'{"kind":"endpoint","noted":1e400,"count":1e400,"more":1e400}',
    "deep lists": b"[" * 500_000,
    "deep objects": b'{"a":' * 200_000,
    "deep and whole": b'{"kind":"endpoint","x":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "huge and unreadable": b"A" * HUGE,
    "huge and blank": b" " * HUGE,
}
"""Whole values; most of them cannot be read as anything."""

NUMBERS = (-1, 0, 2**31, 2**63, 10**300)

ADDRESSES = (
    "", "0.0.0.0", "255.255.255.255", "127.0.0.1", "224.0.0.1", "999.1.1.1", "10.0.0.1/33", "10.0.0.1/-1", "10.0.0",
    "1" * 5000, "010.0.0.1", "::", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "ff02::1", "g::", ":::", "0x0a000001",
    "167772161", "10.0.0.1-10.0.0.0", "0.0.0.0-255.255.255.255", "10.0.0.1-::1", "0.0.0.0/0", "::/0", "\u0661.0.0.1",
    "10.0.0.1\n", "10.0.0.1\x1b[31m", "-", "/", "..", ".",
)  # fmt: skip
"""Texts where an address, a range or a CIDR belongs; one or the other is a good one."""

_RECORDS: dict[str, type[msgspec.Struct]] = {
    "leases": model.Lease,
    "history": model.History,
    "segments": model.SegmentSettings,
    "pools": model.PoolUse,
    "hosts": model.Host,
    "alive": model.Alive,
    "retiring": model.Order,
    "gone": model.Lost,
}


def texts() -> Iterator[str]:
    """Everything hostile that a text of a record may be."""
    yield from TEXTS.values()
    yield from ADDRESSES


def record(kind: type[msgspec.Struct], text: str, number: int = 1) -> dict[str, Any]:
    """A record of a type of model.py that can be read, with this text and number wherever one may stand."""
    hints = typing.get_type_hints(kind)
    return {name: _value(hints[name], text, number) for name in kind.__struct_fields__}


def _value(hint: Any, text: str, number: int) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is str:
        return text
    if hint is int:
        return number
    if hint is bool:
        return True
    if origin in (types.UnionType, typing.Union):
        return _value(next(each for each in inner if each is not type(None)), text, number)
    if origin in (tuple, list):
        return [_value(inner[0], text, number)] * 2
    if origin is dict:
        return {text: text}
    assert issubclass(hint, msgspec.Struct), f"say here what is hostile for a {hint}"
    return record(hint, text, number)


def own_leases(host: str) -> Iterator[bytes]:
    """Readable leases of this very host, hostile in all else: what its daemon takes for its own work."""
    for text in texts():
        for kind in KINDS:
            yield json.dumps({**record(model.Lease, text), "kind": kind, "host": host}, ensure_ascii=False).encode()


def values(family: str) -> Iterator[bytes]:
    """Every value to be put under a family of keys."""
    yield from WHOLE.values()
    kind = _RECORDS.get(family)
    if kind is None:
        return
    for text in texts():
        yield from _encoded(record(kind, text), family)
    for number in NUMBERS:
        yield from _encoded(record(kind, MARK, number), family)
    if family == "leases":
        # As many as etcd takes in one value.
        shared = [{"host": f"h{number}", "pool": "p"} for number in range(40_000)]
        yield from (json.dumps({"kind": each, "holders": shared}).encode() for each in ("router", "host"))


def _encoded(told: dict[str, Any], family: str) -> Iterator[bytes]:
    for kind in KINDS if family == "leases" else ("",):
        yield json.dumps({**told, **({"kind": kind} if kind else {})}, ensure_ascii=False).encode()


def key_ends(family: str) -> list[str]:
    """What may stand behind `FAMILY/`; invalid UTF-8 as surrogate escapes."""
    odd = [
        "",
        "/",
        "//",
        "..",
        "../..",
        "\x1b[31mhostile",
        "a\nb",
        "\udcff\udcfe",
        "<b>hostile</b>",
        "\u202e",
        "x" * 9000,
    ]
    where = ["default", "hostile", *odd]
    if family in ("leases", "history"):
        return [f"{segment}/{ADDRESS}" for segment in where] + [f"default/{each}" for each in (*ADDRESSES, *odd)]
    if family in ("pools", "wanted"):
        pools = [
            "default/10.0.0.0/8",
            "default/0.0.0.0/0",
            "default/::/0",
            "default/10.0.0.0/33",
            "a/b/c;d=e",
            ";",
            *odd,
        ]
        return [f"{pool}/{host}" for pool in (*pools, *odd) for host in ("hostile", *odd[:5])] + [
            "default/198.18.99.0/24;hold=999999999d/hostile",
            "default/198.18.99.0/24;interface=\x1b[31m/hostile",
            "default/198.18.99.5/hostile",
        ]
    if family == "retiring":
        return [*where, *(f"hostile/{each}" for each in ("end", "default/10.0.0.0/8", "default/nonsense", *odd))]
    return where


def corpus(prefix: str) -> list[tuple[str, bytes]]:
    """All of it, as keys and values below a prefix; each key once."""
    keys = Keys(prefix)
    found: dict[str, bytes] = {}
    for family in ("leases", "history", "segments", "pools", "hosts", "alive", "wanted", "retiring", "gone"):
        top: str = getattr(keys, family)
        for end in key_ends(family):
            found[top + end] = WHOLE["ANSI"]
        # Each value under a key of its own that is as it should be, so that it is the value that is looked at.
        for number, value in enumerate(values(family), 1):
            found[top + _good_end(family, number)] = value
    found[prefix + "nothing of ours"] = WHOLE["ANSI"]
    found[prefix + "\udcff"] = WHOLE["huge and unreadable"]
    return list(found.items())


def _good_end(family: str, number: int) -> str:
    if family in ("leases", "history"):
        return f"{CLEAN}/{SUBNET[:6]}.{number // 250}.{number % 250 + 1}"
    if family in ("pools", "wanted"):
        return f"{CLEAN}/198.19.{number % 250}.0/24/h{number}"
    return f"hostile{number}"
