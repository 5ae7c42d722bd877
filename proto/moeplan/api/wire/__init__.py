"""Between the messages of moeplan.v1 and our types: the only conversions there are.

Reading validates: a message that holds no valid value raises ProblemError with the path of the field.
"""

from moeplan.api.wire.job_messages import (
    read_job,
    read_job_plan,
    read_job_spec,
    read_status,
    read_stored_plan,
    write_job_plan,
    write_job_spec,
    write_status,
)
from moeplan.api.wire.plan_messages import read_plan, write_plan
from moeplan.api.wire.problem_messages import (
    read_cluster,
    read_expert,
    read_parameters,
    read_problem,
    write_cluster,
    write_expert,
    write_parameters,
    write_problem,
)
from moeplan.api.wire.tensors import (
    field,
    read_array,
    read_counts,
    read_layout,
    read_layouts,
    write_array,
    write_counts,
    write_layout,
    write_layouts,
)
from moeplan.api.wire.times import read_duration, read_seconds, read_time, write_duration, write_time

__all__ = [
    "field",
    "read_array",
    "read_cluster",
    "read_counts",
    "read_duration",
    "read_expert",
    "read_job",
    "read_job_plan",
    "read_job_spec",
    "read_layout",
    "read_layouts",
    "read_parameters",
    "read_plan",
    "read_problem",
    "read_seconds",
    "read_status",
    "read_stored_plan",
    "read_time",
    "write_array",
    "write_cluster",
    "write_counts",
    "write_duration",
    "write_expert",
    "write_job_plan",
    "write_job_spec",
    "write_layout",
    "write_layouts",
    "write_parameters",
    "write_plan",
    "write_problem",
    "write_status",
    "write_time",
]
