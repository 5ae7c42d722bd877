"""Make the screenshots of the README and the documents: `make pictures`.

The report is that of the recorded trace of `examples/traces`; the live page is that of a real daemon, to which the same
trace is sent as the ranks of a job would.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tests.support.browser import chromium, visiting
from tests.support.daemon import Rank, eventually, started
from tests.support.repository import ROOT, TRACE

from moeplan.api.jobs import JobSpec, Payback, Replan
from moeplan.solvers import Cluster, ExpertSpec, SolveParameters
from moeplan.v1 import planner_pb2

STEPS = 90
EXPERT = ExpertSpec(weight_bytes=88_080_384, seconds_per_token=2.2e-7)
"""About one of DeepSeek-V3, as `moeplan view` takes it."""


def main() -> None:
    """Write docs/view.png and docs/live.png."""
    with tempfile.TemporaryDirectory() as name, chromium() as browser:
        folder = Path(name)
        report = folder / "report.html"
        command = (sys.executable, "-m", "moeplan.planner.commands.main", "view", str(TRACE), "-o", str(report))
        subprocess.run(command, check=True)
        with visiting(browser, f"{report.as_uri()}#step=102") as visit:
            visit.page.set_viewport_size({"width": 1280, "height": 1900})
            visit.page.screenshot(path=ROOT / "docs/view.png")
        for start in started(lambda: folder):
            daemon = start().serving()
            spec = JobSpec(
                Cluster.uniform(16, 5),
                layers=2,
                experts=64,
                expert=EXPERT,
                parameters=SolveParameters(work_limit=500),
                replan=Replan(every_steps=10, payback=Payback(10)),
            )
            with daemon.client() as client:
                client.create_job("moe-e64", spec)
                silent = 13
                rank = Rank(client, "jobs/moe-e64", 0, hello={"reports_for": list(range(16))})
                ranks = [number for number in range(16) if number != silent]
                for step, counts in enumerate(np.load(TRACE)["counts"][:STEPS].astype(np.int64)):
                    rank.report(step, counts)
                    eventually(lambda step=step: client.job("jobs/moe-e64").status.closed_step == step)
                    time.sleep(0.1)  # the page looks twice a second
                    version = client.job("jobs/moe-e64").status.plan_version
                    rank.send(applied=planner_pb2.PlanApplied(version=version, step=step))
                rank.close()
                rank = Rank(client, "jobs/moe-e64", 0, hello={"reports_for": ranks, "session": "again"})
                with visiting(browser, f"http://{daemon.metrics}/#job=moe-e64") as visit:
                    visit.page.wait_for_selector(f"html[data-step='{STEPS - 1}']", state="attached")
                    visit.page.set_viewport_size({"width": 1280, "height": 1500})
                    visit.page.wait_for_selector("#now dd:has-text('15 of 16')")
                    visit.page.screenshot(path=ROOT / "docs/live.png")
                rank.close()


if __name__ == "__main__":
    main()
