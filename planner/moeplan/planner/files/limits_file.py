"""Limits on layouts from a JSON file: what the devices can hold, what an expert costs, and where replicas may be."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.solvers import Cluster, Constraints, ExpertSpec, ProblemError

__all__ = ["LimitsFile", "read_limits"]

DEVICES = {"slots": np.int32, "speed": np.float64, "memory_bytes": np.int64}
"""Properties of devices that a file may give, one value for all or one per device."""


@dataclass(frozen=True, slots=True, eq=False)
class LimitsFile:
    """What such a file says.

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
                raise ProblemError(name, f"{len(values)} values", f"must be one, or one per device ({uniform.devices})")
        return replace(uniform, **given)


def read_limits(path: Path | None) -> LimitsFile:
    """The limits of a file; none where there is no file.

    Raises:
        ProblemError: the file is missing or says what it cannot.
    """
    if path is None:
        return LimitsFile()
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ProblemError(str(path), error.strerror, "give a JSON file; docs/constraints.md has an example") from None
    except ValueError as error:
        raise ProblemError(str(path), "no JSON", str(error)) from None
    if not isinstance(document, dict):
        raise ProblemError(str(path), type(document).__name__, "must be a JSON object")
    names = {limit.name for limit in fields(Constraints)}
    unknown = sorted(set(document) - names - set(DEVICES) - {"expert"})
    if unknown:
        known = ", ".join(sorted(names | set(DEVICES) | {"expert"}))
        raise ProblemError(f"{path}: {unknown[0]}", document[unknown[0]], f"is not known; {known} are")
    spec = document.get("expert", {})
    wrong = sorted(set(spec) - {f.name for f in fields(ExpertSpec)}) if isinstance(spec, dict) else ["not an object"]
    if wrong:
        known = ", ".join(f.name for f in fields(ExpertSpec))
        raise ProblemError(f"{path}: expert", wrong[0], f"must be an object with some of {known}")
    try:
        return LimitsFile(
            Constraints(**{name: document[name] for name in names & set(document)}),
            ExpertSpec(**spec),
            {name: np.asarray(document[name], dtype) for name, dtype in DEVICES.items() if name in document},
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, ProblemError):
            raise
        raise ProblemError(str(path), "a value of the wrong type", str(error)) from None
