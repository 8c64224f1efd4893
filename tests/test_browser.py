"""Widgets work where readers meet them: JupyterLab in a headless Chromium, driven by keyboard."""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

from hstu_lab import environment

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
NEWS = ("@jupyterlab/apputils-extension", "notification.jupyterlab-settings")
START_SECONDS = 90
RUN_MS = 180_000

pytestmark = [pytest.mark.browser, pytest.mark.timeout(420)]

OPEN_AND_RUN = """([path, limit]) => {
  const run = async app => {
    await app.restored;
    const panel = await app.commands.execute('docmanager:open', {path});
    await panel.context.ready;
    await panel.sessionContext.ready;
    await app.commands.execute('notebook:run-all-cells');
    const code = panel.content.widgets.map(cell => cell.model).filter(model => model.type === 'code');
    const problem = outputs => outputs.filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`)[0] ?? null;
    return code.map(model => ({count: model.executionCount, error: problem(model.outputs.toJSON())}));
  };
  const late = (_, reject) => setTimeout(() => reject(new Error(`${path} is not through after ${limit} ms`)), limit);
  return Promise.race([run(window.jupyterapp), new Promise(late)]);
}"""

PIXELS = """image => {
  const canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext('2d').drawImage(image, 0, 0);
  return canvas.toDataURL();
}"""


class Lab:
    """A JupyterLab of its own on `root`, and a browser: `run(name)` opens a notebook there and runs all its cells."""

    def __init__(self, root: pathlib.Path, url: str, browser):
        self.root, self.url, self.browser = root, url, browser

    @contextlib.contextmanager
    def run(self, notebook: pathlib.Path):
        """(page, [{"count": execution count, "error": text or None} of each code cell]); a failure leaves a screenshot."""
        shutil.copy(notebook, self.root / notebook.name)
        page = self.browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(RUN_MS)
        try:
            page.goto(self.url)
            page.wait_for_function("window.jupyterapp !== undefined")
            yield page, page.evaluate(OPEN_AND_RUN, [notebook.name, RUN_MS])
        except BaseException:
            picture = self.root / f"{notebook.stem}.png"
            with contextlib.suppress(PlaywrightError):  # the failure itself matters more
                page.screenshot(path=picture)
                print(f"screenshot: {picture}")
            raise
        finally:
            with contextlib.suppress(PlaywrightError):
                page.evaluate("window.jupyterapp?.serviceManager.sessions.shutdownAll()")
            page.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    chromium = environment.chromium()
    if chromium is None:
        pytest.fail(f"no Chromium to drive: sudo apt-get install chromium, or {sys.executable} -m playwright install chromium")
    home = tmp_path_factory.mktemp("lab")
    root, settings, token = home / "root", home / "settings", secrets.token_hex()
    root.mkdir()
    (settings / NEWS[0]).mkdir(parents=True)
    (settings / NEWS[0] / NEWS[1]).write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    folders = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    options = {
        "ServerApp.ip": "127.0.0.1", "ServerApp.port": 0, "ServerApp.open_browser": False, "ServerApp.root_dir": str(root),
        "ServerApp.allow_root": True, "IdentityProvider.token": token, "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly", "LabApp.collaborative": False,
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]
    log = home / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | folders, cwd=root)
    try:
        url = wait_for_server(home / "runtime", server, log)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            yield Lab(root, f"{url}lab?token={token}", browser)
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


def wait_for_server(runtime: pathlib.Path, server: subprocess.Popen, log: pathlib.Path) -> str:
    """The server's address, once it has written it."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            with contextlib.suppress(ValueError):  # half written
                return json.loads(path.read_text())["url"]
        time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def test_the_history_slider_redraws_the_latency(lab):
    with lab.run(NOTEBOOKS / "00_start_here.ipynb") as (page, cells):
        assert [cell["error"] for cell in cells] == [None] * len(cells)
        assert [cell["count"] for cell in cells] == list(range(1, len(cells) + 1))

        label, image = page.locator(".latency-label"), page.locator(".latency-image")
        handle = page.locator(".latency-length .noUi-handle")
        before, picture = label.inner_text(), image.evaluate(PIXELS)
        events = int(re.match(r"(\d+) events? of \S+: [\d.]+ ms", before)[1])
        handle.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("([e, text]) => e.innerText !== text", arg=[label.element_handle(), before], timeout=30_000)

        more = int(re.match(r"(\d+) events? of \S+: [\d.]+ ms", label.inner_text())[1])
        assert more > events
        assert page.locator(".latency-length .widget-readout").inner_text() == str(more)
        page.wait_for_function(f"([e, old]) => ({PIXELS})(e) !== old", arg=[image.element_handle(), picture], timeout=30_000)
        assert image.evaluate("e => e.naturalWidth") > 300


def test_a_cell_that_raises_is_noticed(lab, tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("1 + 1", "1 / 0", "2 + 2")]
    notebook = tmp_path / "broken.ipynb"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # without it JupyterLab asks which one
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), notebook)
    with lab.run(notebook) as (_, ran):
        assert [cell["error"] for cell in ran] == [None, "ZeroDivisionError: division by zero", None]
        assert [cell["count"] for cell in ran] == [1, 2, None]
