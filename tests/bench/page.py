"""What somebody with a browser waits for when the register holds many leases."""

from __future__ import annotations

import contextlib
import ipaddress
import random
import time
from urllib.parse import quote

from daemons import group
from ipam_plugin.etcd import Delete, Put
from ipam_plugin.model import Keys, Pool
from tests.browser import Browser, WebProcess, browser

from .measure import Row, Scale, median
from .stage import LAN, Stage, lease, rollup

PART = "198.18.0.0/16"  # of LAN; half of the leases are in it
CELLS = "198.18.7.0/24"  # and of that, address by address

# Milliseconds since the epoch at which an address of the map is shown to be taken, or not any more.
CHANGE = """
const [address, taken, done] = arguments;
const cell = document.querySelector(`[data-address="${address}"]`);
const look = () => (cell.dataset.kind === "endpoint") === taken && (observer.disconnect(), done(performance.timeOrigin + performance.now()));
const observer = new MutationObserver(look);
observer.observe(cell, { attributes: true });
look();
"""  # noqa: E501


def page(stage: Stage, scale: Scale) -> list[Row]:
    """The page of a full register beside that of an empty one: opened anew each time, and while it is open."""
    full, empty = stage.fresh_keys(), stage.fresh_keys()
    stage.fill(full, LAN, scale.leases)
    painted: dict[tuple[str, Keys], list[float]] = {}
    drawn: dict[tuple[str, Keys], list[float]] = {}
    live: dict[Keys, list[float]] = {full: [], empty: []}
    memory: dict[Keys, float] = {}
    where = {
        "overview": "#/",
        "map of a /16": f"#/map/default/{quote(PART, '')}",
        "map of a /24": f"#/map/default/{quote(CELLS, '')}",
    }
    with browser() as screen, contextlib.ExitStack() as opened:
        screen.size(1200, 900)
        pages = {}
        for keys in (full, empty):
            directory = stage.directory / keys.prefix.strip("/")
            pages[keys] = opened.enter_context(WebProcess(directory, stage.settings, keys.prefix))
            screen.open(pages[keys].url + "icon.svg")  # so that no side pays for the browser's own start
        for turn in range(scale.starts):
            for keys in (full, empty) if turn % 2 else (empty, full):
                for name, route in where.items():
                    screen.open(pages[keys].url + route)
                    painted.setdefault((name, keys), []).append(_painted(screen))
                    drawn.setdefault((name, keys), []).append(_drawn(screen))
        for keys in (full, empty):
            screen.open(pages[keys].url + where["map of a /24"])
            _drawn(screen)
            live[keys] = _changes(stage, keys, screen, scale.changes)
            memory[keys] = sum(rollup(each)["Pss"] for each in group(pages[keys].process.pid)) / 1024
    count = f"{scale.leases} leases"
    n = f"medians of {scale.starts}"
    rows = []
    for name in where:
        for what, times in (("first paint", painted), (f"{name} drawn", drawn)):
            slowest = f"{n}; slowest {max(times[name, full]):.3f} s"
            what = f"{what}, page opened at the {name}" if what == "first paint" else what
            rows.append(
                Row.limit(f"{what}, {count}", median(times[name, full]), "s", median(times[name, empty]), 1, slowest)
            )
    rows.append(
        Row.limit(
            f"from a transaction to its cell in an open page, slowest, {count}",
            max(live[full]),
            "s",
            max(live[empty]),
            2,
            f"n={len(live[full])}; median {median(live[full]):.3f} s, with none {median(live[empty]):.3f} s",
        )
    )
    rows.append(Row.limit(f"memory of ipam-plugin web, {count}", memory[full], "MB", memory[empty], None, "PSS"))
    return rows


def _painted(screen: Browser) -> float:
    """Seconds from the beginning of the navigation to the first paint with something in it, as the browser says."""
    return _entry(screen, "first-contentful-paint")


def _drawn(screen: Browser) -> float:
    """The same, to the first frame after the data of the register are in the page."""
    return _entry(screen, "drawn")


def _entry(screen: Browser, name: str) -> float:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = screen.run("return performance.getEntriesByName(arguments[0])[0]?.startTime", name)
        if found is not None:
            return float(found) / 1000
        time.sleep(0.02)
    raise AssertionError(f"the browser has no {name}")


def _changes(stage: Stage, keys: Keys, screen: Browser, count: int) -> list[float]:
    """From just before a transaction to the change of its cell, at random moments of the page's second."""
    pool = Pool.make(LAN, "", {}, "default")
    chance = random.Random(count)
    free = screen.run(
        "return [...document.querySelectorAll('.cell[data-kind=free]')].map((each) => each.dataset.address)"
    )
    seconds = []
    for address in map(ipaddress.ip_address, chance.choices(free, k=count // 2)):
        key = keys.lease("default", address)
        for write in (Put(key, lease(pool, int(address), "elsewhere")), Delete(key)):
            time.sleep(chance.uniform(0.5, 1.5))
            began = time.time()
            stage.client.commit({}, [write], deadline=time.monotonic() + 10)
            seconds.append(screen.wait(CHANGE, str(address), isinstance(write, Put)) / 1000 - began)
    return seconds
