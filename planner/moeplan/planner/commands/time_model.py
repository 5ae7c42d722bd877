"""Options of the model of time, which `replay` and `view` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from moeplan.planner.commands.options import positive
from moeplan.solvers.problem.errors import ProblemError

if TYPE_CHECKING:
    from moeplan.solvers import Cluster, ExpertSpec

__all__ = ["Hidden", "InterGbps", "Intermediate", "IntraGbps", "Tflops", "TimeModel"]

BYTES_PER_VALUE = 2
MATRICES = 3
"""Of a gated expert: gate, up and down projection, each hidden x intermediate."""

MODEL = "Model of time"

Hidden = Annotated[int, typer.Option(help="Width of a token's vector (bf16).", rich_help_panel=MODEL)]
Intermediate = Annotated[int, typer.Option(help="Width of an expert (gated, bf16).", rich_help_panel=MODEL)]
Tflops = Annotated[float, typer.Option(help="What a device sustains on experts, in TFLOP/s.", rich_help_panel=MODEL)]
IntraGbps = Annotated[float, typer.Option(help="Gigabytes per second inside a node, each way.", rich_help_panel=MODEL)]
InterGbps = Annotated[
    float, typer.Option(help="Gigabytes per second between nodes, per device.", rich_help_panel=MODEL)
]


@dataclass(frozen=True, slots=True)
class TimeModel:
    """Values of the options.

    Raises:
        ProblemError: a value is not above 0.
    """

    hidden: int
    intermediate: int
    tflops: float
    intra_gbps: float
    inter_gbps: float

    def __post_init__(self) -> None:
        positive("--hidden", self.hidden)
        positive("--intermediate", self.intermediate)
        for name in ("tflops", "intra_gbps", "inter_gbps"):
            if not 0 < getattr(self, name) < float("inf"):
                flag = f"--{name.replace('_', '-')}"
                raise ProblemError(flag, getattr(self, name), "must be finite and above 0")

    @property
    def expert(self) -> ExpertSpec:
        """Costs of an expert."""
        from moeplan.solvers import ExpertSpec

        weights = MATRICES * self.hidden * self.intermediate
        return ExpertSpec(
            weight_bytes=weights * BYTES_PER_VALUE,
            token_bytes=self.hidden * BYTES_PER_VALUE,
            seconds_per_token=2 * weights / (self.tflops * 1e12),
        )

    def cluster(self, devices: int, slots: int, nodes: int) -> Cluster:
        """Devices and their links."""
        from moeplan.solvers import Cluster, Link

        intra, inter = Link(self.intra_gbps * 1e9), Link(self.inter_gbps * 1e9)
        return Cluster.uniform(devices, slots, nodes=nodes, intra_node=intra, inter_node=inter)

    def __str__(self) -> str:
        return (
            f"experts of {self.hidden:,} x {self.intermediate:,} (gated, bf16) at {self.tflops:g} TFLOP/s a device, "
            f"{self.intra_gbps:g} GB/s inside a node and {self.inter_gbps:g} GB/s between nodes"
        )
