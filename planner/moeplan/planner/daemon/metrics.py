"""Prometheus metrics. Every series exists from the start, and no label holds a job's name: their number is bounded."""

from __future__ import annotations

from importlib import metadata

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from moeplan.api.job_plans import JobPlan, Reason

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_IMBALANCE = (1.0, 1.001, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10)
_GAP = (0.0, 0.0001, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_FATES = ("accepted", "duplicate", "late", "missing", "early")


class Metrics:
    """The daemon's metrics, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.started = Counter("grpc_server_started", "Calls that began", ["method"], registry=registry)
        self.handled = Counter("grpc_server_handled", "Calls that ended", ["method", "code"], registry=registry)
        self.handling = Histogram(
            "grpc_server_handling_seconds", "Duration of unary calls", ["method"], buckets=_SECONDS, registry=registry
        )
        self.solve = Histogram(
            "moeplan_solve_seconds", "Time in a worker", ["kind"], buckets=_SECONDS, registry=registry
        )
        self.queue_wait = Histogram(
            "moeplan_queue_seconds", "Wait for a worker", ["kind"], buckets=_SECONDS, registry=registry
        )
        self.solves = Counter("moeplan_solves", "Solves by how they ended", ["kind", "outcome"], registry=registry)
        self.queue = Gauge("moeplan_queue_depth", "Solves that wait for a worker", registry=registry)
        self.workers = Gauge("moeplan_workers_ready", "Workers that are idle or solving", registry=registry)
        self.busy = Gauge("moeplan_workers_busy", "Workers that are solving", registry=registry)
        self.worker_restarts = Counter("moeplan_worker_restarts", "Workers replaced", registry=registry)
        self.streams = Gauge("moeplan_streams", "Open streams", ["kind"], registry=registry)
        self.jobs = Gauge("moeplan_jobs_owned", "Jobs that this daemon plans for", registry=registry)
        self.window_bytes = Gauge(
            "moeplan_window_bytes", "Memory set aside for statistics and plans", registry=registry
        )
        self.statistics = Counter("moeplan_statistics_messages", "Statistics messages", registry=registry)
        self.statistics_bytes = Counter("moeplan_statistics_bytes", "Bytes of token counts received", registry=registry)
        self.cells = Counter(
            "moeplan_statistics_cells", "Layer x step x rank, by what became of it", ["fate"], registry=registry
        )
        self.plan_bytes = Counter("moeplan_plan_bytes", "Bytes of plans sent to ranks and watchers", registry=registry)
        self.decisions = Counter("moeplan_decisions", "Decisions by reason", ["reason"], registry=registry)
        self.imbalance_before = Histogram(
            "moeplan_imbalance_before",
            "Max / mean load in force, per changed layer",
            buckets=_IMBALANCE,
            registry=registry,
        )
        self.imbalance_predicted = Histogram(
            "moeplan_imbalance_predicted",
            "Max / mean load planned, per changed layer",
            buckets=_IMBALANCE,
            registry=registry,
        )
        self.imbalance_after = Histogram(
            "moeplan_imbalance_after",
            "Max / mean load of the layout in force on the statistics that came after it, per layer",
            buckets=_IMBALANCE,
            registry=registry,
        )
        self.gap = Histogram("moeplan_gap", "Proven gap, per changed layer", buckets=_GAP, registry=registry)
        self.moved = Counter("moeplan_moved_replicas", "Replicas that plans move", registry=registry)
        self.store = Histogram("moeplan_store_seconds", "Time of a write", buckets=_SECONDS, registry=registry)
        self.lease = Gauge(
            "moeplan_lease_seconds", "How long a lease lasts; infinite where no other daemon can be", registry=registry
        )
        self.ready = Gauge("moeplan_ready", "1 where the service is ready, else 0", ["service"], registry=registry)
        self.stalled = Gauge(
            "moeplan_jobs_stalled", "Jobs with ranks connected that have closed no step for a minute", registry=registry
        )
        self.plan_delay = Histogram(
            "moeplan_plan_delay_seconds",
            "From the statistics that close a step to the plan for ranks, stored",
            buckets=_SECONDS,
            registry=registry,
        )
        Gauge("moeplan_build_info", "1, with the version", ["version"], registry=registry).labels(
            metadata.version("moeplan")
        ).set(1)
        self.store_errors = Counter("moeplan_store_errors", "Times that the store failed", registry=registry)
        self.unreadable = Gauge(
            "moeplan_jobs_unreadable",
            "Jobs in the store that cannot be planned for; the log names them",
            registry=registry,
        )
        self.lease_age = Gauge(
            "moeplan_lease_age_seconds", "Time since the leases were last renewed", registry=registry
        )
        self.certificate_end = Gauge(
            "moeplan_certificate_end_seconds",
            "When the certificate ends, seconds since 1970; 0 without TLS",
            registry=registry,
        )
        self.loop_lag = Gauge("moeplan_event_loop_lag_seconds", "Delay of the newest timer", registry=registry)
        for fate in _FATES:
            self.cells.labels(fate)
        for reason in set(Reason) - {Reason.UNKNOWN}:
            self.decisions.labels(reason.value)
        for kind in ("job", "solve", "anytime", "evaluate"):
            self.queue_wait.labels(kind)
        for kind in ("rank", "watch"):
            self.streams.labels(kind)

    def prepare(self, methods: list[str]) -> None:
        """Make the series of every method exist."""
        for method in methods:
            self.started.labels(method)
            for code in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED):  # whose first ones count, too
                self.handled.labels(method, code.name)

    def planned(self, plan: JobPlan) -> None:
        """A plan became the newest."""
        for layer in plan.layers_after(plan.version - 1):
            self.moved.inc(layer.moved_replicas)
            if layer.imbalance is not None and layer.imbalance_before is not None and layer.gap is not None:
                self.imbalance_before.observe(layer.imbalance_before)
                self.imbalance_predicted.observe(layer.imbalance)
                self.gap.observe(layer.gap)
