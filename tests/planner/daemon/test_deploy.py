"""Examples and deployment files, as far as they can be checked without a cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.support.daemon import WAIT_S, DaemonProcess, Start
from tests.support.prometheus import alerts
from tests.support.repository import ROOT

from moeplan.api.client import Client
from moeplan.api.connection import Security
from moeplan.api.errors import NotFoundError, UnauthenticatedError
from moeplan.planner.daemon.server import LAST_RESORT_S, PLANNER, SOLVER
from moeplan.planner.daemon.settings import Settings


@pytest.fixture(scope="session")
def node_modules() -> None:
    """The packages of the example, installed beside it."""
    folder = ROOT / "examples" / "node"
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node")
    if not (folder / "node_modules" / "@grpc" / "grpc-js").exists():
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock"]
        if subprocess.run(command, cwd=folder, capture_output=True, timeout=WAIT_S, check=False).returncode:
            pytest.skip("npm cannot install @grpc/grpc-js here")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_rank_in_javascript(daemon: DaemonProcess, node_modules: None, tmp_path: Path, compressed: bool) -> None:
    counts = np.random.default_rng(0).integers(0, 100, (6, 2, 4, 8)) ** 2
    (np.savez_compressed if compressed else np.savez)(tmp_path / "trace.npz", counts=counts)
    command = ["node", str(ROOT / "examples" / "node" / "rank.js"), daemon.address, str(tmp_path / "trace.npz"), "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"device \d+: ([-\d ]+)", done.stdout)
    assert len(rows) == 2 * 4
    for layer in range(2):
        experts = {int(e) for row in rows[layer * 4 : layer * 4 + 4] for e in row.split()} - {-1}
        assert experts == set(range(8))
    with daemon.client() as client, pytest.raises(NotFoundError):
        client.job("jobs/node-example")


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("no systemd-analyze")
    unit = (ROOT / "deploy" / "systemd" / "moeplan.service").read_text()
    copy = tmp_path / "moeplan.service"
    copy.write_text(unit.replace("/opt/moeplan/bin/moeplan", "/bin/true"))  # which must exist for the check
    done = subprocess.run([tool, "verify", str(copy)], capture_output=True, text=True, timeout=WAIT_S, check=False)
    complaints = [line for line in done.stderr.splitlines() if "moeplan.service" in line]
    assert not complaints


def documents() -> dict[str, Any]:
    """The manifest's objects by kind; there is one of each."""
    found = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "moeplan.yaml").read_text()))
    kinds = {document["kind"]: document for document in found}
    assert len(kinds) == len(found)
    return kinds


def pod() -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's template, and its only container."""
    template = documents()["Deployment"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    return template, container


def settings_of_the_pod() -> dict[str, str]:
    """Settings by the name that MOEPLAN_* variables give them."""
    _, container = pod()
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert len(variables) == len(container["env"])
    assert all(isinstance(value, str) for value in variables.values())  # Kubernetes refuses numbers and booleans
    return {name: value for name, value in variables.items() if name.startswith("MOEPLAN_")}


def test_the_manifest_has_the_fields_that_kubernetes_requires() -> None:
    versions = {"Deployment": "apps/v1", "PersistentVolumeClaim": "v1", "Service": "v1"}
    versions["NetworkPolicy"] = "networking.k8s.io/v1"
    assert {kind: document["apiVersion"] for kind, document in documents().items()} == versions
    for document in documents().values():
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", document["metadata"]["name"])
    deployment, claim = documents()["Deployment"]["spec"], documents()["PersistentVolumeClaim"]["spec"]
    assert {"selector", "template"} <= set(deployment) <= {"replicas", "strategy", "selector", "template"}
    # Two pods would wait for one volume, or for its lock, for ever.
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    assert claim["accessModes"] == ["ReadWriteOnce"]
    for quantity in (claim["resources"]["requests"]["storage"], *pod()[1]["resources"]["requests"].values()):
        assert re.fullmatch(r"\d+(\.\d+)?(m|[KMGT]i?)?", quantity)


def test_the_manifest_selects_its_own_pods() -> None:
    template, _ = pod()
    labels = set(template["metadata"]["labels"].items())
    kinds = documents()
    selectors = (
        kinds["Deployment"]["spec"]["selector"]["matchLabels"],
        kinds["Service"]["spec"]["selector"],
        kinds["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    )
    for selector in selectors:
        assert selector
        assert set(selector.items()) <= labels
    assert all(isinstance(value, str) for value in template["metadata"]["annotations"].values())


def test_the_manifests_ports_are_those_of_the_daemon() -> None:
    template, container = pod()
    settings = settings_of_the_pod()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "grpc": int(settings["MOEPLAN_LISTEN"].rpartition(":")[2]),
        "metrics": int(settings["MOEPLAN_METRICS"].rpartition(":")[2]),
    }
    for port in documents()["Service"]["spec"]["ports"]:
        assert port["targetPort"] == port["name"]
        assert port["port"] == ports[port["name"]]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
    rules = documents()["NetworkPolicy"]["spec"]["ingress"]
    admitted = {port["port"]: "from" in rule for rule in rules for port in rule["ports"]}
    assert admitted == {ports["grpc"]: True, ports["metrics"]: False}
    # Names that the health service of a real daemon knows; a probe for another one would never succeed.
    known = {"", PLANNER.full_name, SOLVER.full_name}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container[name]["grpc"]
        assert probe["port"] == ports["grpc"]
        assert probe.get("service", "") in known


def test_the_manifests_volumes_hold_what_the_settings_name() -> None:
    template, container = pod()
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert sorted(mount["name"] for mount in mounts.values()) == sorted(volumes)
    settings = settings_of_the_pod()
    data = volumes[mounts[settings["MOEPLAN_DATA"]]["name"]]
    assert data["persistentVolumeClaim"]["claimName"] == documents()["PersistentVolumeClaim"]["metadata"]["name"]
    folder, _, file = settings["MOEPLAN_SECURITY__TOKENS"].rpartition("/")
    secret = mounts[folder]
    assert secret["readOnly"]
    assert volumes[secret["name"]]["secret"]["secretName"] == "moeplan"  # as its first comment makes it, --from-file
    assert file == "tokens"
    # The root is read-only, so everything that is written is on the volume.
    assert container["securityContext"]["readOnlyRootFilesystem"]
    kernels = next(entry["value"] for entry in container["env"] if entry["name"] == "NUMBA_CACHE_DIR")
    assert kernels.startswith(settings["MOEPLAN_DATA"] + "/")


def test_the_daemon_starts_with_the_manifests_settings(start: Start, tmp_path: Path) -> None:
    """A real daemon takes every setting; only paths and ports are this machine's."""
    _, container = pod()
    assert container["args"] == ["serve"]
    settings = settings_of_the_pod()
    (tmp_path / "tokens").write_text("a-token-of-the-test-0123456789\n")
    settings |= {
        "MOEPLAN_SECURITY__TOKENS": str(tmp_path / "tokens"),
        "MOEPLAN_DATA": str(tmp_path / "state"),
        "MOEPLAN_LISTEN": "0.0.0.0:0",
    }
    # The options that `start` gives win, so the address is asked for by an option that says the same.
    daemon = start("--listen", settings["MOEPLAN_LISTEN"], environment=settings).serving(solver=False)
    port = daemon.address.rpartition(":")[2]
    with Client(f"127.0.0.1:{port}") as stranger, pytest.raises(UnauthenticatedError):
        stranger.policies()
    with Client(f"127.0.0.1:{port}", Security(token="a-token-of-the-test-0123456789")) as known:
        assert known.policies()
    grace_s = pod()[0]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= Settings.model_fields["drain_s"].default + LAST_RESORT_S
    assert daemon.terminate() == 0


def expressions() -> Iterator[tuple[str, str]]:
    """What alerts and panels ask Prometheus for, with who asks."""
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    board = json.loads((ROOT / "deploy" / "grafana" / "moeplan.json").read_text())
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def test_alerts_and_panels_ask_for_what_a_daemon_shows(daemon: DaemonProcess) -> None:
    """Every metric of every expression is there from the start, with the values of labels that it is asked for."""
    with urllib.request.urlopen(f"http://{daemon.metrics}/metrics", timeout=WAIT_S) as reply:
        series = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
    names = {re.split(r"[{ ]", line)[0] for line in series}
    asked = 0
    for who, expression in expressions():
        assert expression.count("(") == expression.count(")"), who
        for name, labels in re.findall(r"\b((?:moeplan|grpc|process)_\w+)(?:\{([^}]*)\})?", expression):
            asked += 1
            assert name in names, f"{who} asks for {name}"
            for label, how, value in re.findall(r'(\w+)(=~?)"([^"]*)"', labels):
                if label in ("instance", "code"):
                    continue  # Prometheus's own; and statuses come as they happen
                for one in value.split("|") if how == "=~" else [value]:
                    wanted = f'{label}="{one}"'
                    assert any(line.startswith(name) and wanted in line for line in series), f"{who}: {name} {wanted}"
    assert asked > 30


def test_every_alert_is_in_the_runbook() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    entries = {line.removeprefix("### ").lower(): line for line in text.splitlines() if line.startswith("### ")}
    for rule in alerts():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / page).is_file()
        assert anchor in entries
        assert anchor == rule["alert"].lower()
    assert len(entries) == len(alerts())


def test_kustomizations_name_files_that_are_there() -> None:
    for folder in ("kubernetes", "prometheus"):
        place = ROOT / "deploy" / folder
        found = yaml.safe_load((place / "kustomization.yaml").read_text())
        for resource in found["resources"]:
            assert (place / resource).exists()
    monitor = yaml.safe_load((ROOT / "deploy" / "prometheus" / "servicemonitor.yaml").read_text())["spec"]
    service = documents()["Service"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    ports = [port["name"] for port in service["spec"]["ports"]]
    assert all(endpoint["port"] in ports for endpoint in monitor["endpoints"])


def test_the_unit_is_strict() -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("no systemd-analyze")
    command = [tool, "security", "--offline=true", str(ROOT / "deploy" / "systemd" / "moeplan.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    level = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    if level is None:
        pytest.skip("systemd-analyze cannot look at files")
    assert float(level[1]) <= 2.0
