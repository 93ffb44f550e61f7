"""One headless Chromium, and a server for the folder that `make docs` builds.

`MOESPEC_SITE` names another folder than site/. Without Chromium, ChromeDriver, selenium or that
folder the tests are skipped.
"""

import contextlib
import functools
import json
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("MOESPEC_SITE", ROOT / "site"))
SHOTS = ROOT / "build" / "screenshots"

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    # As on a phone, where they take no room.
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    # No name but this machine's is ever looked up, so a page that asks for another fails at once.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)

SETTLE = """
const done = arguments[arguments.length - 1];
requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0)));
"""


def missing():
    """What the tests need and do not find."""
    with contextlib.suppress(ImportError):
        import selenium  # noqa: F401

        wanted = ["chromium", "chromedriver"]
        absent = [name for name in wanted if shutil.which(name) is None]
        if not (SITE / "index.html").is_file():
            absent.append(f"{SITE}/index.html (make docs)")
        return absent
    return ["selenium"]


def pytest_generate_tests(metafunc):
    """A test that takes `path` runs once for each page."""
    if "path" in metafunc.fixturenames:
        found = sorted(each.relative_to(SITE).as_posix() for each in SITE.rglob("*.html"))
        metafunc.parametrize("path", found or ["index.html"])


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, some of them replaced; writes down what is asked for and not there."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Answer with the replacement, if there is one."""
        path = urlsplit(self.path).path.lstrip("/")
        text = self.server.replaced.get(path)
        if text is None:
            super().do_GET()
            return
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""

    def log_request(self, code="-", size="-"):
        """Keep what was not found."""
        if int(code) >= 400:
            self.server.not_found.append(self.path)


class Server(ThreadingHTTPServer):
    """At `url`, a folder; `replaced` maps paths to texts that stand for files of it."""

    daemon_threads = True

    def __init__(self, folder, replaced):
        self.replaced, self.not_found = replaced, []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request, client_address):
        """A browser that leaves a page closes its connections, and nothing is wrong then."""


@contextlib.contextmanager
def serving(folder, replaced=None):
    """A server that runs inside the `with` block."""
    with Server(folder, replaced or {}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Browser:
    """A browser that shows a page and knows what went wrong meanwhile."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, server, path, width=1280, height=1600):
        """Show a page of a server; gives the messages of the console and the requests of it."""
        self.driver.get("about:blank")
        # A palette that another test chose is kept there.
        kept = {"origin": server.url, "storageTypes": "local_storage"}
        self.driver.execute_cdp_cmd("Storage.clearDataForOrigin", kept)
        self._collect()
        server.not_found.clear()
        self.resize(width, height)
        self.driver.get(server.url + path)
        self.settle()
        return self._collect()

    def resize(self, width, height=1600):
        """Change the size of the window, as CSS sees it."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def settle(self):
        """Wait until all that is pending is drawn."""
        self.driver.execute_async_script(SETTLE)

    def run(self, script, *arguments):
        """Run a script in the page and give what it returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, script, *arguments, seconds=10):
        """Wait until a script returns something true, and give it; None if it does not."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(
                lambda _: self.run(script, *arguments)
            )
        except TimeoutException:
            return None

    def click(self, selector):
        """Click as a person does: at a point, and only if nothing lies over it."""
        self.driver.find_element("css selector", selector).click()

    def type(self, selector, text):
        """Click a field and type into it."""
        self.click(selector)
        self.driver.switch_to.active_element.send_keys(text)

    def choose(self, selector, text):
        """Choose from a list by keyboard: ChromeDriver's click sends no `input` event."""
        self.driver.find_element("css selector", selector).send_keys(text)
        self.settle()

    def shoot(self, name):
        """Keep a picture of the window, to be looked at."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.driver.save_screenshot(str(SHOTS / f"{name}.png"))

    def _collect(self):
        console = [each["message"] for each in self.driver.get_log("browser")
                   if each["level"] == "SEVERE"]  # fmt: skip
        events = [json.loads(each["message"])["message"]
                  for each in self.driver.get_log("performance")]  # fmt: skip
        requests = [each["params"]["request"]["url"] for each in events
                    if each["method"] == "Network.requestWillBeSent"]  # fmt: skip
        return console, requests


@pytest.fixture(scope="session")
def site():
    """The folder of the built site."""
    absent = missing()
    if absent:
        pytest.skip(f"browser tests need {', '.join(absent)}")
    return SITE


@pytest.fixture(scope="session")
def server(site):
    """The site as it is."""
    with serving(site) as server:
        yield server


@pytest.fixture
def replacing(site):
    """From texts that stand for files of the site to a server of that site."""
    with contextlib.ExitStack() as stack:
        yield lambda replaced: stack.enter_context(serving(site, replaced))


@pytest.fixture(scope="session")
def browser(site, tmp_path_factory):
    """One browser for all tests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("perfLoggingPrefs", {"enablePage": False})
    # Selenium would else ask the network for a driver that fits.
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(20)
    light = [{"name": "prefers-color-scheme", "value": "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": light})
    yield Browser(driver)
    driver.quit()
