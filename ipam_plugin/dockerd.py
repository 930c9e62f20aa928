"""dockerd's own list of networks and containers. The only module that calls Docker's API.

Never from a handler of Docker's requests: an engine that waits for this driver holds locks which the answer to such
a call may need, and both would wait for ever (devplayer0/docker-net-dhcp#23). What a look asks for was answered by
engine 20.10 while it waited for RequestAddress; the details of the container that it waited for were not, nor was
anything while containers were started again at the engine's own start.
"""

from __future__ import annotations

import contextlib
import ipaddress
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import docker
import docker.errors
import docker.types
import requests

from ipam_plugin.addresses import Address, parse_address, parse_network
from ipam_plugin.errors import DockerUnavailable
from ipam_plugin.evidence import (
    AnyNetwork,
    Attachment,
    Bearer,
    Installation,
    Known,
    Look,
    Network,
    OtherNetwork,
    Others,
    OtherSubnet,
)

TIMEOUT = 10.0  # seconds for one answer of the engine
DRIVER = "ipam-plugin"
ON_A_LAN = ("bridge", "macvlan", "ipvlan")  # drivers of networks whose containers can be on a physical LAN
UNKNOWN_POOL = "192.0.2.0/24"  # a network of documentation (RFC 5737), which is on no LAN
T = TypeVar("T")


class Dockerd:
    """The Docker Engine behind a Unix socket. May be called from any thread; one look at a time."""

    def __init__(self, socket: str, timeout: float = TIMEOUT) -> None:
        self._socket = socket
        self._timeout = timeout
        self._lock = threading.Lock()
        self._client: Any = None

    def look(self) -> Look:
        """What the engine has now. Raises DockerUnavailable when any part of it is missing."""
        return self._ask(self._look)

    def installation(self) -> Installation:
        """Its version and all its networks. Raises DockerUnavailable."""
        return self._ask(self._installation)

    def refusal(self) -> str:
        """What it says when it is to make a network with an option (`doctor`) that this driver does not have.

        Nothing is made: the driver refuses it before it looks at anything. Nothing else shows from outside that the
        engine reaches the driver, of which it knows nothing until a network needs it. Raises DockerUnavailable.
        """
        return self._ask(self._refusal)

    def others(self) -> Others:
        """The networks whose addresses are another driver's, with their containers. Raises as `look` does."""
        return self._ask(self._look_elsewhere)

    def _ask(self, question: Callable[[], T]) -> T:
        with self._lock:
            try:
                if self._client is None:
                    self._client = docker.APIClient(f"unix://{self._socket}", version="auto", timeout=self._timeout)
                return question()
            except (docker.errors.DockerException, requests.RequestException, OSError) as error:
                self._drop_client()  # the next engine behind this socket may speak another version
                raise DockerUnavailable(f"dockerd at {self._socket} does not answer: {_first_line(error)}") from None
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self._drop_client()
                raise DockerUnavailable(
                    f"dockerd at {self._socket} answered with what is no answer: {type(error).__name__} {error}"
                ) from None

    def close(self) -> None:
        """A look that runs is not waited for: dockerd may answer it only when the next daemon answers dockerd."""
        if self._lock.acquire(blocking=False):
            try:
                self._drop_client()
            finally:
                self._lock.release()

    def _drop_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(OSError):
                client.close()

    def _look_elsewhere(self) -> Others:
        networks = {
            each["Id"]: _other(each)
            for each in self._client.networks()
            if each["Driver"] in ON_A_LAN and (each["IPAM"] or {}).get("Driver") != DRIVER
        }
        return Others(tuple(networks.values()), tuple(_bearers(self._client.containers(all=True), networks)))

    def _look(self) -> Look:
        began = time.monotonic()
        engine = self._client.info()["ID"]
        # The containers first: what starts meanwhile is then in the networks' own list.
        containers = self._client.containers(all=True)
        networks = self._client.networks()
        details = []
        for network in networks:
            if (network["IPAM"] or {}).get("Driver") == DRIVER:
                with contextlib.suppress(docker.errors.NotFound):  # removed meanwhile, and its endpoints before it
                    details.append(self._client.inspect_network(network["Id"]))
        ours = {network["Id"] for network in details}
        if not isinstance(engine, str) or not engine:
            raise ValueError("no engine ID")
        attachments = {(each.network_id, each.address): each for each in _of_networks(details)}
        elsewhere: set[Address] = set()
        for each in _of_containers(containers):
            if each.network_id not in ours:
                elsewhere.add(each.address)
                continue
            # Of the two, this one knows the image; the network's list knows the MAC of one that is starting.
            before = attachments.get((each.network_id, each.address))
            attachments[each.network_id, each.address] = each if before is None or each.mac else before
        return Look(
            began=began,
            ended=time.monotonic(),
            engine=engine,
            networks=tuple(map(_network, details)),
            attachments=tuple(attachments.values()),
            elsewhere=frozenset(elsewhere),
            containers={each["Id"]: _known(each) for each in containers},
        )

    def _installation(self) -> Installation:
        return Installation(self._client.version()["Version"], tuple(map(_any_network, self._client.networks())))

    def _refusal(self) -> str:
        pool = docker.types.IPAMPool(subnet=UNKNOWN_POOL)
        ipam = docker.types.IPAMConfig(driver=DRIVER, pool_configs=[pool], options={"doctor": "asks"})
        try:
            made = self._client.create_network("ipam-plugin-doctor", driver="bridge", ipam=ipam)
        except docker.errors.APIError as error:
            return str(error.explanation or error)
        self._client.remove_network(made["Id"])
        return "another driver answered to its name, and made a network with an option that this one refuses"


def _any_network(told: Mapping[str, Any]) -> AnyNetwork:
    ipam = told["IPAM"] or {}
    options = told.get("Options") or {}
    return AnyNetwork(
        name=told["Name"],
        driver=told["Driver"],
        ipam=ipam.get("Driver") or "default",
        subnets=tuple(parse_network(each["Subnet"]) for each in ipam.get("Config") or () if each.get("Subnet")),
        bridge=options.get("com.docker.network.bridge.name") or f"br-{told['Id'][:12]}",
    )


def _network(told: Mapping[str, Any]) -> Network:
    ipam = told["IPAM"]
    return Network(
        id=told["Id"],
        name=told["Name"],
        driver=told["Driver"],
        subnets=tuple((each.get("Subnet", ""), each.get("IPRange", "")) for each in ipam.get("Config") or ()),
        options=dict(ipam.get("Options") or {}),
    )


def _other(told: Mapping[str, Any]) -> OtherNetwork:
    options = dict(told.get("Options") or {})
    bridge = options.get("com.docker.network.bridge.name") or f"br-{told['Id'][:12]}"
    return OtherNetwork(
        id=told["Id"],
        name=told["Name"],
        driver=told["Driver"],
        interface=bridge if told["Driver"] == "bridge" else options.get("parent", ""),
        subnets=tuple(
            OtherSubnet(
                each.get("Subnet", ""),
                each.get("IPRange", ""),
                each.get("Gateway", ""),
                # Named AuxiliaryAddresses in older answers, AuxAddress in others.
                dict(each.get("AuxiliaryAddresses") or each.get("AuxAddress") or {}),
            )
            for each in told["IPAM"].get("Config") or ()
        ),
        options=options,
        labels=dict(told.get("Labels") or {}),
        ipv6=bool(told.get("EnableIPv6")),
        internal=bool(told.get("Internal")),
        attachable=bool(told.get("Attachable")),
    )


def _bearers(containers: list[Mapping[str, Any]], networks: Mapping[str, OtherNetwork]) -> Iterator[Bearer]:
    """Those that run with the addresses that they have; those that do not with the ones that they ask for."""
    by_name = {each.name: each.id for each in networks.values()}
    for container in containers:
        runs = _runs(container)
        for name, endpoint in _endpoints(container).items():
            # One that was never started does not know its network's ID yet.
            network = networks.get(endpoint.get("NetworkID") or by_name.get(name, ""))
            if network is None:
                continue
            asked = endpoint.get("IPAMConfig") or {}
            wanted = [asked.get("IPv4Address"), asked.get("IPv6Address")]
            has = [endpoint.get("IPAddress"), endpoint.get("GlobalIPv6Address")] if runs else wanted
            fixed = {parse_address(text) for text in wanted if text}
            found: list[Address | None] = [parse_address(text) for text in has if text]
            for address in found or [None]:
                yield Bearer(
                    network_id=network.id,
                    network=network.name,
                    address=address,
                    mac=endpoint.get("MacAddress", "").lower() if runs else "",
                    container_id=container["Id"],
                    container=_name(container),
                    image=container.get("Image", ""),
                    running=runs,
                    fixed=address in fixed,
                )


def _of_networks(details: list[Mapping[str, Any]]) -> Iterator[Attachment]:
    """What libnetwork has, also an endpoint whose container is just coming up or could not be taken down."""
    for network in details:
        for container_id, endpoint in (network.get("Containers") or {}).items():
            for text in (endpoint.get("IPv4Address"), endpoint.get("IPv6Address")):
                if text:
                    yield Attachment(
                        network_id=network["Id"],
                        network=network["Name"],
                        address=ipaddress.ip_interface(text).ip,
                        mac=endpoint.get("MacAddress", "").lower(),
                        # The engine writes ep-ID where it knows no container.
                        container_id="" if container_id.startswith("ep-") else container_id,
                        container=endpoint.get("Name", ""),
                        image="",
                    )


def _of_containers(containers: list[Mapping[str, Any]]) -> Iterator[Attachment]:
    """Of those that run: after a crash the engine still shows the last address of a container that did not survive it
    (seen on 20.10), which would keep that very container from getting it again. One that is just starting or ending is
    in the networks' list.
    """
    for container in containers:
        if not _runs(container):
            continue
        for name, endpoint in _endpoints(container).items():
            for text in (endpoint.get("IPAddress"), endpoint.get("GlobalIPv6Address")):
                if text:
                    yield Attachment(
                        network_id=endpoint.get("NetworkID", ""),
                        network=name,
                        address=parse_address(text),
                        mac=endpoint.get("MacAddress", "").lower(),
                        container_id=container["Id"],
                        container=_name(container),
                        image=container.get("Image", ""),
                    )


def _known(container: Mapping[str, Any]) -> Known:
    asked = [(each.get("IPAMConfig") or {}) for each in _endpoints(container).values()]
    fixed = [each.get(family) for each in asked for family in ("IPv4Address", "IPv6Address")]
    return Known(
        name=_name(container),
        image=container.get("Image", ""),
        running=_runs(container),
        fixed=frozenset(parse_address(text) for text in fixed if text),
    )


def _runs(container: Mapping[str, Any]) -> bool:
    return container.get("State") in ("running", "paused", "restarting")


def _endpoints(container: Mapping[str, Any]) -> Mapping[str, Any]:
    return (container.get("NetworkSettings") or {}).get("Networks") or {}


def _name(container: Mapping[str, Any]) -> str:
    # A container that is linked to has more names, such as /other/alias.
    names = [each.removeprefix("/") for each in container.get("Names") or ()]
    return next((each for each in names if "/" not in each), "")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
