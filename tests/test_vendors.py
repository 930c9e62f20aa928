"""The vendor of a MAC, from files of the formats that Debian's packages have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ipam_plugin import vendors
from ipam_plugin.vendors import LONGEST, vendor_of

HWDB = """\
# A comment.

OUI:00101F*
 ID_OUI_FROM_DATABASE=Wide Printers Inc

OUI:0055DA*
 ID_OUI_FROM_DATABASE=IEEE Registration Authority

OUI:0055DA1*
 ID_OUI_FROM_DATABASE=Middle Scales GmbH, Ing. Büro

OUI:70B3D5F2F*
 ID_OUI_FROM_DATABASE=Small Sensors

OUI:70B3D5*
 ID_OUI_FROM_DATABASE=Block Owner

OUI:70B3D5ABC*
 ID_OUI_FROM_DATABASE=Private

OUI:525400*
 ID_OUI_FROM_DATABASE=Not To Be Said

OUI:001122*
 ID_OUI_FROM_DATABASE=
OUI:001123*
 SOMETHING_ELSE=No Vendor

OUI:001124*
 ID_OUI_FROM_DATABASE=\t Two\u202e  \x1b[31mwords \x07 \t
"""
OUI_TXT = """\
OUI/MA-L                                                    Organization                                 \r
\r
00-1B-A9   (hex)\t\tOther Printers\r
001BA9     (base 16)\t\tOther Printers\r
\t\t\t\t15-1, Naeshiro-cho\r
"""
NMAP = "# comment\n0000F0 Samsung\n0000F1 MAGNA Computer\n8C1F64FFF Tiny Makers\n"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    vendors._registered.cache_clear()
    yield
    vendors._registered.cache_clear()


@pytest.fixture
def hwdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first source is this file, and it is the only one."""
    file = tmp_path / "20-OUI.hwdb"
    file.write_text(HWDB)
    monkeypatch.setattr(vendors, "SOURCES", ((str(file), vendors.SOURCES[0][1]),))
    return file


@pytest.mark.parametrize(
    ("mac", "vendor"),
    [
        ("00:10:1f:00:00:01", "Wide Printers Inc"),
        ("00:10:1F:FF:ff:ff", "Wide Printers Inc"),
        ("00:55:da:1a:bb:cc", "Middle Scales GmbH, Ing. Büro"),
        ("70:b3:d5:f2:f1:23", "Small Sensors"),
        ("70:b3:d5:f2:e1:23", "Block Owner"),
        ("00:55:da:2a:bb:cc", ""),  # a block that nobody is known to have a part of
        ("70:b3:d5:ab:c1:23", ""),  # somebody who does not want to be named, and surely not the block's owner
        ("00:10:20:00:00:01", ""),
        ("00:11:22:00:00:01", ""),
        ("00:11:23:00:00:01", ""),
        ("00:11:24:00:00:01", "Two [31mwords"),
        ("52:54:00:12:34:56", ""),  # locally administered, though the file has the prefix
        ("02:42:ac:11:00:02", ""),
        ("01:10:1f:00:00:01", ""),  # a group
        ("", ""),
        ("00:10:1f:00:00", ""),
        ("00:10:1f:00:00:01\n", ""),
        ("00-10-1f-00-00-01", ""),
    ],
)
def test_the_vendor_of_a_mac(hwdb: Path, mac: str, vendor: str) -> None:
    """The longest prefix that is registered says it; a wrong name is worse than none."""
    assert vendor_of(mac) == vendor


def test_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one file does not know another may; a file that is not there, a directory or an empty file is no error."""
    contents = (HWDB, None, OUI_TXT, NMAP)
    sources = []
    for number, ((_, before), content) in enumerate(zip(vendors.SOURCES, contents, strict=True)):
        file = tmp_path / str(number)
        if content is not None:
            file.write_text(content, newline="")
        sources.append((str(file), before))
    (tmp_path / "empty").touch()
    sources[1:1] = [(str(tmp_path), "\n{} "), (str(tmp_path / "empty"), "\n{} ")]
    monkeypatch.setattr(vendors, "SOURCES", tuple(sources))
    assert vendor_of("00:10:1f:00:00:01") == "Wide Printers Inc"
    assert vendor_of("00:1b:a9:00:00:01") == "Other Printers"
    assert vendor_of("00:00:f1:00:00:01") == "MAGNA Computer"
    assert vendor_of("8c:1f:64:ff:f0:01") == "Tiny Makers"


def test_without_any_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without these packages knows no vendor, and that is no error."""
    monkeypatch.setattr(vendors, "SOURCES", (("/nonexistent/20-OUI.hwdb", "\nOUI:{}*\n"),))
    assert vendor_of("00:10:1f:00:00:01") == ""


def test_it_is_read_once(hwdb: Path) -> None:
    """A MAC that is asked for again costs no second look into the file, nor does its neighbour of the same vendor."""
    assert vendor_of("00:10:1f:00:00:01") == "Wide Printers Inc"
    hwdb.unlink()
    assert vendor_of("00:10:1F:00:00:02") == "Wide Printers Inc"
    assert vendor_of("00:55:da:1a:bb:cc") == ""


junk = st.binary(max_size=40) | st.sampled_from([b"\n", b"OUI:00101F*\n ID_OUI_FROM_DATABASE=", b"=" * 300, b"\xff"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(junk, max_size=6).map(b"".join), st.text(max_size=20) | st.just("00:10:1f:00:00:01"))
@example(b"\nOUI:00101F*\n ID_OUI_FROM_DATABASE=" + "漢".encode() * 200, "00:10:1f:00:00:01")
def test_junk(hwdb: Path, content: bytes, mac: str) -> None:
    """Whatever is in the file and whatever is asked: one printable line of bounded length, and no exception."""
    hwdb.write_bytes(content)
    vendors._registered.cache_clear()
    name = vendor_of(mac)
    assert len(name) <= LONGEST
    assert name == name.strip()
    assert name.isprintable()
