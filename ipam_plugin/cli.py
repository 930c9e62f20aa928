"""The command `ipam-plugin`: tables for people, `-o json` for scripts.

Exit status: 0 done, 1 found something or refused, 2 usage or configuration.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import io
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ipam_plugin import __version__
from ipam_plugin import adopt as adopting
from ipam_plugin import check as checking
from ipam_plugin.addresses import Address, Network, Range, parse_address, parse_network, parse_range
from ipam_plugin.addresses import printable as _clean
from ipam_plugin.check import Difference, World
from ipam_plugin.config import Config, find, load
from ipam_plugin.errors import ConfigError, DockerUnavailable, IpamError, ProbeFailed, Refused
from ipam_plugin.explain import Explanation, Facts, Journalled, Local, explain
from ipam_plugin.journal import work_in
from ipam_plugin.model import CONFLICT, KINDS, NAME, Keys, Lease, SegmentSettings
from ipam_plugin.operations import Known, Operations, plain
from ipam_plugin.vendors import vendor_of

if TYPE_CHECKING:
    from ipam_plugin.adopt import Proposal
    from ipam_plugin.dockerd import Dockerd
    from ipam_plugin.etcd import Etcd
    from ipam_plugin.evidence import Look as DockerLook
    from ipam_plugin.evidence import OtherNetwork, Others
    from ipam_plugin.scan import Report, Target
    from ipam_plugin.schema import Client

EMBEDDED_DATA = Path("/var/lib/ipam-plugin/etcd")
LONGEST_CELL = 300  # characters
MOST_RATE = 1000  # requests of a scan per second


class _AddressType(click.ParamType[Address]):
    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        try:
            return parse_address(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _RangeType(click.ParamType[Range]):
    name = "address, FIRST-LAST or CIDR"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Range:
        try:
            return parse_range(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _PlaceType(click.ParamType["Network | str"]):
    name = "segment or subnet"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Network | str:
        try:
            if "/" in value:
                return parse_network(value)
            address = parse_address(value)
            return parse_network(f"{address}/{address.max_prefixlen}")
        except ValueError as error:
            if not NAME.fullmatch(value):
                self.fail(f"expected a segment's name, or {error}" if "/" not in value else str(error), param, ctx)
            return str(value)


def _segment_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not NAME.fullmatch(value):
        raise click.BadParameter("a segment's name has 1 to 63 letters, digits, '.', '_' or '-'")
    return value


def _listen_address(ctx: click.Context, param: click.Parameter, value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host and not host.startswith("[")):
        raise click.BadParameter("expected ADDRESS:PORT, IPv6 as [ADDRESS]:PORT")
    return value


config_option = click.option(
    "--config", "config_path", type=click.Path(), metavar="FILE", help="Configuration [/etc/ipam-plugin/config.yaml]"
)
output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="For people, or for scripts.",
)
segment_option = click.option(
    "--segment", metavar="NAME", callback=_segment_name, help="The segment [the configuration's]"
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="ipam-plugin")
@config_option
@click.pass_context
def cli(ctx: click.Context, config_path: str | None) -> None:
    """One register of addresses for Docker hosts whose containers live on the physical LAN.

    The daemon is `serve`. All other commands speak to etcd directly and work without it.
    """
    ctx.obj = config_path


def _with_operations(command: Callable[..., None]) -> Callable[..., None]:
    """Give the command `ops` and `config`, from --config."""

    @config_option
    @click.pass_context
    @functools.wraps(command)
    def wrapped(ctx: click.Context, /, config_path: str | None, **arguments: Any) -> None:
        # Imported here: the etcd client takes a third of a second, and --help does not need it.
        from ipam_plugin.daemon import etcd_of

        config = _load(config_path or ctx.obj)
        etcd = etcd_of(config)
        try:
            command(ops=_operations(etcd, Keys(config.prefix)), config=config, **arguments)
        finally:
            etcd.close()

    return wrapped


def _operations(etcd: Client, keys: Keys) -> Operations:
    from ipam_plugin.schema import Guarded

    def warn(problem: str) -> None:
        click.echo(_clean(f"ipam-plugin: what follows may not be all: {problem}"), err=True)

    return Operations(Guarded(etcd, keys, warn), keys, _who())


def _who() -> str:
    """Who reserves, for the others to read."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user id without an entry in passwd
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _load(path: str | None, embedded_etcd: bool = False) -> Config:
    # After `serve --embedded-etcd` without any configuration, the other commands find that etcd too.
    trial = not _is_there(find(path)) and _is_there(EMBEDDED_DATA)
    return load(path, embedded_etcd=embedded_etcd or trial)


def _is_there(path: Path) -> bool:
    """False also where this user may not look: the daemon's directory is root's alone."""
    try:
        return path.exists()
    except OSError:
        return False


@cli.command()
@config_option
@click.option("--embedded-etcd", is_flag=True, help="Run this machine's etcd as a child, for one host or a trial.")
@click.pass_obj
def serve(inherited: str | None, config_path: str | None, embedded_etcd: bool) -> None:
    """Serve this host's Docker Engine until a signal comes."""
    from ipam_plugin import daemon

    daemon.serve(_load(config_path or inherited, embedded_etcd), embedded_etcd=embedded_etcd)


@cli.command()
@click.option("--kind", type=click.Choice([*KINDS, "unreadable"]), help="Only these.")
@click.option("--host", metavar="NAME", help="Only those of one host.")
@segment_option
@output_option
@_with_operations
def leases(
    ops: Operations, config: Config, kind: str | None, host: str | None, segment: str | None, output: str
) -> None:
    """List every address that is not free, and why."""
    found = [
        each
        for each in ops.leases(segment)
        if (kind is None or each.lease.kind == kind) and (host is None or _is_of(each.lease, host))
    ]
    if output == "json":
        _json([{"segment": each.segment, "address": str(each.taken), **plain(each.lease)} for each in found])
        return
    _table(
        ["SEGMENT", "ADDRESS", "KIND", "HOST", "CONTAINER", "MAC", "SINCE", "NOTE"],
        (
            [
                each.segment,
                str(each.taken),
                each.lease.kind,
                each.lease.host or ", ".join(sorted({holder.host for holder in each.lease.holders})),
                each.lease.container.name if each.lease.container else "",
                each.lease.mac,
                each.lease.since,
                each.lease.note,
            ]
            for each in found
        ),
    )
    if not found:
        click.echo("no leases", err=True)


def _is_of(lease: Lease, host: str) -> bool:
    return lease.host == host or any(holder.host == host for holder in lease.holders)


@cli.command()
@click.argument("address", type=_AddressType())
@click.option("--wire", is_flag=True, help="Ask the wire as well: by root, on a machine of that LAN.")
@segment_option
@output_option
@_with_operations
def show(ops: Operations, config: Config, address: Address, wire: bool, segment: str | None, output: str) -> None:
    """Say who has ADDRESS or why it is not given, and who had it, from when to when, and why that ended.

    On a Docker host its journal is looked at, too: what was given or released while etcd was away.
    """
    facts = ops.facts(address, segment, config.segment, functools.partial(_local, config))
    facts = [each._replace(journal=_journalled(config, each)) for each in facts]
    if wire:
        facts = [each._replace(wire=_on_the_wire(ops, config, each)) for each in facts]
    explained = [explain(each) for each in facts]
    told = explained if segment else [each for each in explained if each.known]
    told = told or [each for each in explained if each.segment == config.segment]
    if output == "json":
        _json(
            [
                {
                    "segment": each.segment,
                    "address": str(each.address),
                    "verdict": each.verdict.value,
                    "lease": plain(each.lease) if each.lease else None,
                    "reasons": each.reasons,
                    "notes": each.notes,
                    "history": plain(each.past),
                }
                for each in told
            ]
        )
        return
    for each in told:
        for line in _explained(each):
            click.echo(_clean(line))


def _explained(each: Explanation) -> Iterable[str]:
    yield each.headline
    for line in (*each.reasons, *each.notes):
        yield f"  {line}"
    for past in each.past:
        when = f"{past.since or 'an unknown time'} to {past.until or 'an unknown time'}"
        yield f"  before: {past.who()}, {when}{f': {past.why}' if past.why else ''}"


def _local(config: Config, segment: str) -> Local:
    told = config.for_segment(segment)
    return Local(
        exclude=tuple(map(parse_range, told.exclude)),
        routers=tuple(map(parse_address, told.router)),
        cooldown=told.cooldown,
        probation=told.probation,
    )


def _journalled(config: Config, facts: Facts) -> Journalled | None:
    """What this host's journal has of the address, where it is a Docker host and this user may read it."""
    try:
        work = work_in((Path(config.state_dir) / "journal").read_bytes())
    except OSError:
        return None
    found = [each for each in work if (each.segment, each.address) == (facts.segment, facts.address)]
    return Journalled(found[0].what, found[0].lease) if found else None


def _on_the_wire(ops: Operations, config: Config, facts: Facts) -> tuple[str, ...] | str:
    """Who answers for the address, or why that cannot be told."""
    from ipam_plugin import scan as scanning

    scanning.require_rights()
    own = {pool.subnet for pool in facts.pools}
    found, unheard = _ask_wire(ops, config, facts.segment, [facts.address], own, 100)
    answer = found.get((facts.segment, facts.address))
    if answer is not None:
        return answer
    return "; ".join(why for _, why in unheard) or "no network in use has it in its subnet"


@cli.command()
@click.argument("what", type=_RangeType(), metavar="ADDRESS|RANGE|CIDR")
@click.option("--note", default="", help="What it is kept for.")
@segment_option
@_with_operations
def reserve(ops: Operations, config: Config, what: Range, note: str, segment: str | None) -> None:
    """Keep an address, a range or a CIDR for something else, on all hosts."""
    name = segment or config.segment
    inside = ops.reserve(what, name, note)
    click.echo(f"{what} in segment {name} is reserved")
    for each in inside:
        click.echo(_clean(f"  {each.taken} in it is taken now and stays so: {each.lease.told()}"), err=True)


@cli.command()
@click.argument("what", type=_RangeType(), metavar="ADDRESS|RANGE|CIDR")
@segment_option
@_with_operations
def unreserve(ops: Operations, config: Config, what: Range, segment: str | None) -> None:
    """Undo `reserve`, or a reservation that was written by hand."""
    name = segment or config.segment
    ops.unreserve(what, name)
    click.echo(f"{what} in segment {name} is not reserved any more")


@cli.command()
@click.argument("address", type=_AddressType())
@click.option("--force", is_flag=True, help="You know that nothing uses the address any more.")
@segment_option
@_with_operations
def release(ops: Operations, config: Config, address: Address, force: bool, segment: str | None) -> None:
    """Free a conflict, or with --force any lease. An address in use that is freed is given to another!"""
    name = segment or config.segment
    lease = ops.release(address, name, force)
    click.echo(_clean(f"{address} in segment {name} is free; it was {lease.told()}"))


@cli.command()
@output_option
@_with_operations
def pools(ops: Operations, config: Config, output: str) -> None:
    """List the pools in use: which host uses which subnet and range, with which options."""
    lines = ops.pools()
    if output == "json":
        _json(
            [
                {"pool": each.pool_id, "leases": each.leases, "hosts": [plain(use) for use in each.uses]}
                for each in lines
            ]
        )
        return
    _table(
        ["SEGMENT", "SUBNET", "RANGE", "OPTIONS", "ENDPOINTS", "HOSTS"],
        (
            [
                each.pool.segment if each.pool else each.pool_id,
                str(each.pool.subnet) if each.pool else "",
                str(each.pool.range or "") if each.pool else "",
                " ".join(f"{name}={value}" for name, value in each.pool.options().items() if name != "segment")
                if each.pool
                else "this version cannot read it",
                f"{each.leases} of {each.pool.candidates.size()}" if each.pool else str(each.leases),
                ", ".join(use.host for use in each.uses),
            ]
            for each in lines
        ),
    )
    if not lines:
        click.echo("no pools: no Docker network uses the driver yet", err=True)


@cli.command()
@output_option
@_with_operations
def hosts(ops: Operations, config: Config, output: str) -> None:
    """List the Docker hosts: alive, or since when not, their own addresses, their alarms."""
    lines = ops.hosts()
    if output == "json":
        _json(
            [
                {
                    "host": each.name,
                    "alive": each.alive is not None,
                    "since": each.alive.since if each.alive else "",
                    "leases": each.leases,
                    **({k: v for k, v in plain(each.host).items() if k != "host"} if each.host else {}),
                    "absent": each.absent,
                }
                for each in lines
            ]
        )
        return
    _table(
        ["HOST", "ALIVE", "LEASES", "VERSION", "JOINED", "ADDRESSES"],
        (
            [
                each.name,
                "yes" if each.alive else f"NO since {each.absent}" if each.absent else "NO",
                str(each.leases),
                each.host.version if each.host else "",
                each.host.joined if each.host else "",
                ", ".join(f"{a.address}/{a.prefixlen} {a.interface}" for a in each.host.addresses) if each.host else "",
            ]
            for each in lines
        ),
    )
    for each in lines:
        for alarm in each.host.alarms if each.host else ():
            click.echo(_clean(f"ALARM on {each.name}: {alarm}"))
    if not lines:
        click.echo("no hosts: no daemon has reached this etcd yet", err=True)


@cli.group("host")
def one_host() -> None:
    """Do something about one Docker host."""


@one_host.command()
@click.argument("name", metavar="NAME")
@click.option("--force", is_flag=True, help="The machine is off: also free what cannot be proven, and its standby.")
@click.option(
    "--wait", type=click.IntRange(10, 3600), default=300, show_default=True, help="How long to wait, in seconds."
)
@_with_operations
def retire(ops: Operations, config: Config, name: str, force: bool, wait: int) -> None:
    """Free the addresses of a host that is gone: those that stay silent when the living hosts ask the wire.

    What answers is never freed. Exit status 1 when an address stays taken.
    """
    freed = 0
    for each in ops.retire(name, force, wait):
        where = f"{each.address} in segment {each.segment}"
        freed += not each.why
        click.echo(_clean(f"{where} stays taken: {each.why}" if each.why else f"{where} is free"))
    click.echo(f"host {name} is out of the register; addresses freed: {freed}")


@cli.command()
@click.argument("name", metavar="SEGMENT", callback=_segment_name)
@click.option("--router", multiple=True, type=_AddressType(), help="The segment's router; one for each IP version.")
@click.option("--no-router", is_flag=True, help="It has none any more (with --router: only these).")
@click.option("--exclude", multiple=True, type=_RangeType(), help="Never give these out.")
@click.option("--no-exclude", multiple=True, type=_RangeType(), help="Give these out again.")
@click.option("--moving", multiple=True, type=_RangeType(), help="Addresses that move between machines (keepalived).")
@click.option("--no-moving", multiple=True, type=_RangeType(), help="They do not move any more.")
@output_option
@_with_operations
def segment(
    ops: Operations,
    config: Config,
    name: str,
    router: tuple[Address, ...],
    exclude: tuple[Range, ...],
    no_exclude: tuple[Range, ...],
    moving: tuple[Range, ...],
    no_router: bool,
    no_moving: tuple[Range, ...],
    output: str,
) -> None:
    """Show the settings that SEGMENT has on all hosts, or change them."""

    def change(settings: SegmentSettings) -> SegmentSettings:
        before = [] if no_router else settings.routers()
        routers = {each.version: str(each) for each in (*before, *router)}
        kept = {parse_range(text): text for text in settings.exclude}
        kept.update({each: str(each) for each in exclude})
        moves = {parse_range(text): text for text in settings.moving} | {each: str(each) for each in moving}
        return msgspec.structs.replace(
            settings,
            router=next(iter(routers.values()), "") if len(routers) < 2 else list(routers.values()),
            exclude=tuple(text for each, text in kept.items() if each not in no_exclude),
            moving=tuple(text for each, text in moves.items() if each not in no_moving),
        )

    if router or no_router or exclude or no_exclude or moving or no_moving:
        settings: SegmentSettings | str = ops.change_segment(name, change)
    else:
        settings = ops.segments().get(name, SegmentSettings())
    if isinstance(settings, str):
        raise IpamError(f"the settings of segment {name} cannot be read: {settings}")
    if output == "json":
        _json({"segment": name, **plain(settings)})
        return
    routers = ", ".join(map(str, settings.routers())) or "none set"
    click.echo(_clean(f"segment {name}: router {routers}{f'; {settings.note}' if settings.note else ''}"))
    for text in settings.exclude:
        click.echo(_clean(f"  excluded {text}"))
    for each in settings.reserved:
        click.echo(_clean(f"  reserved {each.range} {f'by {each.by} ' if each.by else ''}{each.note}"))
    for text in settings.moving:
        click.echo(_clean(f"  moving   {text}"))


@cli.command()
@click.argument("place", required=False, type=_PlaceType(), metavar="[SEGMENT|SUBNET]")
@click.option("--interface", metavar="NAME", default="", help="Ask there [the one that carries the subnet]")
@click.option("--reserve", "keep", is_flag=True, help="Keep the addresses of the strangers that answer for them.")
@click.option("--rate", type=click.IntRange(1, MOST_RATE), default=100, show_default=True, help="Requests in a second.")
@segment_option
@output_option
@_with_operations
def scan(
    ops: Operations,
    config: Config,
    place: Network | str | None,
    interface: str,
    keep: bool,
    rate: int,
    segment: str | None,
    output: str,
) -> None:
    """Ask the LAN who is there: which machine has which address, and what the register says of it.

    In the subnets of all pools of SEGMENT [the configuration's], or in SUBNET (or for one address) alone. Needs root
    (CAP_NET_RAW) on a machine of that LAN; no daemon has to run.
    """
    # Imported here: pyroute2 takes a while, and the other commands do not need it.
    from ipam_plugin import scan as scanning

    if isinstance(place, str) and segment not in (None, place):
        raise click.UsageError(f"SEGMENT {place} and --segment {segment} are two; name one")
    scanning.require_rights()
    name = place if isinstance(place, str) else segment or config.segment
    known = ops.known(name)
    subnets = ops.subnets(name) if place is None or isinstance(place, str) else {place: ""}
    addresses, links = scanning.interfaces_of_this_machine()
    targets, refused = [], []
    for subnet, of_pool in subnets.items():
        named = interface or of_pool or config.for_segment(name).interface or ""
        try:
            targets.append(scanning.target(subnet, addresses, links, named, known.host_macs))
        except Refused as error:
            refused.append(str(error))
    if not subnets:
        raise Refused(f"segment {name} has no pool whose subnet could be scanned; name one: ipam-plugin scan SUBNET")
    if not targets:
        raise Refused("; ".join(refused))
    for reason in refused:
        click.echo(_clean(f"not scanned: {reason}"), err=True)
    rows: list[_Row] = []
    trouble: list[str] = []
    for target in scanning.without_parts(targets):
        with _progress(f"{target.subnet} on {target.interface}") as progress:
            report = scanning.scan(target, rate=rate, peers=known.peers, known=known.addresses, progress=progress)
        if report.trouble:
            trouble.append(f"machines may be missing: {target.subnet}: {report.trouble}")
        rows += _judged(ops, known, name, target, report, keep and not report.broken_off, trouble)
        if report.broken_off:
            break
    if output == "json":
        _json([row._asdict() for row in rows])
    else:
        _table(
            ["ADDRESS", "MAC", "VENDOR", "KIND", "REGISTER"],
            ([row.address, row.mac, row.vendor, row.kind(), row.register] for row in rows),
        )
    if trouble:
        raise IpamError("; ".join(trouble))


class _Row(NamedTuple):
    """A machine that answered for an address, as it is told."""

    address: str
    mac: str
    vendor: str
    stranger: bool
    lease: Any  # as JSON has it
    reserved: bool  # by this scan
    register: str  # what is known of it, in words

    def kind(self) -> str:
        return self.lease["kind"] if self.lease else "stranger" if self.stranger else ""


def _judged(
    ops: Operations, known: Known, segment: str, target: Target, report: Report, keep: bool, trouble: list[str]
) -> Iterator[_Row]:
    """The rows of one scan, each stranger reserved where that is wanted; what is no row is said on stderr."""
    strangers = 0
    for address, answered in report.macs.items():
        # What a machine says that answers for everything, another one's answer outweighs.
        macs = [mac for mac in answered if mac not in report.proxies]
        judged = {mac: known.judge(address, mac) for mac in macs or answered}
        leases = [each.lease for each in judged.values() if each.lease]
        again = any(lease.kind == CONFLICT and lease.mac.lower() in macs for lease in leases)
        note = "found by scan: MAC " + ", ".join(f"{mac} {vendor_of(mac)}".rstrip() for mac in macs)
        kept = False
        if keep and macs and (again or any(each.stranger for each in judged.values())):
            try:
                holder = ops.reserve_for(address, macs, segment, note)
                kept = not holder
                if holder:
                    click.echo(_clean(f"{address} in segment {segment} is not reserved: {holder}"), err=True)
            except IpamError as error:  # what was reserved until now must be said all the same
                trouble.append(f"{address} and the strangers after it could not be reserved: {error}")
                keep = False
        if len(macs) > 1:
            click.echo(f"{address} is used by {len(macs)} machines: MAC {', '.join(macs)}", err=True)
        for mac, each in judged.items():
            words = [each.words] if each.words else []
            words += ["this machine itself"] if address in target.own and each.stranger else []
            words += [] if macs else ["answered by proxy ARP alone"]
            words += [f"reserved now, {note}"] if kept else []
            stranger = each.stranger and bool(macs)
            strangers += stranger
            lease = plain(each.lease) if each.lease else None
            yield _Row(str(address), mac, vendor_of(mac), stranger, lease, kept, ", ".join(words))
    click.echo(
        f"{target.subnet} on {target.interface}: {report.asked} asked for, {len(report.macs)} in use, "
        f"{strangers} by strangers",
        err=True,
    )
    if not target.one_by_one:
        click.echo(
            f"{target.subnet} is too large to ask for every address: those were asked for that the register knows or"
            " that showed up; a machine that keeps quiet is not found",
            err=True,
        )
    for mac, count in report.proxies.items():
        click.echo(
            f"MAC {mac} alone answers for {count} addresses (proxy ARP): behind it, used and free ones look the same,"
            " and none of them is reserved",
            err=True,
        )


@cli.command()
@click.argument("networks", nargs=-1, metavar="[NETWORK]...")
@click.option("--apply", "write", is_flag=True, help="Write what is proposed, but for the conflicts.")
@click.option("--rate", type=click.IntRange(1, MOST_RATE), default=100, show_default=True, help="Requests in a second.")
@segment_option
@output_option
@_with_operations
def adopt(
    ops: Operations,
    config: Config,
    networks: tuple[str, ...],
    write: bool,
    rate: int,
    segment: str | None,
    output: str,
) -> None:
    """Propose what the register needs before Docker NETWORKs [all on a LAN] are switched over to this driver.

    Their containers' addresses are kept for these containers, those of other machines that answer on the wire are
    reserved, and conflicts are named. Nothing is written without --apply. Needs root on the Docker host; its
    containers run on. Exit status 1 when something has to be cured first.
    """
    from ipam_plugin import scan as scanning
    from ipam_plugin.dockerd import Dockerd

    host, name = _own_name(config), segment or config.segment
    scanning.require_rights()
    with contextlib.closing(Dockerd(config.docker.socket)) as dockerd:
        others = dockerd.others()
    addresses, links = scanning.interfaces_of_this_machine()
    chosen = _chosen(others, networks, links)
    ids = {each.id for each in chosen}
    wire, unheard = _machines_beside(ops, config, name, chosen, addresses, links, rate)
    world = adopting.World(
        host=host,
        segment=name,
        default_segment=config.segment,
        register=ops.register(),
        networks=chosen,
        bearers=[each for each in others.bearers if each.network_id in ids],
        carried=addresses,
        links=links,
        wire=wire,
        unheard=unheard,
    )
    proposals = adopting.propose(world, vendor_of)
    written, failed = _write_all(ops, name, proposals) if write else (set(), [])
    if output == "json":
        _json(
            [
                {**{part: getattr(each, part) for part in _PROPOSED}, "written": number in written}
                for number, each in enumerate(proposals)
            ]
        )
    else:
        _table(
            ["ADDRESS", "KIND", "CONTAINER", "MAC", "WHAT"],
            (
                [
                    each.address,
                    each.kind,
                    each.container,
                    each.mac,
                    f"{each.what}{each.cure and f'. Cure: {each.cure}'}",
                ]
                for each in proposals
            ),
        )
    for line in failed:
        click.echo(_clean(line), err=True)
    stops = sum(each.stops for each in proposals)
    wanted = sum(each.write is not None for each in proposals)
    said = f"{len(written)} of {wanted} written" if write else f"{wanted} to be written with --apply"
    click.echo(f"{len(proposals)} found: {said}, {stops} to be cured first", err=True)
    if stops or failed:
        sys.exit(1)
    if write and output == "table":
        for network in chosen:
            click.echo(_clean(f"To switch network {network.name} over, type:"))
            for line in adopting.switch(world, network):
                click.echo(_clean(f"  {line}"))


_PROPOSED = ("address", "kind", "container", "mac", "what", "cure")


def _chosen(others: Others, named: Sequence[str], links: Sequence[Any]) -> list[OtherNetwork]:
    """The networks that are adopted; why others are not is said on stderr."""
    there = {each.name: each for each in others.networks}
    unknown = [name for name in named if name not in there]
    if unknown:
        known = ", ".join(sorted(there)) or "none"
        raise Refused(
            f"there is no network {', '.join(unknown)} of driver bridge, macvlan or ipvlan here whose addresses another"
            f" IPAM driver gives; these are: {known}"
        )
    chosen = []
    for name, network in there.items():
        why = adopting.why_no_lan(network, links)
        if (name in named) if named else not why:
            chosen.append(network)
        elif not named:
            click.echo(_clean(f"network {name} is left alone: {why}"), err=True)
    if not chosen:
        raise Refused("no network of this host is on a LAN and has its addresses from another IPAM driver")
    return chosen


def _machines_beside(
    ops: Operations,
    config: Config,
    segment: str,
    networks: Sequence[OtherNetwork],
    addresses: Sequence[Any],
    links: Sequence[Any],
    rate: int,
) -> tuple[dict[Address, Sequence[str]], list[tuple[str, str]]]:
    """Who answers in the subnets of these networks, and the subnets of which that is not known, with the reason."""
    from ipam_plugin import scan as scanning

    known = ops.known(segment)
    unheard: list[tuple[str, str]] = []
    targets = []
    for network in networks:
        for subnet in adopting.subnets_of(network):
            try:
                targets.append(scanning.target(subnet, addresses, links, network.interface, known.host_macs))
            except Refused as error:
                unheard.append((str(subnet), str(error)))
    found: dict[Address, Sequence[str]] = {}
    for target in scanning.without_parts(targets):
        try:
            with _progress(f"{target.subnet} on {target.interface}") as progress:
                report = scanning.scan(target, rate=rate, peers=known.peers, known=known.addresses, progress=progress)
        except ProbeFailed as error:
            unheard.append((str(target.subnet), str(error)))
            continue
        if report.broken_off:
            raise click.Abort
        if report.trouble:
            unheard.append((str(target.subnet), report.trouble))
        for mac, count in report.proxies.items():
            unheard.append((str(target.subnet), f"MAC {mac} answers for {count} addresses (proxy ARP)"))
        for address, macs in report.macs.items():
            found[address] = [mac for mac in macs if mac not in report.proxies]
    return found, unheard


def _write_all(ops: Operations, segment: str, proposals: Sequence[Proposal]) -> tuple[set[int], list[str]]:
    """Which of the proposals were written, by their place in the list; what was not, and why."""
    written: set[int] = set()
    failed: list[str] = []
    for number, each in enumerate(proposals):
        if each.write is None:
            continue
        try:
            if ops.adopt(segment, each.write):
                written.add(number)
            else:
                failed.append(f"{each.address} has just changed, and was not written; the same again")
        except IpamError as error:  # what was written until now must be said all the same
            failed.append(f"{each.address} and what follows it was not written: {error}")
            break
    return written, failed


@cli.command()
@click.option("--repair", "mend", is_flag=True, help="Mend what is provably safe, and say what is left.")
@click.option("--rate", type=click.IntRange(1, MOST_RATE), default=100, show_default=True, help="Requests in a second.")
@output_option
@_with_operations
def check(ops: Operations, config: Config, mend: bool, rate: int, output: str) -> None:
    """Compare the register with Docker and the wire of this host, and say each difference with its cause and cure.

    Needs root on a Docker host; no daemon has to run. Exit status 1 when anything was found, also when it was mended.
    """
    from ipam_plugin.dockerd import Dockerd

    look = _Look(ops, config, _own_name(config), Dockerd(config.docker.socket), rate)
    with contextlib.closing(look):
        world = look.world()
        found = checking.compare(world, look.keys)
        mended = _mended(ops, look, world, found) if mend else set()
    if output == "json":
        _json(
            [
                {**{name: getattr(each, name) for name in _TOLD}, "repaired": number in mended}
                for number, each in enumerate(found)
            ]
        )
    else:
        for number, each in enumerate(found):
            where = f"{each.address or each.segment or 'host ' + world.host}: "
            done = " REPAIRED." if number in mended else ""
            click.echo(_clean(f"{where}{each.kind}: {each.what}. Cause: {each.cause}. Cure: {each.cure}.{done}"))
    if not found:
        click.echo("no differences", err=True)
        return
    left = len(found) - len(mended)
    click.echo(f"{len(found)} found" + (f", {len(mended)} repaired, {left} left" if mend else ""), err=True)
    sys.exit(1)


_TOLD = ("segment", "address", "kind", "what", "cause", "cure")


def _own_name(config: Config) -> str:
    """The name under which this host is in the register, as its daemon has it."""
    from ipam_plugin.host import StateDir

    if config.host:
        return config.host
    name = StateDir(config.state_dir).read("host") if _is_there(Path(config.state_dir) / "host") else ""
    if not name:
        raise ConfigError(
            f"host: no daemon has served here yet (there is no {config.state_dir}/host), so this host has no name in"
            " the register; start the daemon, or name the host here"
        )
    return name


def _mended(ops: Operations, look: _Look, world: World, found: Sequence[Difference]) -> set[int]:
    """Which of the differences were repaired, by their place in the list."""
    mended = {n for n, each in enumerate(found) if each.repair and not each.repair.twice and _mend(ops, each)}
    again = {n: each for n, each in enumerate(found) if each.repair and each.repair.twice}
    if not again or isinstance(world.engine, str):
        return mended
    left = max(0.0, checking.APART - (time.monotonic() - look.began))
    click.echo(f"looking again in {left:.0f} s: only what is found twice is given back", err=True)
    time.sleep(left)
    second = look.world({(each.segment, each.address) for each in again.values()})
    if isinstance(second.engine, str) or second.engine.id != world.engine.id:
        return mended
    later = checking.compare(second, look.keys)
    for number, each in again.items():
        same = next((one for one in later if one.same(each)), None)
        if same is not None and _mend(ops, same):
            mended.add(number)
    return mended


def _mend(ops: Operations, difference: Difference) -> bool:
    assert difference.repair is not None
    try:
        return ops.mend(difference.repair, "found gone by check")
    except IpamError as error:  # what was mended until now must be said all the same
        click.echo(_clean(f"{difference.address or difference.kind} is not repaired: {error}"), err=True)
        return False


class _Look:
    """Reads what is compared, all of it again with each call."""

    def __init__(self, ops: Operations, config: Config, host: str, dockerd: Dockerd, rate: int) -> None:
        self.keys = Keys(config.prefix)
        self.began = 0.0  # the last look at Docker, in seconds of time.monotonic()
        self._ops = ops
        self._config = config
        self._host = host
        self._dockerd = dockerd
        self._rate = rate

    def close(self) -> None:
        self._dockerd.close()

    def world(self, only: Collection[tuple[str, str]] | None = None) -> World:
        """The wire is asked for the addresses of `only`; None: for all that are in question.

        Docker is looked at before and after all else, so that what begins or ends meanwhile is no difference.
        """
        from ipam_plugin import scan as scanning

        before = self._docker()
        register = self._ops.register()
        try:
            carried: Any = scanning.interfaces_of_this_machine()[0]
        except ProbeFailed as error:
            carried = str(error)
        world = World(
            host=self._host,
            default_segment=self._config.segment,
            segments=frozenset(self._config.segments),
            grace=self._config.docker.grace,
            now=time.time(),
            register=register,
            engine=before if isinstance(before, str) else checking.engine_between(before, before),
            carried=carried,
            wire={},
            unheard=[],
        )
        places = [each for each in checking.places(world, self.keys) if only is None or (each[0], str(each[1])) in only]
        wire, unheard = self._wire(world, places)
        if not isinstance(before, str):
            after = self._docker()
            engine = after if isinstance(after, str) else checking.engine_between(before, after)
            world = world._replace(engine=engine)
        return world._replace(wire=wire, unheard=unheard, now=time.time())

    def _docker(self) -> DockerLook | str:
        try:
            look = self._dockerd.look()
        except DockerUnavailable as error:
            return str(error)
        self.began = look.began
        return look

    def _wire(
        self, world: World, places: Sequence[checking.Place]
    ) -> tuple[dict[checking.Place, checking.Answer], list[tuple[str, str]]]:
        """Who answers, and the segments of which that is not known, with the reason."""
        from ipam_plugin import scan as scanning

        wire: dict[checking.Place, checking.Answer] = {}
        unheard: list[tuple[str, str]] = []
        if not places:
            return wire, unheard
        try:
            scanning.require_rights()
        except ProbeFailed as error:
            return wire, [("", str(error))]
        own = {each.pool.subnet for each in world.register.pools if each.host == world.host and each.pool}
        for segment in dict.fromkeys(segment for segment, _ in places):
            wanted = [address for each, address in places if each == segment]
            answers, why = _ask_wire(self._ops, self._config, segment, wanted, own, self._rate)
            wire |= answers
            unheard += why
        return wire, unheard


@cli.command()
@click.option("--no-lan", is_flag=True, help="Send nothing on the LAN.")
@output_option
@_with_operations
def doctor(ops: Operations, config: Config, no_lan: bool, output: str) -> None:
    """Say what is wrong with the set-up of this host, with the cure, and what was found in order.

    etcd, the service, Docker's side and the LAN; `check` compares the leases. Needs root on a Docker host; what cannot
    be looked at is said. Exit status 1 when something is wrong.
    """
    from ipam_plugin import doctor as deciding
    from ipam_plugin import examine
    from ipam_plugin.daemon import etcd_of

    def connect(endpoint: str) -> Etcd:
        only = msgspec.structs.replace(config.etcd, endpoints=(endpoint,))
        return etcd_of(msgspec.structs.replace(config, etcd=only))

    found = deciding.examine(examine.gather(config, ops, connect, ask_lan=not no_lan))
    if output == "json":
        _json([each._asdict() for each in found])
    else:
        for each in found:
            wrong = f". Cause: {each.cause}. Cure: {each.cure}." if each.state == deciding.FOUND else ""
            state = each.state.upper() if wrong else each.state
            click.echo(_clean(f"{state:<12} {each.kind}: {each.what}{wrong}"))
    click.echo(deciding.summary(found), err=True)
    if any(each.state == deciding.FOUND for each in found):
        sys.exit(1)


def _ask_wire(
    ops: Operations, config: Config, segment: str, wanted: Sequence[Address], own: Collection[Network], rate: int
) -> tuple[dict[checking.Place, checking.Answer], list[tuple[str, str]]]:
    """Who answers for these addresses, and the segment with the reason where that is not known of all.

    Only of the subnets `own` this host must know: others may be no LAN of its.
    """
    from ipam_plugin import scan as scanning

    wire: dict[checking.Place, checking.Answer] = {}
    unheard: list[tuple[str, str]] = []
    try:
        addresses, links = scanning.interfaces_of_this_machine()
    except ProbeFailed as error:
        return wire, [(segment, str(error))]
    known = ops.known(segment)
    of_pools = ops.subnets(segment)
    for subnet in sorted(of_pools, key=lambda each: -each.prefixlen):
        inside = [each for each in wanted if each in subnet]
        wanted = [each for each in wanted if each not in subnet]
        if not inside:
            continue
        named = of_pools[subnet] or config.for_segment(segment).interface or ""
        try:
            target = scanning.target(subnet, addresses, links, named, known.host_macs, whole=False)
            with _progress(f"{subnet} on {target.interface}") as progress:
                report = scanning.ask(
                    target,
                    inside,
                    rate=rate,
                    taken={*known.addresses, *inside},
                    peers=known.peers,
                    progress=progress,
                )
        except (Refused, ProbeFailed) as error:
            if subnet in own:
                unheard.append((segment, str(error)))
            continue
        if report.trouble:
            unheard.append((segment, f"{subnet}: {report.trouble}"))
        unheard += [
            (segment, f"MAC {mac} on {target.interface} answers for everything (proxy ARP)") for mac in report.proxies
        ]
        for address in {*inside, *report.macs}:
            told = report.macs.get(address, ())
            macs = tuple(mac for mac in told if mac not in report.proxies)
            silent = not told and not report.trouble
            wire[segment, address] = macs if macs or silent else None
    return wire, unheard


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, when that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@cli.command()
@click.option(
    "--listen",
    default="127.0.0.1:9180",
    show_default=True,
    metavar="ADDRESS:PORT",
    callback=_listen_address,
    help="Where browsers reach it.",
)
@click.option("--name", "names", multiple=True, metavar="NAME", help="Browsers may ask for the page by this name, too.")
@config_option
@click.pass_obj
def web(inherited: str | None, config_path: str | None, listen: str, names: tuple[str, ...]) -> None:
    """Serve a page that shows the register in the browser, until a signal comes. It reads only.

    Whoever reaches it may read it; on another address than this machine's own it belongs behind a proxy that asks who
    comes.
    """
    from ipam_plugin import daemon
    from ipam_plugin import web as page

    config = _load(config_path or inherited)
    daemon.log_to_stderr(config)
    page.serve(daemon.etcd_of(config), Keys(config.prefix), listen, names)


@cli.command("check-config")
@click.argument("file", required=False, type=click.Path())
@config_option
@click.pass_obj
def check_config(inherited: str | None, config_path: str | None, file: str | None) -> None:
    """Say whether a configuration can be used, and what is wrong with it."""
    from ipam_plugin import install as installing

    path = file or config_path or inherited
    config = load(path)
    installing.check_readable({"the file": str(find(path)), **config.etcd.files()})
    if exposed := config.etcd.exposed():
        raise ConfigError("\n".join(exposed))
    click.echo(f"{path or 'the configuration'} is good")


@cli.command()
@click.option("--no-start", is_flag=True, help="Put the files in place, enable and start nothing.")
def install(no_start: bool) -> None:
    """Put the driver's spec, an example configuration, the systemd units, the manual page and the shells' completions
    in place.
    """
    from ipam_plugin import install as installing
    from ipam_plugin import manual

    for line in installing.install(start=not no_start, manual=manual.page(cli, __version__)):
        click.echo(line)


@cli.command()
@click.pass_obj
def uninstall(config_path: str | None) -> None:
    """Take back exactly what `install` put in place, and give back this host's standby addresses."""
    from ipam_plugin import install as installing

    for line in installing.uninstall(give_back=lambda: _give_back_standby(config_path)):
        click.echo(_clean(line))


def _give_back_standby(config_path: str | None) -> Iterator[str]:
    """What the host of this configuration has as standby goes; a register that cannot be reached stops nothing."""
    from ipam_plugin.daemon import etcd_of
    from ipam_plugin.host import StateDir
    from ipam_plugin.install import CONFIG, STATE_DIR

    host = "NAME"
    file = find(config_path)
    if str(file) == CONFIG and not _is_there(file) and not _is_there(Path(STATE_DIR) / "host"):
        return  # neither was anything set up here nor has a daemon served
    try:
        config = _load(config_path)
        if not _is_there(Path(config.state_dir) / "host"):
            return  # no daemon has ever served here
        state = StateDir(config.state_dir)
        state.lock()  # a daemon that was not started by systemd could still give them to containers
        host = state.read("host")
        etcd = etcd_of(config)
        try:
            count = _operations(etcd, Keys(config.prefix)).give_back_standby(host)
        finally:
            etcd.close()
    except (ConfigError, IpamError) as error:
        yield (
            f"this host's standby addresses were not given back: {'; '.join(str(error).splitlines())}; to do it, when "
            f"the register can be reached: ipam-plugin leases --kind standby --host {host}, and ipam-plugin release "
            "ADDRESS --force for each"
        )
        return
    if count:
        yield f"standby and held addresses of host {host} given back: {count}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column not in ("NOTE", "REGISTER", "WHAT"), overflow="fold")
    widths = [len(column) for column in columns]
    for row in rows:
        cells = [_short(_clean(cell)) for cell in row]
        widths = [max(width, cell_len(cell)) for width, cell in zip(widths, cells, strict=True)]
        # Text, because what stands in etcd may look like rich's markup.
        table.add_row(*map(Text, cells))
    if table.row_count:
        # A pipe has no width: there nothing may be cut.
        console = Console(width=None if sys.stdout.isatty() else sum(widths) + 2 * len(widths))
        console.print(table, crop=sys.stdout.isatty())


def _short(text: str) -> str:
    """A cell that no real value fills must not push the others off the screen; -o json tells all of it."""
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def _json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of Latin letters alone still shows what it can
            stream.reconfigure(errors="backslashreplace")
    try:
        cli.main(prog_name="ipam-plugin", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except ConfigError as error:
        click.echo(f"ipam-plugin: {error}", err=True)
        sys.exit(2)
    except IpamError as error:
        click.echo(_clean(f"ipam-plugin: {error}"), err=True)
        sys.exit(1)
