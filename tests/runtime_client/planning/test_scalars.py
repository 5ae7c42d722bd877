"""Numbers of a step for experiment trackers, and a tracker that takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeplan.runtime_client import ExpertGroup, ExpertShape, FullyShardedExperts, ResidentExperts, step_scalars
from moeplan.runtime_client.layers.expert_layer import ExpertLayer
from moeplan.solvers import Layout, QuotaPlanner, SpillOptions

COUNTS = np.array([[[30, 10, 0, 0], [0, 0, 0, 0]], [[5, 5, 5, 5], [5, 5, 5, 5]]])
"""Two layers, two ranks, four experts."""


def layers() -> list[ExpertLayer]:
    """A fully sharded layer with one replica more than experts, and a resident one; neither talks to other ranks."""
    group, shape = ExpertGroup(0, 2), ExpertShape(hidden=4, width=4)
    layout = Layout(np.array([[0, 1, 2], [2, 3, -1]], np.int32), 4)
    planner = QuotaPlanner(SpillOptions.uniform(4, 2, 0), 2)
    return [FullyShardedExperts(shape, 4, group, layout=layout), ResidentExperts(shape, 4, group, planner=planner)]


def test_scalars_are_plain_numbers() -> None:
    made = layers()
    made[1].traffic["weights.forward"] = 96
    found = step_scalars(made, COUNTS)
    assert all(type(value) is float for value in found.values())
    assert found == {
        "moeplan/imbalance": 1.5,  # 40 and 0 tokens, then 20 and 20
        "moeplan/worst_imbalance": 2.0,
        "moeplan/balanced_share": 40 / 60,
        "moeplan/replicas": 1.0,
        "moeplan/bytes_lent": 96.0,
        "moeplan/plan_version": 0.0,
    }
    with pytest.raises(ValueError, match=r"must be \[2 layers, ranks, experts\]"):
        step_scalars(made, COUNTS[:1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    """The recipe of docs/pages.md."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    for step in range(3):
        for name, value in step_scalars(layers(), COUNTS).items():
            writer.add_scalar(name, value, step)
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("moeplan/imbalance")] == [1.5] * 3
