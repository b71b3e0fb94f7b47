"""The report of a study in headless Chromium: no error, nothing sideways on a phone, sorting, axe."""

import datetime
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from study_folders import write_study

from wmtp.report.studies import load_study
from wmtp.report.study_report import study_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("studies") / "small", seeds=2, grid=False)
    return study_report(load_study([str(folder)]), date=datetime.date(2026, 1, 1))[0]


def in_chromium(page, folder, program, *before):
    """Open a page with a program behind it, and return what that resolves to, with the page's errors."""
    scripts = "".join(f"<script>{script}</script>" for script in before)
    catch = "<script>window.errors = []; addEventListener('error', e => errors.push(e.message));</script>"
    end = f"""<script>(async () => {{ {program} }})().then(found => {{
      const out = document.createElement("output"); out.id = "found";
      out.textContent = JSON.stringify({{found, errors}}); document.body.append(out); }})</script>"""
    file = folder / "page.html"
    file.write_text(page.replace("<head>", f"<head>{catch}", 1) + scripts + end)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=60000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    written = re.search(r'<output id="found">(.*?)</output>', done.stdout, flags=re.DOTALL)
    assert written, done.stderr[-2000:]
    answer = json.loads(html.unescape(written[1]))
    assert answer["errors"] == []
    return answer["found"]


def test_nothing_scrolls_sideways_on_a_phone_and_a_press_sorts(page, tmp_path):
    program = """
    const table = document.querySelector("#cells table"), head = table.tHead.rows[0].cells[2];
    const cells = () => [...table.tBodies[0].rows].map(row => row.cells[2].dataset.sort);
    const states = [head.ariaSort], orders = [];
    for (let press = 0; press < 2; press++) {
      head.firstElementChild.click(); states.push(head.ariaSort); orders.push(cells());
    }
    const frame = document.createElement("iframe");
    frame.style.cssText = "width: 360px; height: 800px"; frame.srcdoc = "<!DOCTYPE html>" + document.head.outerHTML
      + document.querySelector("header").outerHTML + document.querySelector("main").outerHTML;
    const loaded = new Promise(done => { frame.onload = done; });
    document.body.append(frame); await loaded;
    const root = frame.contentDocument.documentElement;
    return [states, orders, root.scrollWidth, root.clientWidth];"""
    states, orders, wide, width = in_chromium(page, tmp_path, program)
    assert states == ["none", "ascending", "descending"]
    up, down = ([float(x) for x in order if x] for order in orders)
    assert up == sorted(up) and down == up[::-1] and len(set(up)) > 2
    assert [order[-1] for order in orders] == ["", ""]  # what has no figure stays last
    assert wide <= width


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: npm install axe-core, and AXE_CORE=.../axe.min.js")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, tmp_path, theme):
    if theme == "dark":
        page = page.replace("(prefers-color-scheme: dark)", "all")
    program = """
    document.querySelectorAll("details").forEach(details => { details.open = true; });
    const found = await axe.run();
    return found.violations.map(v => [v.impact, v.id, v.nodes[0].html.slice(0, 200)]);"""
    found = in_chromium(page, tmp_path, program, AXE.read_text())
    assert [violation for violation in found if violation[0] in ("serious", "critical")] == []
