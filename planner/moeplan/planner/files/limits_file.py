"""Limits on layouts from a JSON file: what the devices can hold, what an expert costs, and where replicas may be."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.planner.errors import FileError
from moeplan.solvers import Cluster, Constraints, ExpertSpec, ProblemError

__all__ = ["LimitsFile", "read_limits"]

DEVICES = {"slots": np.int64, "speed": np.float64, "memory_bytes": np.int64}
"""Properties of devices that a file may give, one value for all or one per device."""

FLAGS = ("groups_on_node",)
FRACTIONS = ("speed", "seconds_per_token")
LARGEST = 2**53
"""Of whole numbers; every limit is at most this."""


@dataclass(frozen=True, slots=True, eq=False)
class LimitsFile:
    """Contents of a limits file.

    Attributes:
        constraints: The limits proper.
        expert: What an expert and a token cost.
        devices: Arrays that replace those of a uniform cluster.
    """

    constraints: Constraints = field(default=Constraints())
    expert: ExpertSpec = field(default=ExpertSpec())
    devices: dict[str, Any] = field(default_factory=dict)

    def cluster(self, uniform: Cluster) -> Cluster:
        """The cluster with the devices of the file.

        Raises:
            ProblemError: an array does not have one value per device.
        """
        given: dict[str, Any] = {
            name: np.broadcast_to(value, uniform.devices) if np.ndim(value) == 0 else value
            for name, value in self.devices.items()
        }
        for name, values in given.items():
            if len(values) != uniform.devices:
                reason = f"must be one, or one per device ({uniform.devices})"
                raise ProblemError(f"constraints.{name}", f"{len(values)} values", reason)
        return replace(uniform, **given)


def read_limits(path: Path | None) -> LimitsFile:
    """The limits of a file; none where there is no file.

    Raises:
        FileError: the file is missing or says what it cannot.
    """
    if path is None:
        return LimitsFile()
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        reason = f"{error.strerror}; give a JSON file, docs/constraints.md has an example"
        raise FileError(path, reason) from None
    except ValueError as error:
        raise FileError(path, f"is not JSON ({error})") from None
    if not isinstance(document, dict):
        raise FileError(path, f"holds a {type(document).__name__}; must be a JSON object")
    limits = {limit.name for limit in fields(Constraints)}
    _check(path, "", document, {*limits, *DEVICES, "expert"})
    spec = document.get("expert", {})
    if not isinstance(spec, dict):
        raise FileError(path, 'must be an object, such as {"weight_bytes": 50000000}', "expert", spec)
    _check(path, "expert.", spec, {field.name for field in fields(ExpertSpec)})
    try:
        return LimitsFile(
            Constraints(**{name: document[name] for name in limits & set(document)}),
            ExpertSpec(**spec),
            {name: np.asarray(document[name], dtype) for name, dtype in DEVICES.items() if name in document},
        )
    except ProblemError as error:
        raise FileError(path, error.reason, error.field.removeprefix("constraints."), error.value) from None
    except (TypeError, ValueError) as error:  # lists of unequal lengths
        raise FileError(path, f"holds a list of the wrong shape ({error})") from None


def _check(path: Path, of: str, given: dict[str, Any], known: set[str]) -> None:
    """Refuse names that are not known, and values of another type than their names ask for."""
    for name, value in given.items():
        part = f"{of}{name}"
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise FileError(path, f"is not known; {meant}There are {', '.join(sorted(known))}", part, value)
        if name == "expert":
            continue
        if name in FLAGS:
            if not isinstance(value, bool):
                raise FileError(path, "must be true or false", part, json.dumps(value))
            continue
        for number in _numbers(value):
            fault = _fault(name, number)
            if fault:
                raise FileError(path, fault, part, json.dumps(number))


def _numbers(value: Any) -> list[Any]:
    """Everything in a list of lists."""
    return [number for entry in value for number in _numbers(entry)] if isinstance(value, list) else [value]


def _fault(name: str, number: Any) -> str:
    """Fault of a number of a limit; empty where there is none."""
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if name in FRACTIONS:
        return "" if is_number and 0 < number < float("inf") else "must be a finite number above 0"
    if isinstance(number, float) and number.is_integer() and abs(number) <= LARGEST:
        return f"must be a whole number; write {int(number)}"
    if not is_number or isinstance(number, float):
        return "must be a whole number, at most 2**53"
    return "" if 0 <= number <= LARGEST else "must be 0 to 2**53"
