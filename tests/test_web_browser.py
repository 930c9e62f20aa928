"""The page in a real browser, on a real etcd: what people see, press and wait for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import RealEtcd, missing
from etcd_server import EtcdCluster, until
from ipam_plugin.addresses import parse_address
from ipam_plugin.etcd import Delete, Etcd, Put
from ipam_plugin.model import ENDPOINT, Container, Keys, Lease, encode
from tests import sample

try:
    from tests.browser import Browser, Key, WebProcess, browser
except ImportError as error:  # selenium
    missing("browser", str(error))

pytestmark = [pytest.mark.browser, pytest.mark.etcd]

OFFICE = "#/map/default/192.168.77.0%2F24"
SHOP = f'[data-address="{sample.SHOP}"]'
PATIENCE = 20.0  # seconds; the page looks every second, and a machine may be busy


@pytest.fixture(scope="module")
def screen() -> Iterator[Browser]:
    with browser() as made:
        yield made


@pytest.fixture(scope="module")
def office(shared_etcd: EtcdCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WebProcess, RealEtcd]]:
    """A page on the sample register, which the tests leave as it was."""
    prefix = "/office/v1/"
    client = Etcd(shared_etcd.settings())
    sample.write(client, {**sample.office(Keys(prefix)), **sample.campus(Keys(prefix), 3000)})
    real = RealEtcd(client, prefix, shared_etcd.settings(), shared_etcd)
    with WebProcess(tmp_path_factory.mktemp("web"), real.settings, prefix) as page:
        yield page, real
    client.close()


@pytest.fixture(autouse=True)
def _usual(screen: Browser) -> Iterator[None]:
    """A large window, light; and nothing to complain of afterwards, the content security policy included."""
    screen.size(1200, 900)
    screen.scheme("light")
    screen.open("about:blank")  # the last page would go on asking
    screen.console()
    yield
    assert screen.console() == []


def put(real: RealEtcd, address: str, lease: Lease | None) -> None:
    key = Keys(real.prefix).lease("default", parse_address(address))
    write = Delete(key) if lease is None else Put(key, encode(lease))
    real.client.commit({}, [write], deadline=time.monotonic() + 10)


def test_from_the_overview_to_an_address(screen: Browser, office: tuple[WebProcess, RealEtcd]) -> None:
    """Networks and how full, alarms, hosts; a click opens the map, another one says who, since when and who before."""
    screen.open(office[0].url)
    told = screen.until_text("192.168.77.0/24")
    assert "Alarm on host2: 192.168.77.61 is used twice" in told
    assert "office, 2nd floor" in told
    assert screen.one(".beat.gone").text == "none"
    assert "49 % taken" in told
    screen.one('a[data-key="subnet default 192.168.77.0/24"]').click()
    cells = until(lambda: screen.all(".cell"), "the map")
    assert len(cells) == 256
    kinds = screen.run("return [...new Set([...document.querySelectorAll('.cell')].map((each) => each.dataset.kind))]")
    assert len(kinds) == 11
    assert "containers" not in screen.text(".legend")
    cell = screen.one(SHOP)
    assert cell.get_attribute("title").startswith(f"{sample.SHOP} – endpoint: container shop on host host1")
    assert cell.text.split() == ["42", "E"]
    cell.click()
    detail = screen.until_text("wiki9", ".detail")
    for words in (
        "container shop on host host1",
        "02:42:c0:a8:4d:2a",
        "registry.example/shop:3",
        "shop on host2",
        "queue9",
    ):
        assert words in detail
    assert screen.address.endswith(f"{OFFICE}/{sample.SHOP}")
    assert "token" not in screen.run("return document.documentElement.outerHTML")


def test_search_while_typing(screen: Browser, office: tuple[WebProcess, RealEtcd]) -> None:
    """`/` goes there, results come with each letter, Enter goes to the first one, Enter again opens it."""
    screen.open(office[0].url)
    screen.until_text("192.168.77.0/24")
    screen.press("/", *"PRINTER")
    screen.until_text("Search: PRINTER")
    assert screen.one(".hits a").text.split()[1] == "192.168.77.140"
    screen.press(Key.ENTER, Key.ENTER)
    assert "printer, 2nd floor" in screen.until_text("HISTORY")
    screen.one('a[data-key="on the map"]').click()
    until(lambda: screen.all('.cell[aria-selected="true"]'), "the address on its map")
    screen.press("/", *"00-1b-a9-3c")
    assert "Brother" in screen.until_text("192.168.77.57")
    screen.one("#query").clear()
    screen.press("/", *"no such thing at all")
    screen.until_text("Nothing in the register has this")


def test_a_change_is_there_by_itself(screen: Browser, office: tuple[WebProcess, RealEtcd]) -> None:
    """A container starts and stops, and its cell, the counts and its open detail follow, nobody reloads anything."""
    page, real = office
    screen.open(f"{page.url}{OFFICE}/192.168.77.9")
    screen.until_text("Nobody had it before", ".detail")
    screen.run("window.kept = 1")
    put(real, "192.168.77.9", Lease(ENDPOINT, "host1", container=Container("late")))
    try:
        screen.until_text("container late on host host1", ".detail", PATIENCE)
        cell = screen.one('[data-address="192.168.77.9"]')
        assert cell.get_attribute("data-kind") == "endpoint"
        assert "79 endpoint" in screen.text(".legend")
    finally:
        put(real, "192.168.77.9", None)
    until(lambda: cell.get_attribute("data-kind") == "free", "it is free again", PATIENCE)
    screen.until_text("78 endpoint", ".legend")
    assert screen.run("return window.kept") == 1


def test_the_keyboard_is_enough(screen: Browser, office: tuple[WebProcess, RealEtcd]) -> None:
    """One stop with Tab for the map, arrows over it, Enter and Escape; a change meanwhile moves nobody."""
    page, real = office
    screen.open(f"{page.url}{OFFICE}")
    screen.one(".cell[data-kind]")
    screen.one(SHOP)
    for _ in range(12):
        if screen.focused().startswith("192.168.77.0,"):
            break
        screen.press(Key.TAB)
    assert screen.focused().startswith("192.168.77.0, excluded")
    screen.press(Key.ARROW_DOWN, Key.ARROW_DOWN, *[Key.ARROW_RIGHT] * 10)
    assert screen.focused().startswith("192.168.77.42, endpoint: container shop")
    assert screen.text("#peek").startswith("192.168.77.42 – endpoint: container shop")
    screen.press(Key.END)
    assert screen.focused().startswith("192.168.77.47,")
    screen.press(Key.HOME, Key.PAGE_DOWN)
    assert screen.focused().startswith("192.168.77.96,")
    screen.press(Key.ARROW_LEFT, Key.ENTER)
    assert "192.168.77.95" in screen.until_text("192.168.77.95", ".detail")
    assert screen.focused().startswith("192.168.77.95,")
    put(real, "192.168.77.9", Lease(ENDPOINT, "host1", container=Container("late")))
    try:
        screen.until_text("79 endpoint", ".legend", PATIENCE)
    finally:
        put(real, "192.168.77.9", None)
    assert screen.focused().startswith("192.168.77.95,")
    screen.press(Key.ESCAPE)
    assert screen.text(".detail") == ""
    assert screen.focused().startswith("192.168.77.95,")
    screen.until_text("78 endpoint", ".legend", PATIENCE)


def test_a_large_network_opens_in_blocks(screen: Browser, office: tuple[WebProcess, RealEtcd]) -> None:
    """A /16 is 256 tiles; the keyboard opens one, its map knows the way back."""
    screen.open(f"{office[0].url}#/map/campus/10.20.0.0%2F16")
    until(lambda: len(screen.all(".block .bar")) == 256, "the blocks")
    screen.run("document.querySelector('.block').focus()")
    screen.press(Key.ARROW_DOWN, Key.ARROW_RIGHT)
    assert screen.focused().startswith("10.20.17.0/24, ")
    screen.press(Key.ENTER)
    screen.one('[data-address="10.20.17.255"]')
    screen.one('.crumbs a[href$="10.20.0.0%2F16"]').click()
    until(lambda: len(screen.all(".block .bar")) == 256, "the blocks again")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(screen: Browser, office: tuple[WebProcess, RealEtcd], scheme: str) -> None:
    """Nothing is wider than the screen, cells are large enough for a finger (WCAG 2.5.8: 24 pixels), and the address
    that is open leaves its cell in sight."""
    screen.size(390, 844, phone=True)
    screen.scheme(scheme)
    for where, what in (
        ("", ".hosts tr"),
        ("#/search/host1", ".hits a"),
        ("#/map/campus/10.20.0.0%2F16", ".block .bar"),
        (f"{OFFICE}/{sample.SHOP}", ".past li"),
    ):
        screen.open(office[0].url + where)
        screen.one(what)
        wide = screen.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide == [390, 390], where
    box = screen.run(f"const box = document.querySelector('{SHOP}').getBoundingClientRect(); return box.toJSON()")
    assert box["width"] >= 24
    assert box["height"] >= 24
    sheet = screen.run("return document.querySelector('.detail').getBoundingClientRect().top")
    head = screen.run("return document.querySelector('header').getBoundingClientRect().bottom")
    assert head <= box["top"] < box["bottom"] <= sheet
    screen.one(".detail .close").click()
    until(lambda: not screen.all(".detail"), "it is closed")


def test_dark_and_light(screen: Browser, office: tuple[WebProcess, RealEtcd]) -> None:
    """As the system is set, at once; what is bright in one is dark in the other."""
    screen.open(f"{office[0].url}{OFFICE}")
    screen.one(SHOP)

    def light(selector: str, what: str) -> float:
        colour = screen.run(f"return getComputedStyle(document.querySelector(arguments[0])).{what}", selector)
        return sum(map(int, colour[4:-1].split(","))) / 3

    assert light("body", "backgroundColor") > 200 > 100 > light("body", "color")
    screen.scheme("dark")
    assert light("body", "backgroundColor") < 50 < 200 < light("body", "color")
    assert light(SHOP, "backgroundColor") > 100 > light(SHOP, "color")


def test_an_outage_is_in_sight(screen: Browser, tmp_path: Path) -> None:
    """Of etcd, and of the page's own server: what stands there stays, and nobody takes it for new."""
    with EtcdCluster() as cluster:
        client = Etcd(cluster.settings())
        sample.write(client, sample.office(Keys("/out/")))
        client.close()
        with WebProcess(tmp_path, cluster.settings(), "/out/") as page:
            screen.open(f"{page.url}{OFFICE}")
            screen.until_text("live", "#state", PATIENCE)
            screen.one(SHOP)
            cluster.members[0].kill()
            screen.until_text("etcd does not answer since", "#banner", PATIENCE)
            assert screen.text("#state") == "not live"
            assert screen.one(SHOP).text.split() == ["42", "E"]
            cluster.members[0].start()
            cluster.wait_ready()
            until(lambda: screen.text("#state") == "live", "it is live again", 60)
            assert screen.text("#banner") == ""
        screen.until_text("ipam-plugin web does not answer since", "#banner", PATIENCE)
        assert screen.one(SHOP).text.split() == ["42", "E"]
    refused = screen.console()
    assert refused
    assert all("ERR_CONNECTION_" in each or "ERR_EMPTY" in each for each in refused), refused


def test_hostile_values_run_nothing(screen: Browser, etcd: RealEtcd, tmp_path: Path) -> None:
    """HTML, scripts, control characters and ten thousand letters, wherever a text can stand: they are text, on
    every page that shows them, and no page is broken or wider than the screen by them."""
    sample.write(etcd.client, sample.hostile(Keys(etcd.prefix)))
    with WebProcess(tmp_path, etcd.settings, etcd.prefix) as page:
        overview = page.get("api/overview")
        segments = [each["name"] for each in overview["segments"]]
        script = next(each for each in segments if each.startswith("<img"))
        assert script[:60] == sample.SCRIPT[:60]

        def fine(where: str, what: str) -> None:
            screen.run("location.href = arguments[0]", page.url + where)
            screen.one(what)
            assert screen.run("return window.owned") is None
            assert "owned" not in screen.title.partition(" – ")[0] or "<img" in screen.title
            foreign = "main img, main script, main iframe, main style, main [onerror], main [onclick], main svg"
            assert screen.all(foreign) == []
            links = screen.run("return [...document.querySelectorAll('a')].map((each) => each.protocol)")
            assert {*links} == {"http:"}
            assert screen.run("return document.documentElement.scrollWidth") <= 1200, where

        screen.open(page.url)
        fine("#/", ".hosts tr")
        assert sample.SCRIPT[:60] in screen.text()
        screen.run("document.querySelectorAll('.hosts a')[0].click()")
        screen.until_text("Search:")
        fine("#/map/default/192.168.66.0%2F24", ".cell[data-kind=unreadable]")
        for number in range(len(sample.HOSTILE_TEXTS)):
            for offset in (10, 26, 42, 58):
                address = f"192.168.66.{offset + number}"
                fine(f"#/map/default/192.168.66.0%2F24/{address}", f'.detail[aria-label="Address {address}"] dl')
        for text in sample.HOSTILE_TEXTS:
            screen.open(page.url)
            screen.one(".hosts tr")
            screen.run("location.hash = '#/search/' + encodeURIComponent(arguments[0])", text[:150])
            screen.until_text("Search:")
            assert screen.run("return window.owned") is None
        fine("#/map/__proto__/192.168.66.0%2F24", ".cell[data-kind=endpoint]")
        fine("#/map/many/192.168.66.0%2F24", ".cell[data-kind=reserved]")
        for nonsense in ("#/map", "#/map/default/x", "#/address/default/%E0%A4%A", "#/<script>", "#/address/a/b/c/d"):
            screen.open(page.url + nonsense)
            until(lambda: len(screen.text()) > 30 and screen.text() != "Reading the register…", "something is said")
            assert screen.run("return window.owned") is None
    said = screen.console()
    assert all("400 (BAD REQUEST)" in each for each in said), said


def test_what_would_run_is_stopped(screen: Browser, office: tuple[WebProcess, RealEtcd]) -> None:
    """Were text to become HTML by a mistake, the content security policy stops what it would do. The check of the
    checker: the same text put in as HTML makes an element, and still runs nothing."""
    screen.open(office[0].url)
    screen.until_text("192.168.77.0/24")
    screen.run("document.querySelector('main').innerHTML = arguments[0]", sample.SCRIPT)
    assert len(screen.all("main img, main script")) == 2
    complaints = until(lambda: [each for each in screen.console() if "Content Security Policy" in each], "a complaint")
    assert complaints
    assert screen.run("return window.owned") is None
    screen.console()
