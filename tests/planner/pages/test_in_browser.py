"""The pages in a browser: what is read there is what the trace says, and nothing goes wrong on the console."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
from tests.support.browser import CHROMIUM, Visit, chromium, visiting
from tests.support.daemon import WAIT_S, Rank, Start, eventually, small_job, tokens
from tests.support.repository import TRACE

from moeplan.api.client import Client
from moeplan.api.connection import Security
from moeplan.api.jobs import Replan
from moeplan.v1 import planner_pb2

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `make browser` installs it"),
]
VIEWS = ("headline", "timeline", "controls", "experts", "devices", "losses", "histogram", "truth", "plans")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("playwright", reason="Playwright is not installed; `make install`")
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the recorded trace, as a user makes it."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    command = (sys.executable, "-m", "moeplan.planner.commands.main", "view", str(TRACE), "--work-limit", "200")
    done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size < 5 * 10**6
    return path


def number(visit: Visit, selector: str, attribute: str) -> float:
    value = visit.page.get_attribute(selector, attribute)
    assert value is not None
    return float(value)


def settled(visit: Visit, step: int) -> None:
    """Wait until the page shows a step."""
    visit.page.wait_for_selector(f"html[data-step='{step}']", state="attached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_says_what_the_trace_says(
    browser: Browser, report: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    counts = np.load(TRACE)["counts"].astype(np.int64).sum(axis=2)
    with visiting(browser, report.as_uri(), width=width, scheme=scheme) as visit:
        page = visit.page
        for view in VIEWS:
            assert page.locator(f"#{view}").is_visible(), view
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # The slider, by keyboard: the busiest expert of all layers is the trace's.
        page.focus("#step")
        page.keyboard.press("Home")
        settled(visit, 0)
        page.keyboard.press("ArrowRight")
        settled(visit, 1)
        assert number(visit, "#experts-finding [data-tokens]", "data-tokens") == counts[1].max()
        page.locator("#step").fill("77")
        settled(visit, 77)
        assert number(visit, "#experts-finding [data-tokens]", "data-tokens") == counts[77].max()
        assert number(visit, "#experts-finding [data-expert]", "data-expert") == counts[77].max(axis=0).argmax()
        # A device, by a click on its bar: static placement has experts 4 d to 4 d + 3 on device d.
        page.select_option("#layer", label="layer 1")
        chart = page.locator("#devices canvas").first
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        assert box is not None
        page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
        page.wait_for_function("location.hash.includes('layer=1') && location.hash.includes('step=77')")
        device = int(page.input_value("#device"))
        assert 4 <= device <= 11
        table = "#device-tables table[data-strategy='static']"
        own = counts[77, 1, 4 * device : 4 * device + 4]
        page.wait_for_selector(f"{table} [data-load='{own.sum()}']", state="attached")
        tokens = [
            int(text.replace(",", "")) for text in page.locator(f"{table} tbody td:nth-child(2)").all_inner_texts()
        ]
        assert sorted(tokens) == sorted(own.tolist())
        assert visit.errors == []
        assert [url for url in visit.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_address_leads_to_a_moment_and_rows_of_plans_too(browser: Browser, report: Path) -> None:
    with visiting(browser, f"{report.as_uri()}#step=41&layer=1&device=3") as visit:
        page = visit.page
        settled(visit, 41)
        assert page.input_value("#layer") == "1"
        assert page.input_value("#device") == "3"
        row = page.locator("#plans-table tbody tr").nth(2)
        step = int(row.get_attribute("data-step") or "")
        row.focus()
        page.keyboard.press("Enter")
        settled(visit, step + 1)
        assert visit.errors == []


def test_charts_can_be_heard_and_their_colours_follow_the_system(browser: Browser, report: Path) -> None:
    with visiting(browser, report.as_uri()) as visit:
        page = visit.page
        labels = page.eval_on_selector_all(
            ".chart", "hosts => hosts.map((host) => [host.getAttribute('role'), host.ariaLabel])"
        )
        assert all(role == "img" and len(label) > 40 for role, label in labels)
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        assert visit.errors == []


ATTACK = "<img src=x onerror=document.title='owned'><script>alert(1)</script>"
TOKEN = "correct-horse-battery-staple"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_job_is_followed_live(
    browser: Browser, start: Start, tmp_path: Path, width: int, scheme: Literal["light", "dark"]
) -> None:
    """From the token to the newest step; what a rank says is shown as the text that it is."""
    (tmp_path / "tokens").write_text(f"{TOKEN}\n")
    daemon = start("--tokens", str(tmp_path / "tokens")).serving()
    with Client(daemon.address, Security(token=TOKEN), timeout_s=WAIT_S) as client:
        client.create_job("live", small_job(replan=Replan(every_steps=4)))
        rank = Rank(client, "jobs/live", 0)
        other = Rank(client, "jobs/live", 1)
        counts = [tokens(step, ranks=2) for step in range(9)]

        def report(step: int) -> None:
            for number, one in enumerate((rank, other)):
                one.report(step, counts[step][:, number : number + 1])
            eventually(lambda: client.job("jobs/live").status.closed_step == step)

        with visiting(browser, f"http://{daemon.metrics}/", width=width, scheme=scheme, wait=False) as visit:
            page = visit.page
            page.fill("#token", TOKEN)
            page.keyboard.press("Enter")
            page.click("#jobs-table a")
            for step in range(8):
                report(step)
            settled(visit, 7)
            for view in ("now", *VIEWS):
                assert page.locator(f"#{view}").count() == (view != "losses"), view  # no cost of an expert is known
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert number(visit, "#experts-finding [data-tokens]", "data-tokens") == counts[7].sum(axis=1).max()
            report(8)
            settled(visit, 8)  # it follows
            assert number(visit, "#experts-finding [data-tokens]", "data-tokens") == counts[8].sum(axis=1).max()
            version = eventually(lambda: (v := client.job("jobs/live").status.plan_version) > 1 and v)
            failed = planner_pb2.PlanFailed(version=version, in_force_version=1, reason=ATTACK)
            rank.send(failed=failed)
            page.wait_for_selector("#now dd:has-text('onerror')")
            other.close()
            page.wait_for_selector("#now .silent:has-text('1 of 2')")
            assert page.title() == "moeplan"
            assert page.locator("img").count() == 0
            assert [error for error in visit.errors if "401" not in error] == []  # before the token
            assert all(url.startswith((f"http://{daemon.metrics}/", "data:", "blob:")) for url in visit.requests)
            assert page.evaluate("document.cookie") == ""
            daemon.terminate()
            page.wait_for_selector("#state.lost")
        rank.close()
