"""The public names, once: `__init__.py` reads them from here, and so do type checkers."""

from .device.break_even import measure_transfer
from .device.exchange import DeviceExchange, SlotsOfLayouts
from .device.shard_memory import ShardMemory
from .errors import AgreementError, LayoutMismatchError, MissedPassError, PassError, RanksDifferError, RouterError
from .group import ExpertGroup, Traffic
from .layers.base_router import BaseRouter
from .layers.dividing import Division, PlannedLayer
from .layers.feed_forward import ExpertShape
from .layers.home_moves import HomeMoves
from .layers.lending import LoanBuffer
from .layers.resident import ResidentExperts
from .layers.sharded import FullyShardedExperts, chain
from .layers.spilling import SpillPlanner
from .models.checkpoint import TrainingState
from .models.gradients import ExpertGradients, expert_parameters
from .models.pretrained import load_pretrained, save_pretrained
from .models.replacing import replace_experts
from .planning.planner_stream import StreamStatus
from .planning.scalars import step_scalars
from .planning.session import PlannerSession
from .recording.probes import PROBES, Form, Probe
from .recording.recorder import Recorder, record
from .recording.trace_ring import TraceRing

__all__ = [
    "PROBES",
    "AgreementError",
    "BaseRouter",
    "DeviceExchange",
    "Division",
    "ExpertGradients",
    "ExpertGroup",
    "ExpertShape",
    "Form",
    "FullyShardedExperts",
    "HomeMoves",
    "LayoutMismatchError",
    "LoanBuffer",
    "MissedPassError",
    "PassError",
    "PlannedLayer",
    "PlannerSession",
    "Probe",
    "RanksDifferError",
    "Recorder",
    "ResidentExperts",
    "RouterError",
    "ShardMemory",
    "SlotsOfLayouts",
    "SpillPlanner",
    "StreamStatus",
    "TraceRing",
    "Traffic",
    "TrainingState",
    "chain",
    "expert_parameters",
    "load_pretrained",
    "measure_transfer",
    "record",
    "replace_experts",
    "save_pretrained",
    "step_scalars",
]
