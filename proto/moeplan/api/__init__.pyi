"""The public names, once: `__init__.py` reads them from here, and so do type checkers."""

from .client import AsyncClient, Client, PolicyInfo
from .connection import Security
from .errors import (
    AlreadyExistsError,
    DeadlineError,
    InvalidRequestError,
    NotFoundError,
    PreconditionError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)
from .job_plans import Decision, JobPlan, LayerPlan, Reason
from .jobs import (
    Closing,
    Forecast,
    ForecastMethod,
    Job,
    JobSpec,
    JobStatus,
    Payback,
    Replan,
    StatisticsCount,
)

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "Client",
    "Closing",
    "DeadlineError",
    "Decision",
    "Forecast",
    "ForecastMethod",
    "InvalidRequestError",
    "Job",
    "JobPlan",
    "JobSpec",
    "JobStatus",
    "LayerPlan",
    "NotFoundError",
    "Payback",
    "PolicyInfo",
    "PreconditionError",
    "Reason",
    "Replan",
    "Security",
    "ServiceError",
    "StatisticsCount",
    "UnauthenticatedError",
    "UnavailableError",
]
