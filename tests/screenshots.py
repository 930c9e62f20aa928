"""`python -m tests.screenshots`: the pictures of README, from the real page on a real etcd in a real browser."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# The tests import each other by their bare names, as pytest lets them.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from ipam_plugin.etcd import Etcd
from ipam_plugin.model import Keys
from tests import sample
from tests.browser import ROOT, WebProcess, browser
from tests.etcd_server import EtcdCluster

SCREENSHOTS = ROOT / "docs" / "screenshots"


def main(target: Path = SCREENSHOTS) -> None:
    keys = Keys()
    now = datetime.datetime.now(datetime.UTC)
    with EtcdCluster() as etcd, tempfile.TemporaryDirectory() as directory, browser() as screen:
        client = Etcd(etcd.settings())
        sample.write(client, {**sample.office(keys, now), **sample.campus(keys, 30_000, now)})
        with WebProcess(Path(directory), etcd.settings(), keys.prefix) as web:

            def take(name: str, where: str, wait_for: str, width: int, height: int, scheme: str = "light") -> None:
                screen.size(width, height, phone=width < 600)
                screen.scheme(scheme, calm=True)
                screen.open(f"{web.url}#/{where}")
                screen.one(wait_for)
                screen.until_text("live", "#state")
                file = target / f"{name}.png"
                screen.screenshot(file)
                if shutil.which("pngquant"):  # a third of the size
                    subprocess.run(["pngquant", "--force", "--ext", ".png", "256", str(file)], check=True, timeout=60)

            office = "map/default/192.168.77.0%2F24"
            take("overview", "", ".hosts tr", 1200, 900)
            take("subnet", office, ".cell[data-kind=free]", 1200, 1010)
            take("subnet-dark", office, ".cell[data-kind=free]", 1200, 1010, "dark")
            take("large", "map/campus/10.20.0.0%2F16", ".block .bar", 1200, 1010)
            take("search", "search/wiki", ".hits a", 1200, 620)
            take("address", f"{office}/{sample.SHOP}", ".past li", 1200, 1010)
            take("phone", f"{office}/{sample.SHOP}", ".past li", 390, 844)
            take("phone-overview", "", ".hosts tr", 390, 844, "dark")
        client.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
