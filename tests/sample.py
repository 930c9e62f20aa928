"""Registers to look at: keys and values as daemons and operators write them."""

from __future__ import annotations

import datetime
import ipaddress
import random
import time
from collections.abc import Iterable, Iterator, Mapping

from ipam_plugin.etcd import Etcd, Put
from ipam_plugin.model import (
    CONFLICT,
    ENDPOINT,
    HELD,
    HOST,
    RESERVED,
    ROUTER,
    STANDBY,
    Alive,
    Container,
    History,
    Holder,
    Host,
    HostAddress,
    Keys,
    Lease,
    Pool,
    PoolUse,
    Reservation,
    SegmentSettings,
    Tenancy,
    encode,
    rfc3339,
)

NOW = datetime.datetime(2026, 11, 25, 9, 0, tzinfo=datetime.UTC)
OFFICE = Pool.make("192.168.77.0/24", "", {}, "default")
CAMPUS = Pool.make("10.20.0.0/16", "", {}, "campus")
STRANGER = "00:1b:a9:3c:52:77"
SHOP = "192.168.77.42"
"""The address of container `shop`, which three others had before."""

_NAMES = ("web", "db", "mail", "cache", "wiki", "build", "queue", "proxy", "files", "shop", "auth", "logs")


def ago(now: datetime.datetime, **parts: float) -> str:
    return rfc3339(now - datetime.timedelta(**parts))


def mac_of(number: int) -> str:
    return ":".join(f"{octet:02x}" for octet in (2, 66, *number.to_bytes(4)))


def office(keys: Keys, now: datetime.datetime = NOW) -> dict[str, bytes]:
    """A /24 half full, with every kind: three hosts, one of them down, an alarm and a stranger."""
    chance = random.Random(77)
    found: dict[str, bytes] = {}

    def lease(address: str, lease: Lease) -> None:
        found[keys.lease("default", ipaddress.ip_address(address))] = encode(lease)

    for number, name in ((11, "host1"), (12, "host2"), (13, "host3")):
        own = HostAddress(f"192.168.77.{number}", 24, "br0", f"02:00:00:00:4d:{number:02x}")
        down = name == "host3"
        alarms = () if name != "host2" else (f"192.168.77.61 is used twice: container mail2 on host host2 (MAC {mac_of(0xC0A84D3D)}) and MAC {STRANGER}; give the other machine another address",)  # fmt: skip  # noqa: E501
        found[keys.host(name)] = encode(
            Host(name, f"machine-{number}", "0.1.0", ago(now, days=41), (own,), ("default",), alarms, (own.mac,),
                 ago(now, hours=5) if down else "")
        )  # fmt: skip
        if not down:
            beat = Alive(name, f"machine-{number}", "boot", "process", since=ago(now, days=6), version="0.1.0")
            found[keys.heartbeat(name)] = encode(beat)
        lease(own.address, Lease(HOST, name, own.mac, since=ago(now, days=41), token="t", interface="br0"))
        found[keys.pool(OFFICE, name)] = encode(PoolUse(name, "default", str(OFFICE.subnet), since=ago(now, days=40)))
        for _ in range(2):
            lease(f"192.168.77.{120 + number + 30 * _}", Lease(STANDBY, name, pool=OFFICE.id, since=ago(now, minutes=3), token="t"))  # fmt: skip  # noqa: E501
    numbers = [42, 61, *chance.sample([n for n in range(20, 120) if n not in (42, 57, 61)], 76)]
    for place, number in enumerate(numbers):
        host = f"host{1 + place % 3}"
        name = "shop" if number == 42 else "mail2" if number == 61 else f"{chance.choice(_NAMES)}{1 + place // 12}"
        lease(
            f"192.168.77.{number}",
            Lease(
                ENDPOINT,
                host,
                mac_of(0xC0A84D00 + number),
                Container(
                    name, f"{chance.getrandbits(256):064x}", f"registry.example/{name.rstrip('0123456789')}:3", "lan"
                ),
                OFFICE.id,
                ago(now, hours=1 + 7 * place),
                "secret-token",
            ),
        )
    lease("192.168.77.254", Lease(ROUTER, since=ago(now, days=40), token="t", holders=tuple(Holder(f"host{n}", OFFICE.id) for n in (1, 2, 3))))  # fmt: skip  # noqa: E501
    lease("192.168.77.140", Lease(RESERVED, since=ago(now, days=39), token="t", note="printer, 2nd floor", by="ann@host1"))  # fmt: skip  # noqa: E501
    lease("192.168.77.57", Lease(CONFLICT, mac=STRANGER, since=ago(now, hours=2), token="t", by="host1", vendor="Brother industries, LTD."))  # fmt: skip  # noqa: E501
    held = Container("build9", "", "registry.example/build:3", "lan")
    lease("192.168.77.190", Lease(HELD, "host1", mac_of(190), held, OFFICE.id, ago(now, minutes=4), "t", until=ago(now, minutes=-6), known=True))  # fmt: skip  # noqa: E501
    found[keys.leases + "default/192.168.77.200"] = b"the old scanner, ask Tom"
    found[keys.segment("default")] = encode(
        SegmentSettings(
            router="192.168.77.254",
            exclude=("192.168.77.0/29",),
            reserved=(Reservation("192.168.77.208-192.168.77.231", "phones", "ann@host1", ago(now, days=39)),),
            moving=("192.168.77.250",),
            note="office, 2nd floor",
        )
    )
    past = tuple(
        Tenancy(ENDPOINT, host, mac_of(number), Container(name, image=f"registry.example/{name}:2", network="lan"),
                ago(now, days=days + 3), ago(now, days=days), why)
        for number, (name, host, days, why) in enumerate(
            (
                ("shop", "host2", 1, "released"),
                ("wiki9", "host1", 9, "found gone by reconcile"),
                ("queue9", "host3", 20, "released"),
            )
        )
    )  # fmt: skip
    found[keys.past("default", ipaddress.ip_address(SHOP))] = encode(History(past))
    return found


def campus(keys: Keys, count: int, now: datetime.datetime = NOW) -> dict[str, bytes]:
    """A /16 with so many leases, denser in some parts than in others, and a few strangers."""
    chance = random.Random(16)
    weights = [chance.random() ** 2 for _ in range(256)]
    first = int(CAMPUS.subnet.network_address)
    wanted: set[int] = set()
    while len(wanted) < count:
        for block in chance.choices(range(256), weights, k=count - len(wanted)):
            wanted.add(first + 256 * block + chance.randrange(256))
    wanted -= {first, first + 65535}
    found = {keys.pool(CAMPUS, f"rack{n}"): encode(PoolUse(f"rack{n}", "campus", "10.20.0.0/16")) for n in range(8)}
    for number in range(8):
        own = HostAddress(f"10.20.255.{number + 1}", 16, "br0", mac_of(number))
        found[keys.host(f"rack{number}")] = encode(
            Host(f"rack{number}", f"rack{number}", "0.1.0", ago(now, days=90), (own,), ("campus",))
        )
        beat = Alive(f"rack{number}", f"rack{number}", "boot", "process", since=ago(now, days=9), version="0.1.0")
        found[keys.heartbeat(f"rack{number}")] = encode(beat)
    for number in sorted(wanted):
        kind = CONFLICT if chance.random() < 0.0001 else RESERVED if chance.random() < 0.03 else ENDPOINT
        lease = Lease(kind, f"rack{number % 8}", mac_of(number), pool=CAMPUS.id, since=ago(now, hours=number % 900))
        if kind == ENDPOINT:
            name = f"vm{number % 10_000}"
            lease = Lease(kind, lease.host, lease.mac, Container(name, network="lan"), CAMPUS.id, lease.since, "t")
        found[keys.lease("campus", ipaddress.ip_address(number))] = encode(lease)
    return found


# Longer than any cell, steering, backwards, and eager to be a program.
SCRIPT = "<img src=x onerror=\"document.title='owned';window.owned=1\"><script>window.owned=1</script>"
HOSTILE_TEXTS = (
    SCRIPT,
    "javascript:window.owned=1",
    "\x1b[2J\x07\x00\u202eevil",
    "A" * 10_000,
    "']});window.owned=1;//",
)


def hostile(keys: Keys) -> dict[str, bytes]:
    """What anybody with a right to write could put there: no JSON, wrong types, huge, control characters, HTML."""
    found: dict[str, bytes] = {}
    for number, text in enumerate(HOSTILE_TEXTS):
        container = Container(text, text, text, text)
        address = ipaddress.ip_address(f"192.168.66.{10 + number}")
        for kind in (ENDPOINT, RESERVED, CONFLICT, ROUTER):
            value = Lease(kind, text, text, container, text, text, text, text, (Holder(text, text),), 0, text, text)
            found[keys.lease("default", address)] = encode(value)
            address += 16
        tenancy = Tenancy(text, text, text, container, text, text, text)
        found[keys.past("default", ipaddress.ip_address(f"192.168.66.{10 + number}"))] = encode(History((tenancy,) * 9))
        found[f"{keys.hosts}{text}"] = encode(
            Host(text, text, text, text, (HostAddress(text, 99, text, text),), (text,), (text,), (text,), text)
        )
        found[f"{keys.alive}{text}"] = encode(Alive(text, text, text, text, since=text, version=text))
        found[f"{keys.leases}{text}/192.168.66.200"] = encode(Lease(ENDPOINT, text))
        found[f"{keys.leases}default/{text}"] = text.encode()
        found[f"{keys.segment(text)}"] = encode(SegmentSettings(note=text))
        found[f"{keys.pools}{text}/{text}"] = text.encode()
        found[f"{keys.retiring}{text}"] = text.encode()
    for number, junk in enumerate(
        (
            *(b"", b"null", b"[]", b'{"kind": 7}', b'{"kind": "endpoint", "container": [1]}', b"\xff\xfe\x00"),
            *(b"[" * 50_000, b'{"kind": "endpoint", "since": 1e999}', b'{"kind": "nonsense"}'),
            *(b'{"kind": "constructor"}', SCRIPT.encode()),
        )
    ):
        found[f"{keys.leases}default/192.168.66.{100 + number}"] = junk
        found[f"{keys.history}default/192.168.66.{100 + number}"] = junk
        found[f"{keys.hosts}junk{number}"] = junk
        found[f"{keys.alive}junk{number}"] = junk
        found[f"{keys.segments}junk{number}"] = junk
        found[f"{keys.pools}default/192.168.66.0/24/junk{number}"] = junk
    found[f"{keys.leases}default/0.0.0.0/0"] = b"all of it"
    found[f"{keys.leases}default/::/0"] = b"all of it"
    found[f"{keys.leases}__proto__/192.168.66.1"] = encode(Lease(ENDPOINT, "__proto__"))
    found[f"{keys.leases}constructor/fd00::1"] = encode(Lease(ENDPOINT, "toString"))
    found[f"{keys.leases}default/192.168.66.99/\udcff\udcfe"] = b"no UTF-8 in the key"
    many = tuple(Reservation(f"192.168.66.{n % 256}", "x") for n in range(20_000))
    found[keys.segment("many")] = encode(SegmentSettings(reserved=many))
    return found


def write(client: Etcd, values: Mapping[str, bytes], seconds: float = 60.0) -> None:
    """Put them in etcd, as many in one transaction as etcd takes."""
    for batch in _batches(values.items()):
        client.commit({}, [Put(key, value) for key, value in batch], deadline=time.monotonic() + seconds)


def _batches(items: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    size = 0
    for key, value in items:
        if batch and (len(batch) == 128 or size + len(value) > 1_000_000):  # etcd takes 1.5 MB
            yield batch
            batch, size = [], 0
        batch.append((key, value))
        size += len(value) + len(key)
    if batch:
        yield batch
