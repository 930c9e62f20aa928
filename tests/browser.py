"""A real browser, and the page as a real process: for tests, screenshots and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys as Key
from selenium.webdriver.remote.webelement import WebElement

from conftest import CHROMIUM, DRIVER
from etcd_server import free_ports, start_process, stop_process, until
from ipam_plugin.etcd import EtcdSettings

ROOT = Path(__file__).parent.parent


class WebProcess:
    """`ipam-plugin web` on a free port of loopback. A context manager."""

    def __init__(self, directory: Path, settings: EtcdSettings, prefix: str, *arguments: str, **etcd: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.log = directory / "web.log"
        self.port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{self.port}/"
        config = directory / "web.yaml"
        config.write_text(json.dumps({"etcd": {"endpoints": list(settings.endpoints), **etcd}, "prefix": prefix}))
        self._command = [sys.executable, "-m", "ipam_plugin", "web", "--listen", f"127.0.0.1:{self.port}"]
        self._command += ["--config", str(config), *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> WebProcess:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        self._process = start_process(self._command, self.log, env={**kept, "PYTHONPATH": str(ROOT)})
        try:
            until(self._answers, "the page answers", 60)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._process is not None:
            stop_process(self._process)
            self._process = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            return bool(self.get("api/state")["loaded"])
        return False

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)


class Browser:
    """Headless Chromium."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self._driver = driver

    def open(self, url: str) -> None:
        """A page as somebody sees it who was never there: no address is just another `#` of the last one."""
        self._driver.get("about:blank")
        self._driver.get(url)

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name: str, *, calm: bool = False) -> None:
        """`dark` or `light`, as the system says; `calm`: reduced motion."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        if calm:
            features.append({"name": "prefers-reduced-motion", "value": "reduce"})
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def all(self, selector: str) -> list[WebElement]:
        found: list[WebElement] = self._driver.find_elements(By.CSS_SELECTOR, selector)
        return found

    def one(self, selector: str, seconds: float = 15.0) -> WebElement:
        """The first such element, once there is one."""
        found: WebElement = until(lambda: next(iter(self.all(selector)), None), f"{selector} in the page", seconds)
        return found

    def text(self, selector: str = "main") -> str:
        """What stands there, read at one moment."""
        seen = (
            "const found = document.querySelector(arguments[0]); return found?.checkVisibility() ? found.innerText : ''"
        )
        return str(self.run(seen, selector))

    def until_text(self, words: str, selector: str = "main", seconds: float = 15.0) -> str:
        until(lambda: words in self.text(selector), f"{words!r} in {selector}", seconds)
        return self.text(selector)

    def press(self, *keys: str) -> None:
        for key in keys:
            self._driver.switch_to.active_element.send_keys(key)

    def focused(self) -> str:
        """The label of what has the keyboard."""
        return str(
            self.run("const e = document.activeElement; return e.getAttribute('aria-label') || e.id || e.tagName")
        )

    def run(self, script: str, *arguments: Any) -> Any:
        return self._driver.execute_script(script, *arguments)

    def wait(self, script: str, *arguments: Any) -> Any:
        """What the script gives to its last argument, a function, sooner or later (at most 30 s)."""
        return self._driver.execute_async_script(script, *arguments)

    @property
    def title(self) -> str:
        return str(self._driver.title)

    @property
    def address(self) -> str:
        return str(self._driver.current_url)

    def console(self) -> list[str]:
        """What the pages complained of since the last call, a broken content security policy included."""
        return [each["message"] for each in self._driver.get_log("browser") if each["level"] == "SEVERE"]

    def screenshot(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        assert self._driver.save_screenshot(str(file))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """One that keeps nothing."""
    assert CHROMIUM is not None
    assert DRIVER is not None
    with tempfile.TemporaryDirectory(prefix="ipam-browser-") as profile:
        options = Options()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--no-sandbox",  # which needs another user than root
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            "--no-proxy-server",
            "--force-color-profile=srgb",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            driver.set_page_load_timeout(60)
            driver.set_script_timeout(30)
            yield Browser(driver)
        finally:
            driver.quit()


__all__ = ["Browser", "Key", "WebProcess", "browser"]
