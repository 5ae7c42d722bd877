"""Problems and the limits of solves, to and from messages."""

from __future__ import annotations

from functools import lru_cache
from math import inf

import numpy as np

from moeplan.api.wire.tensors import field, read_array, read_counts, read_layout, write_array, write_counts
from moeplan.api.wire.times import read_duration, write_duration
from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.cluster import Cluster, Link
from moeplan.solvers.problem.constraints import Constraints
from moeplan.solvers.problem.demand import DRIFT, Demand
from moeplan.solvers.problem.problem import ExpertSpec, Problem
from moeplan.solvers.problem.split_rules import split_rule
from moeplan.v1 import problem_pb2

__all__ = [
    "read_cluster",
    "read_expert",
    "read_parameters",
    "read_problem",
    "write_cluster",
    "write_expert",
    "write_parameters",
    "write_problem",
]

_DEFAULTS = SolveParameters()
_UNCONSTRAINED = Constraints()


def read_cluster(message: problem_pb2.Cluster) -> Cluster:
    """A cluster, with the defaults of the fields that are absent.

    Raises:
        ProblemError: a field is out of range.
    """
    return _cluster(message.SerializeToString())


@lru_cache(maxsize=8)
def _cluster(serialized: bytes) -> Cluster:
    # The layers of a request are on one cluster, and checking it takes as long as solving a layer.
    message = problem_pb2.Cluster.FromString(serialized)
    devices = len(message.slots)
    links = {}
    for name in ("intra_node", "inter_node"):
        if message.HasField(name):
            link = getattr(message, name)
            with field(f"cluster.{name}"):
                links[name] = Link(link.bytes_per_s, link.latency_s)
    return Cluster(
        slots=np.array(message.slots, np.int32),
        node=np.array(message.node, np.int32) if message.node else np.zeros(devices, np.int32),
        speed=np.array(message.speed, np.float64) if message.speed else np.ones(devices),
        memory_bytes=np.array(message.memory_bytes, np.int64) if message.memory_bytes else None,
        **links,
    )


def write_cluster(cluster: Cluster) -> problem_pb2.Cluster:
    """The message of a cluster."""
    return problem_pb2.Cluster(
        slots=cluster.slots.tolist(),
        node=cluster.node.tolist(),
        speed=cluster.speed.tolist(),
        memory_bytes=[] if cluster.memory_bytes is None else cluster.memory_bytes.tolist(),
        intra_node=problem_pb2.Link(bytes_per_s=cluster.intra_node.bytes_per_s, latency_s=cluster.intra_node.latency_s),
        inter_node=problem_pb2.Link(bytes_per_s=cluster.inter_node.bytes_per_s, latency_s=cluster.inter_node.latency_s),
    )


def read_expert(message: problem_pb2.ExpertSpec) -> ExpertSpec:
    """The costs of an expert.

    Raises:
        ProblemError: a field is out of range.
    """
    return _expert(message.SerializeToString())


@lru_cache(maxsize=8)
def _expert(serialized: bytes) -> ExpertSpec:
    message = problem_pb2.ExpertSpec.FromString(serialized)
    return ExpertSpec(
        weight_bytes=message.weight_bytes,
        state_bytes=message.state_bytes,
        token_bytes=message.token_bytes,
        activation_bytes=message.activation_bytes,
        seconds_per_token=message.seconds_per_token if message.HasField("seconds_per_token") else 1.0,
    )


def write_expert(expert: ExpertSpec) -> problem_pb2.ExpertSpec:
    """The message of an expert's costs."""
    return problem_pb2.ExpertSpec(
        weight_bytes=expert.weight_bytes,
        state_bytes=expert.state_bytes,
        token_bytes=expert.token_bytes,
        activation_bytes=expert.activation_bytes,
        seconds_per_token=expert.seconds_per_token,
    )


def read_problem(message: problem_pb2.Problem) -> Problem:
    """One layer's problem.

    Raises:
        ProblemError: a field is invalid; InfeasibleError where no layout can exist.
    """
    tokens = read_array("demand.tokens", message.demand.tokens)
    if tokens.dtype.kind == "f":  # whole numbers all the same
        tokens = read_counts("demand.tokens", message.demand.tokens)
    spread = message.demand.spread if message.demand.HasField("spread") else DRIFT
    demand = Demand.of(tokens, list(message.demand.weights) or None, spread=spread)
    problem = Problem(
        cluster=read_cluster(message.cluster),
        demand=demand,
        expert=read_expert(message.expert),
        current=read_layout("current", message.current, demand.experts, partial=True)
        if message.HasField("current")
        else None,
        max_moves=message.max_moves if message.HasField("max_moves") else None,
        groups=message.groups or 1,
        tail=message.tail if message.HasField("tail") else 1.0,
        constraints=_read_constraints(message.constraints) if message.HasField("constraints") else _UNCONSTRAINED,
        split_rule=split_rule("split_rule", message.split_rule) if message.split_rule else None,
    )
    return problem.without(message.failed) if message.failed else problem


def _read_constraints(message: problem_pb2.Constraints) -> Constraints:
    with field("constraints"):
        pairs = {
            name: read_array(name, getattr(message, name)) for name in ("forbidden", "pinned") if message.HasField(name)
        }
    return Constraints(
        **pairs,
        domain=np.array(message.domain, np.int32) if message.domain else None,
        groups_on_node=message.groups_on_node,
        min_tokens=message.min_tokens,
        device_move_bytes=message.device_move_bytes if message.HasField("device_move_bytes") else None,
        node_move_bytes=message.node_move_bytes if message.HasField("node_move_bytes") else None,
    )


def _write_constraints(constraints: Constraints) -> problem_pb2.Constraints:
    return problem_pb2.Constraints(
        forbidden=write_array(constraints.forbidden) if len(constraints.forbidden) else None,
        pinned=write_array(constraints.pinned) if len(constraints.pinned) else None,
        domain=None if constraints.domain is None else constraints.domain.tolist(),
        groups_on_node=constraints.groups_on_node,
        min_tokens=constraints.min_tokens,
        device_move_bytes=constraints.device_move_bytes,
        node_move_bytes=constraints.node_move_bytes,
    )


def write_problem(problem: Problem) -> problem_pb2.Problem:
    """The message of a problem."""
    return problem_pb2.Problem(
        cluster=write_cluster(problem.cluster),
        demand=problem_pb2.Demand(
            tokens=write_counts(problem.demand.tokens),
            weights=problem.demand.weights.tolist(),
            spread=problem.demand.spread,
        ),
        expert=write_expert(problem.expert),
        current=None if problem.current is None else write_array(problem.current.slots),
        max_moves=problem.max_moves,
        groups=problem.groups,
        tail=problem.tail,
        constraints=_write_constraints(problem.constraints) if problem.constraints.names else None,
        split_rule=problem.split_rule or "",
    )


def read_parameters(message: problem_pb2.SolveParameters) -> SolveParameters:
    """Limits of a solve.

    Raises:
        ProblemError: a field is out of range.
    """
    deadline_s = read_duration("parameters.deadline", message.deadline) if message.HasField("deadline") else None
    return SolveParameters(
        deadline_s=deadline_s,
        work_limit=message.work_limit if message.HasField("work_limit") else None,
        target_gap=message.target_gap if message.HasField("target_gap") else _DEFAULTS.target_gap,
        seed=message.seed,
        traffic_tolerance=(
            message.traffic_tolerance if message.HasField("traffic_tolerance") else _DEFAULTS.traffic_tolerance
        ),
        solver=message.solver or _DEFAULTS.solver,
        threads=message.threads or _DEFAULTS.threads,
        prove=message.prove,
    )


def write_parameters(parameters: SolveParameters) -> problem_pb2.SolveParameters:
    """The message of a solve's limits."""
    return problem_pb2.SolveParameters(
        deadline=None if parameters.deadline_s in (None, inf) else write_duration(parameters.deadline_s),
        work_limit=parameters.work_limit,
        target_gap=parameters.target_gap,
        seed=parameters.seed,
        traffic_tolerance=parameters.traffic_tolerance,
        solver=parameters.solver,
        threads=parameters.threads,
        prove=parameters.prove,
    )
