"""Between the messages of moeplan.v1 and the types of the solvers: tensors, problems and plans.

Reading validates: a message that holds no valid value raises ProblemError with the path of the field.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration

from moeplan.solvers.plan.parameters import SolveParameters
from moeplan.solvers.problem.arrays import MAX_TOKENS, Int64
from moeplan.solvers.problem.cluster import Cluster, Link
from moeplan.solvers.problem.constraints import Constraints
from moeplan.solvers.problem.demand import Demand
from moeplan.solvers.problem.errors import ProblemError
from moeplan.solvers.problem.layout import Layout
from moeplan.solvers.problem.problem import ExpertSpec, Problem
from moeplan.v1 import problem_pb2, tensor_pb2

if TYPE_CHECKING:
    from moeplan.solvers import Plan

__all__ = [
    "field",
    "read_array",
    "read_cluster",
    "read_counts",
    "read_expert",
    "read_layout",
    "read_parameters",
    "read_problem",
    "write_array",
    "write_cluster",
    "write_duration",
    "write_expert",
    "write_parameters",
    "write_plan",
    "write_problem",
]

_DTYPES: dict[int, np.dtype[Any]] = {
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_DEFAULTS = SolveParameters()
_UNCONSTRAINED = Constraints()


@contextmanager
def field(prefix: str) -> Iterator[None]:
    """Errors raised inside name their field relative to `prefix`, for instance ``problems[3]``."""
    try:
        yield
    except ProblemError as error:
        raise type(error)(f"{prefix}.{error.field}", error.value, error.reason) from None


def read_array(name: str, tensor: tensor_pb2.Tensor) -> npt.NDArray[Any]:
    """A read-only view of a tensor's data.

    Raises:
        ProblemError: the type is not known, or the data do not fill the shape exactly.
    """
    dtype = _DTYPES.get(tensor.type)
    if dtype is None:
        raise ProblemError(f"{name}.type", tensor.type, "must be INT32, INT64, FLOAT32 or FLOAT64")
    shape = tuple(tensor.shape)
    if len(shape) > 8 or any(length < 0 for length in shape):
        raise ProblemError(f"{name}.shape", list(shape[:8]), "must be at most 8 numbers of at least 0")
    size = dtype.itemsize
    for length in shape:
        size *= length
    if size != len(tensor.data):
        raise ProblemError(
            f"{name}.data", f"{len(tensor.data)} bytes", f"shape {list(shape)} of {dtype.name} has {size}"
        )
    return np.frombuffer(tensor.data, dtype).reshape(shape)


def read_counts(name: str, tensor: tensor_pb2.Tensor) -> Int64:
    """Whole numbers from 0 to 2**53, sent as integers or as floats.

    Raises:
        ProblemError: a value is negative, too large, broken or not a number.
    """
    array = read_array(name, tensor)
    if array.size:
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= MAX_TOKENS):
            bad = ~((array >= 0) & (array <= MAX_TOKENS))
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ProblemError(f"{name}[{', '.join(map(str, index))}]", array[index], f"must be 0 to {MAX_TOKENS}")
    counts = array.astype(np.int64)
    if array.dtype.kind == "f" and not np.array_equal(counts, array):
        index = tuple(int(i) for i in np.argwhere(counts != array)[0])
        raise ProblemError(f"{name}[{', '.join(map(str, index))}]", array[index], "must be a whole number of tokens")
    return counts


def write_array(array: npt.NDArray[Any]) -> tensor_pb2.Tensor:
    """A tensor of the array's type; other integers travel as int64."""
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _CODES:
        dtype = np.dtype("<f8") if array.dtype.kind == "f" else np.dtype("<i8")
    return tensor_pb2.Tensor(
        shape=array.shape,
        type=tensor_pb2.DataType.ValueType(_CODES[dtype]),
        data=array.astype(dtype, copy=False).tobytes(),
    )


def _write_tokens(tokens: Int64) -> tensor_pb2.Tensor:
    """Counts in half the bytes where they allow it: messages under 64 KiB need no second round trip for room."""
    small = tokens.size and tokens.max() <= np.iinfo(np.int32).max
    return write_array(tokens.astype(np.int32) if small else tokens)


def read_layout(name: str, tensor: tensor_pb2.Tensor, experts: int) -> Layout:
    """A layout.

    Raises:
        ProblemError: the tensor is not one of `experts` experts.
    """
    slots = read_array(name, tensor)
    if slots.dtype.kind != "i" or slots.ndim != 2:
        raise ProblemError(name, f"{slots.dtype} of shape {list(slots.shape)}", "must be int32[devices, width]")
    try:
        return Layout(slots, experts)
    except ProblemError as error:
        raise ProblemError(name + error.field.removeprefix("layout.slots"), error.value, error.reason) from None


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
    """What an expert costs.

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
    demand = Demand.of(tokens, list(message.demand.weights) or None)
    problem = Problem(
        cluster=read_cluster(message.cluster),
        demand=demand,
        expert=read_expert(message.expert),
        current=_read_current(message.current, demand.experts) if message.HasField("current") else None,
        max_moves=message.max_moves if message.HasField("max_moves") else None,
        groups=message.groups or 1,
        tail=message.tail if message.HasField("tail") else 1.0,
        constraints=_read_constraints(message.constraints) if message.HasField("constraints") else _UNCONSTRAINED,
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


def _read_current(tensor: tensor_pb2.Tensor, experts: int) -> Layout:
    """A layout in force, which may lack experts that were lost with their devices."""
    slots = read_array("current", tensor)
    held = np.unique(slots) if slots.dtype.kind == "i" and slots.ndim == 2 else ()
    missing = np.setdiff1d(np.arange(experts), held)
    if not len(held) or not len(missing):
        return read_layout("current", tensor, experts)
    # Checked as if a further device held what is missing.
    rows = -(-len(missing) // max(1, slots.shape[1]))
    extra = np.full(rows * slots.shape[1], -1, np.int32)
    extra[: len(missing)] = missing
    padded = np.concatenate([slots, extra.reshape(rows, -1)])
    read_layout("current", write_array(padded), experts)
    return Layout.trusted(slots.astype(np.int32), experts)


def write_problem(problem: Problem) -> problem_pb2.Problem:
    """The message of a problem."""
    return problem_pb2.Problem(
        cluster=write_cluster(problem.cluster),
        demand=problem_pb2.Demand(tokens=_write_tokens(problem.demand.tokens), weights=problem.demand.weights.tolist()),
        expert=write_expert(problem.expert),
        current=None if problem.current is None else write_array(problem.current.slots),
        max_moves=problem.max_moves,
        groups=problem.groups,
        tail=problem.tail,
        constraints=_write_constraints(problem.constraints) if problem.constraints.names else None,
    )


def read_parameters(message: problem_pb2.SolveParameters) -> SolveParameters:
    """Limits of a solve.

    Raises:
        ProblemError: a field is out of range.
    """
    deadline_s = read_duration("parameters.deadline", message.deadline) if message.HasField("deadline") else None
    return SolveParameters(
        deadline_s=deadline_s,
        work_limit=message.work_limit if message.HasField("work_limit") else _DEFAULTS.work_limit,
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
        deadline=None if parameters.deadline_s is None else write_duration(parameters.deadline_s),
        work_limit=parameters.work_limit,
        target_gap=parameters.target_gap,
        seed=parameters.seed,
        traffic_tolerance=parameters.traffic_tolerance,
        solver=parameters.solver,
        threads=parameters.threads,
        prove=parameters.prove,
    )


def read_duration(name: str, message: Duration) -> float:
    """Seconds.

    Raises:
        ProblemError: the duration is not above 0.
    """
    seconds = message.seconds + message.nanos * 1e-9
    if not seconds > 0:
        raise ProblemError(name, f"{seconds} s", "must be above 0, or absent")
    return seconds


def write_duration(seconds: float) -> Duration:
    """The message of a number of seconds, to the nanosecond."""
    nanos = round(seconds * 1e9)
    return Duration(seconds=nanos // 10**9, nanos=nanos % 10**9)


def write_plan(plan: Plan) -> problem_pb2.Plan:
    """The message of a plan."""
    return problem_pb2.Plan(
        policy=plan.policy,
        layout=write_array(plan.layout.slots),
        split_rule=plan.split.rule,
        quota=write_array(plan.split.quota),
        cost_s=plan.cost.mean_s,
        imbalance=plan.imbalance.tolist(),
        mean_imbalance=plan.mean_imbalance,
        bound=plan.bound,
        gap=plan.gap,
        moves=None
        if plan.moves is None
        else problem_pb2.Moves(
            expert=plan.moves.expert.tolist(), device=plan.moves.device.tolist(), source=plan.moves.source.tolist()
        ),
        solve_time=write_duration(plan.seconds),
    )
