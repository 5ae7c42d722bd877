"""The public names, once: `__init__.py` reads them from here, and so do type checkers."""

from .client import AsyncClient, Client
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
from .jobs import Closing, Forecast, ForecastMethod, JobSpec, Payback, Replan

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "Client",
    "Closing",
    "DeadlineError",
    "Forecast",
    "ForecastMethod",
    "InvalidRequestError",
    "JobSpec",
    "NotFoundError",
    "Payback",
    "PreconditionError",
    "Replan",
    "Security",
    "ServiceError",
    "UnauthenticatedError",
    "UnavailableError",
]
