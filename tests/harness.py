"""Docker hosts in one process: a real View, Register and Flask app each, on one FakeEtcd that they share.

with Lan() as lan:
    a = lan.host("a", bridge("192.168.1.11/24"))
    pool = a.create("192.168.1.0/24")
    a.run(pool)
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fakes import FakeEtcd
from ipam_plugin import evidence
from ipam_plugin.addresses import Address, parse_address
from ipam_plugin.app import create_app
from ipam_plugin.claims import Claims, Stock
from ipam_plugin.errors import DockerUnavailable
from ipam_plugin.etcd import Delete, Put
from ipam_plugin.evidence import Attachment, Known, Network
from ipam_plugin.holds import Holds
from ipam_plugin.interfaces import InterfaceAddress, Link
from ipam_plugin.journal import Journal
from ipam_plugin.ledger import Ledger
from ipam_plugin.metrics import Metrics
from ipam_plugin.model import Host as HostRecord
from ipam_plugin.model import Keys, Lease, Pool, decode, encode
from ipam_plugin.neighbourhood import Habits, Neighbourhood
from ipam_plugin.outage import Outage
from ipam_plugin.packets import How
from ipam_plugin.reconcile import Reconciler
from ipam_plugin.register import Register
from ipam_plugin.restoration import Restoration
from ipam_plugin.retire import Retirer
from ipam_plugin.standby import Keeper
from ipam_plugin.view import Local, View
from ipam_plugin.wire import Failed, InUse, Outcome, Sighting, Silent, Times, Wire

PATIENCE = 10.0  # seconds after which a condition that should have come counts as missing
GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}
MAC = "com.docker.network.endpoint.macaddress"
NAME = "com.docker.network.endpoint.name"
KEYS = Keys()
SUBNET = "192.168.1.0/24"

_macs = itertools.count(1)


def until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Wait for a condition, with a deadline."""
    end = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, f"{what} did not come within {PATIENCE} s"
        pause.wait(0.002)


def bridge(cidr: str, interface: str = "br0", mac: str = "02:00:00:00:00:01", **more: bool) -> InterfaceAddress:
    """An address on a bridge, as interfaces.py would report it."""
    parsed = ipaddress.ip_interface(cidr)
    return InterfaceAddress(parsed.ip, parsed.network.prefixlen, interface, mac, bridge=True, up=True, **more)


def nic(cidr: str, interface: str = "eth0", mac: str = "02:00:00:00:00:02") -> InterfaceAddress:
    """An address on an interface that is no bridge."""
    parsed = ipaddress.ip_interface(cidr)
    return InterfaceAddress(parsed.ip, parsed.network.prefixlen, interface, mac, bridge=False, up=True)


NOT_ASKED = Habits(probe="off")  # the register alone decides


class FakeLan:
    """The machines that nobody registered, as every host's wire finds them. Silence takes no time here.

    `machines` are the addresses that are answered, and by which MAC; `proxy` is one that answers for all others.
    `dead` is why silence proves nothing. What a test says with `talk`, every listener hears.
    """

    def __init__(self) -> None:
        self.machines: dict[str, str] = {}
        self.proxy = ""
        self.dead = ""
        self.failed = ""
        self.probed: list[Address] = []
        self.announced: list[tuple[Address, str]] = []
        self.asked: list[Address] = []
        self.before_answer: Callable[[Address], None] = lambda address: None
        self._wires: list[FakeWire] = []

    def open(self, interface: str, on_heard: Callable[[Sighting], object], **_: Any) -> Wire:
        self._wires.append(FakeWire(self, interface, on_heard))
        return self._wires[-1]

    def talk(self, address: str, mac: str, how: How = How.ARP_ANNOUNCEMENT) -> None:
        for each in self._wires:
            each.say(Sighting(parse_address(address), mac, how, time.monotonic()))


class FakeWire(Wire):
    """One host's ears on a FakeLan. No socket is opened."""

    def __init__(self, lan: FakeLan, interface: str, on_heard: Callable[[Sighting], object]) -> None:
        super().__init__(interface, on_heard)
        self._lan = lan
        self.say = on_heard

    mac = "02:00:00:00:00:01"
    trouble = ""
    exists = True

    def start(self) -> None: ...

    def close(self) -> None: ...

    def probe(
        self,
        address: Address,
        times: Times,
        *,
        deadline: float,
        ignored: Collection[str] = (),
        doubted: str = "",
        uniform: Callable[[float, float], float] = lambda least, most: least,
    ) -> Outcome:
        if not doubted:  # else it is the same question once more
            self._lan.probed.append(address)
        self._lan.before_answer(address)
        if self._lan.failed:
            return Failed(self._lan.failed)
        answers = [mac for mac in (self._lan.machines.get(str(address), ""), self._lan.proxy) if mac]
        believed = [mac for mac in answers if mac not in ignored]
        return InUse(believed[0], How.ARP_REPLY) if believed else Silent(answers[0] if answers else "")

    def alive(self, peers: Sequence[Address], *, deadline: float) -> str:
        return self._lan.dead

    def ask(self, address: Address, source: Address | None = None) -> str:
        self._lan.asked.append(address)
        return ""

    def announce(self, address: Address, mac: str) -> str:
        self._lan.announced.append((address, mac))
        return ""


class FakeEngine:
    """A dockerd of which a test says what it has. `shown` is called with each look, before its answer."""

    def __init__(self) -> None:
        self.id = "ENGINE"
        self.networks: list[Network] = []
        self.attachments: list[Attachment] = []
        self.elsewhere: set[Address] = set()
        self.containers: dict[str, Known] = {}
        self.trouble = ""
        self.skew = 0.0  # seconds by which looks begin later than they do: so that no test waits for two of them
        self.looks = 0
        self.shown: Callable[[], None] = lambda: None

    def look(self) -> evidence.Look:
        began = time.monotonic() + self.skew
        self.looks += 1
        self.shown()
        if self.trouble:
            raise DockerUnavailable(self.trouble)
        return evidence.Look(
            began,
            time.monotonic() + self.skew,
            self.id,
            tuple(self.networks),
            tuple(self.attachments),
            frozenset(self.elsewhere),
            dict(self.containers),
        )

    def create(self, name: str = "lan", *subnets: tuple[str, str], **options: str) -> None:
        self.networks.append(Network(f"id of {name}", name, "bridge", subnets or ((SUBNET, ""),), options))

    def start(self, container: str, address: str, mac: str = "", network: str = "lan", image: str = "busybox") -> None:
        fixed: frozenset[Address] = frozenset()
        self.containers[f"id of {container}"] = Known(container, image, True, fixed)
        self.attachments.append(
            Attachment(f"id of {network}", network, parse_address(address), mac, f"id of {container}", container, "")
        )

    def vanish(self, container: str) -> None:
        """It is gone, and nobody was told."""
        self.attachments = [each for each in self.attachments if each.container != container]
        self.containers.pop(f"id of {container}", None)


class FakeState:
    """The files of a state_dir, in memory."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files

    def read(self, name: str) -> str:
        return self._files.get(name, "")

    def write(self, name: str, text: str) -> None:
        self._files[name] = text


class _Kernel:
    """interfaces.py, with what the test says that the host carries."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def addresses(self, deadline: float | None = None) -> list[InterfaceAddress]:
        return list(self._host.carried)

    def links(self, deadline: float | None = None) -> list[Link]:
        names = dict.fromkeys(each.interface for each in self._host.carried)
        return [
            Link(number, name, "02:00:00:00:00:01", "bridge", carrier=True, up=True, loopback=False, master="")
            for number, name in enumerate(names, 2)
        ]


class Reply(NamedTuple):
    status: int
    body: dict[str, Any]

    @property
    def error(self) -> str:
        """The refusal. Fails unless this is one as Docker must see it: status, `Err` and `Error`, one line."""
        assert self.status != 200, self
        assert self.body["Err"] == self.body["Error"] != ""
        assert self.body["Err"].isprintable()
        assert len(self.body["Err"]) <= 1000
        return str(self.body["Err"])

    @property
    def ok(self) -> dict[str, Any]:
        assert self.status == 200, self
        return self.body


class Host:
    """One Docker host's daemon, without its process."""

    def __init__(
        self,
        etcd: FakeEtcd,
        name: str,
        *carried: InterfaceAddress,
        segment: str = "default",
        local: Callable[[str], Local] = lambda segment: Local(cooldown=0.0),
        time_limit: float = PATIENCE,
        habits: Habits = NOT_ASKED,
        wire: FakeLan | None = None,
        journal: Path | None = None,
        retire_after: float | None = None,
        grace: float = 0.0,
        state: dict[str, str] | None = None,
    ) -> None:
        self.etcd = etcd
        self.name = name
        self.carried = list(carried)
        self.alarms: list[tuple[str, str]] = []
        self.ahead = 0.0  # seconds by which the clock that ends holds is
        self.view = View(KEYS, name, local)
        self.ledger = Ledger(etcd, self.view, KEYS, name)
        self.neighbourhood = Neighbourhood(
            self.view,
            name,
            lambda segment: habits,
            _Kernel(self),
            alarm=lambda kind, text: self.alarms.append((kind, text)),
            open_wire=(wire or FakeLan()).open,
        )
        self.stock = Stock()
        self._directory = tempfile.TemporaryDirectory()
        self.journal = Journal(journal or Path(self._directory.name) / "journal")
        self.outage = Outage(
            self.journal,
            lambda deadline: etcd.get(KEYS.host(name), deadline=deadline),
            alarm=lambda kind, text: self.alarms.append((kind, text)),
        )
        for work in self.outage.work():
            self.stock.journalled(work.tokens)
        self.claims = Claims(
            self.ledger, self.view, KEYS, name, self.neighbourhood, self.stock, self.outage, vendor_of=lambda mac: ""
        )
        self.keeper = Keeper(
            self.claims,
            self.stock,
            self.ledger,
            self.view,
            KEYS,
            name,
            self.neighbourhood,
            alarm=lambda kind, text: self.alarms.append((kind, text)),
        )
        self.holds = Holds(
            self.ledger, self.view, self.stock, name, self.outage.is_waiting, now=lambda: time.time() + self.ahead
        )
        self.neighbourhood.on_heard = self.keeper.heard
        self.claims.on_shortage = self.keeper.wake
        self.view.on_wanted = self._wanted
        self.view.on_pools = self.keeper.wake
        self.register = Register(
            self.ledger,
            self.claims,
            self.view,
            KEYS,
            name,
            outage=self.outage,
            default_segment=segment,
            segments=lambda: {segment, *self.view.segments_of(name)},
            carried=lambda deadline: list(self.carried),
            alarm=lambda kind, text: self.alarms.append((kind, text)),
            may_give=lambda deadline: self.restoration.wait(deadline) if self.restoration else None,
            on_given=self._given,
            is_gone=lambda *asked: self.reconciler.is_gone(*asked),
        )
        self.engine = FakeEngine()
        self.state: dict[str, str] = {} if state is None else state
        self.reconciler = Reconciler(
            self.engine,
            self.register,
            self.ledger,
            self.claims,
            self.view,
            KEYS,
            name,
            self.neighbourhood,
            FakeState(self.state),
            grace=grace,
            default_segment=segment,
            carried=lambda deadline: list(self.carried),
            alarm=lambda kind, text: self.alarms.append((kind, text)),
            pending=lambda segment, address: self.outage.of(segment, address) is not None,
        )
        self.serves = True
        self.retirer = Retirer(
            etcd,
            self.ledger,
            self.view,
            KEYS,
            name,
            self.neighbourhood,
            segments=lambda: {segment, *self.view.segments_of(name)},
            serving=lambda: self.serves,
            after=retire_after,
            alarm=lambda kind, text: self.alarms.append((kind, text)),
        )
        self.view.on_orders = self.retirer.wake
        self.restoration: Restoration | None = None
        self.metrics = Metrics()
        self._time_limit = time_limit
        self.app = create_app(self.register, self._admit, metrics=self.metrics)
        self._stop = threading.Event()
        self._gate = threading.Event()
        self._gate.set()
        self._threads = [threading.Thread(target=self._watch, name=f"watch of {name}", daemon=True)]
        self._threads[0].start()

    def _admit(self, arrival: float) -> float:
        deadline = arrival + self._time_limit
        assert self.view.loaded.wait(max(0.0, deadline - time.monotonic()))
        return deadline

    def _watch(self) -> None:
        def reset(values: Any, revision: int, epoch: int) -> None:
            self._wait_for_gate()
            self.view.reset(((each.key, each.value, each.revision) for each in values), revision, epoch)

        def events(changes: Any, revision: int) -> None:
            self._wait_for_gate()
            self.view.apply(changes, revision)

        self.etcd.watch(KEYS.prefix, reset, events, self._stop)

    def _wait_for_gate(self) -> None:
        while not self._gate.wait(0.05) and not self._stop.is_set():
            pass

    def hold_watch(self) -> None:
        """From now on this host hears nothing of what the others write."""
        self.catch_up()
        self._gate.clear()

    def release_watch(self) -> None:
        self._gate.set()

    def free_orphans(self) -> None:
        """Start the thread that takes back what refused requests left behind."""
        self._threads.append(
            threading.Thread(target=self.ledger.free_orphans, args=(self._stop,), name=f"orphans of {self.name}")
        )
        self._threads[-1].start()

    def keep(self) -> None:
        """Start the keeper of standby."""
        self._threads.append(
            threading.Thread(target=self.keeper.run, args=(self._stop,), name=f"keeper of {self.name}")
        )
        self._threads[-1].start()

    def retire(self) -> None:
        """Start the thread that carries out orders to retire other hosts."""
        self._threads.append(
            threading.Thread(target=self.retirer.run, args=(self._stop,), name=f"retirer of {self.name}")
        )
        self._threads[-1].start()

    def _given(self, pool: Pool, address: Address, mac: str) -> None:
        self.keeper.given(pool, address, mac)
        self.reconciler.given(pool, address, mac)

    def reconcile(self) -> None:
        """Start the thread that looks at the engine."""
        self._threads.append(
            threading.Thread(target=self.reconciler.run, args=(self._stop,), name=f"reconciler of {self.name}")
        )
        self._threads[-1].start()

    def guard(self, *, nothing_runs: bool = False) -> Restoration:
        """Nothing is given from now on after etcd went back, until all have answered; this host has a record then."""
        restoration = Restoration(
            self.etcd,
            self.ledger,
            self.view,
            KEYS,
            self.name,
            FakeState(self.state),
            nothing_runs=nothing_runs,
            alarm=lambda kind, text: self.alarms.append((kind, text)),
            # Whoever says so has taken a lock that the fake's callback takes too.
            changed=lambda: threading.Thread(target=self._write_record, daemon=True).start(),
        )
        seen = restoration.seen()
        if seen is not None:
            self.etcd.expect(seen.position)
        told = self.etcd.on_went_back

        def went_back(*what: Any) -> None:
            told(*what)  # the hosts share their client
            restoration.went_back(*what)

        self.etcd.on_went_back = went_back
        self.view.on_restored = restoration.learned
        self.ledger.may_give = restoration.check
        self.claims.is_restoring = self.holds.is_restoring = lambda: restoration.is_restoring
        self.reconciler.on_compared = restoration.compared
        self.restoration = restoration
        self._write_record()
        there = self.view.restored()[1]
        restoration.learned(there.token if there else "")
        self._threads.append(
            threading.Thread(target=restoration.run, args=(self._stop,), name=f"restoration of {self.name}")
        )
        self._threads[-1].start()
        return restoration

    def _write_record(self) -> None:
        assert self.restoration is not None
        key = KEYS.host(self.name)
        there = self.etcd.get(key, deadline=time.monotonic() + PATIENCE)
        known = decode(there.value, HostRecord) if there else HostRecord(host=self.name)
        record = HostRecord(host=self.name, restored=self.restoration.answered or known.restored)
        self.etcd.commit({}, [Put(key, encode(record))], deadline=time.monotonic() + PATIENCE)

    def carry_out(self) -> None:
        """Start the thread that carries out the journal."""
        self._threads.append(
            threading.Thread(
                target=self.outage.run,
                args=(self.register.settle, self._stop, lambda work: self.stock.settled(work.tokens)),
                name=f"journal of {self.name}",
            )
        )
        self._threads[-1].start()

    def settle(self) -> None:
        """One round of what that thread does."""
        self.outage.carry_out(self.register.settle, lambda work: self.stock.settled(work.tokens))

    def fill_disk(self) -> None:
        """From now on nothing can be written to the journal."""
        self._directory.cleanup()

    def tend_holds(self) -> None:
        """Start the thread that ends holds."""
        self._threads.append(threading.Thread(target=self.holds.run, args=(self._stop,), name=f"holds of {self.name}"))
        self._threads[-1].start()

    def _wanted(self) -> None:
        self.keeper.wake()
        self.holds.wake()

    def catch_up(self) -> None:
        """Until the view has all that is in etcd now."""
        assert self.view.loaded.wait(PATIENCE)
        if self._gate.is_set() and not self.etcd.down:
            assert self.view.wait_for(self.etcd.snapshot().revision, time.monotonic() + PATIENCE)

    def stop(self) -> None:
        self._stop.set()
        self._gate.set()
        self.ledger.stop_freeing_orphans()
        self.keeper.close()
        self.retirer.close()
        self.reconciler.close()
        self.outage.wake()
        self.holds.wake()
        if self.restoration is not None:
            self.restoration.close()
        self.etcd.set_down(self.etcd.down)  # wakes the watch
        for each in self._threads:
            each.join(PATIENCE)
            assert not each.is_alive(), f"thread {each.name} does not end"
        self.neighbourhood.close()
        self.outage.close()
        self._directory.cleanup()

    # ---- what Docker says

    def post(self, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Reply:
        answer = self.app.test_client().post(path, data=body, headers=headers)
        return Reply(answer.status_code, json.loads(answer.data))

    def call(self, method: str, **fields: Any) -> Reply:
        """One call of the engine, after the view has seen what others did before it."""
        self.catch_up()
        return self.post(f"/IpamDriver.{method}", json.dumps(fields).encode() + b"\n")

    def request_pool(self, subnet: str = SUBNET, ip_range: str = "", v6: bool = False, **options: str) -> Reply:
        return self.call("RequestPool", AddressSpace="L", Pool=subnet, SubPool=ip_range, Options=options, V6=v6)

    def create(self, subnet: str = SUBNET, ip_range: str = "", **options: str) -> str:
        """A pool that must be granted: its PoolID."""
        return str(self.request_pool(subnet, ip_range, v6=":" in subnet, **options).ok["PoolID"])

    def gateway(self, pool: str, address: str = "") -> Reply:
        return self.call("RequestAddress", PoolID=pool, Address=address, Options=GATEWAY)

    def auxiliary(self, pool: str, address: str) -> Reply:
        return self.call("RequestAddress", PoolID=pool, Address=address, Options=None)

    def endpoint(self, pool: str, address: str = "", **options: str) -> Reply:
        number = next(_macs)
        mac = f"02:42:{number >> 24 & 255:02x}:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
        return self.call("RequestAddress", PoolID=pool, Address=address, Options={MAC: mac, **options})

    def run(self, pool: str, address: str = "") -> str:
        """A container that must start: its address without the prefix length."""
        return str(self.endpoint(pool, address).ok["Address"]).partition("/")[0]

    def release(self, pool: str, address: str) -> Reply:
        return self.call("ReleaseAddress", PoolID=pool, Address=address)

    def release_pool(self, pool: str) -> Reply:
        return self.call("ReleasePool", PoolID=pool)


class Lan:
    """An etcd and the hosts that share it. On leaving, every thread has ended."""

    def __init__(self, etcd: FakeEtcd | None = None) -> None:
        self.etcd = etcd or FakeEtcd()
        self.hosts: list[Host] = []

    def __enter__(self) -> Lan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self.hosts:
            each.stop()

    def host(self, name: str, *carried: InterfaceAddress, **more: Any) -> Host:
        self.hosts.append(Host(self.etcd, name, *carried, **more))
        return self.hosts[-1]

    # ---- what stands in etcd

    def put(self, key: str, value: bytes | str) -> None:
        """As with etcdctl."""
        raw = value.encode() if isinstance(value, str) else value
        self.etcd.commit({}, [Put(key, raw)], deadline=time.monotonic() + PATIENCE)

    def delete(self, key: str) -> None:
        self.etcd.commit({}, [Delete(key)], deadline=time.monotonic() + PATIENCE)

    def keys(self) -> dict[str, bytes]:
        return {key: kv.value for key, kv in self.etcd.snapshot().keys.items()}

    def under(self, prefix: str) -> dict[str, bytes]:
        return {key: value for key, value in self.keys().items() if key.startswith(prefix)}

    def leases(self, segment: str = "default") -> dict[str, Lease]:
        """All leases that can be read, by address."""
        prefix = f"{KEYS.leases}{segment}/"
        return {key.removeprefix(prefix): decode(value, Lease) for key, value in self.under(prefix).items()}

    def lease(self, address: str, segment: str = "default") -> Lease | None:
        return self.leases(segment).get(str(parse_address(address)))

    def of_kind(self, kind: str) -> list[str]:
        return sorted(address for address, lease in self.leases().items() if lease.kind == kind)
