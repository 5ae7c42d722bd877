"""The public names, once: `__init__.py` reads them from here, and so do type checkers."""

from .device.exchange import DeviceExchange
from .errors import AgreementError, LayoutMismatchError, PassError, RouterError
from .group import ExpertGroup, Traffic
from .layers.base_router import BaseRouter
from .layers.feed_forward import ExpertShape
from .layers.lending import LoanBuffer
from .layers.resident import ResidentExperts, SpillPlanner
from .layers.sharded import FullyShardedExperts, chain
from .models.checkpoint import TrainingState
from .models.replacing import replace_experts
from .planning.planner_stream import Login, StreamStatus
from .planning.session import PlannerSession
from .recording.probes import PROBES, Form, Probe
from .recording.recorder import Recorder, record
from .recording.trace_ring import TraceRing

__all__ = [
    "PROBES",
    "AgreementError",
    "BaseRouter",
    "DeviceExchange",
    "ExpertGroup",
    "ExpertShape",
    "Form",
    "FullyShardedExperts",
    "LayoutMismatchError",
    "LoanBuffer",
    "Login",
    "PassError",
    "PlannerSession",
    "Probe",
    "Recorder",
    "ResidentExperts",
    "RouterError",
    "SpillPlanner",
    "StreamStatus",
    "TraceRing",
    "Traffic",
    "TrainingState",
    "chain",
    "record",
    "replace_experts",
]
