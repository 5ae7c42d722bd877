"""Configuration of the daemon: a TOML file, then the environment (``MOEPLAN_*``), then flags; the later wins."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import platformdirs
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from moeplan.planner.daemon.processors import processors

__all__ = ["Security", "ServiceLimits", "Settings", "UnknownSettingError", "default_data_folder", "load", "loopback"]

MIB = 1024**2


PREFIX = "MOEPLAN_"
OTHERS = {f"{PREFIX}{name}" for name in ("CONFIG", "SERVER", "TOKEN_FILE", "CA", "CERTIFICATE", "KEY")}
"""Variables that others read: the command line and clients."""
INJECTED = re.compile(r"MOEPLAN(_\w+)?_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_\w+)?)")
"""Variables that Kubernetes sets in every pod beside a service whose name begins with moeplan."""


class UnknownSettingError(Exception):
    """A variable of the environment looks like a setting and is none; the message says which is near."""


def default_data_folder() -> Path:
    """Where state lives if nothing else is said, by the custom of the platform."""
    return Path(platformdirs.user_data_dir("moeplan"))


def loopback(address: str) -> bool:
    """True if only this machine can reach `address` (host:port or unix:path)."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServiceLimits(_Section):
    """Limits of what the daemon accepts. Beyond one, requests are refused; nothing that was accepted is dropped."""

    message_bytes: int = Field(64 * MIB, ge=1024, le=2**31 - 1, description="size of one message")
    streams: int = Field(4_096, ge=1, description="rank and watch streams at a time")
    jobs: int = Field(1_024, ge=1, description="jobs in the store")
    job_bytes: int = Field(1_024 * MIB, ge=1, description="statistics of one job in memory")
    total_bytes: int = Field(4_096 * MIB, ge=1, description="statistics and plans of all jobs in memory")
    queue: int = Field(256, ge=0, description="solves that wait for a worker")
    queue_bytes: int = Field(512 * MIB, ge=1024, description="problems of the free solves that wait for a worker")
    solve_s: float = Field(60.0, gt=0, le=86_400, description="time of one solve, whatever its request allows")
    free_solve_s: float = Field(10.0, gt=0, le=86_400, description="time of a solve whose caller gives no deadline")
    worker_bytes: int = Field(8_192 * MIB, ge=512 * MIB, description="memory of one worker")
    kept_plans: int = Field(100, ge=1, description="plans of a job that the store keeps")
    unacknowledged: int = Field(16, ge=2, description="statistics messages of a stream without acknowledgement")
    hello_s: float = Field(10.0, gt=0, le=3_600, description="time for a stream's hello")


def _readable(path: Path | None) -> Path | None:
    if path is not None and not (path.is_file() and os.access(path, os.R_OK)):
        raise ValueError(f"{path} is no file that can be read; give the path of one")
    return path


Readable = Annotated[Path | None, AfterValidator(_readable)]


class Security(_Section):
    """Who may connect. Secrets are given as files, never as values."""

    certificate: Readable = Field(None, description="PEM file: the server's certificate and those that signed it")
    key: Readable = Field(None, description="PEM file: the server's private key")
    client_ca: Readable = Field(None, description="PEM file: clients must show a certificate that one of these signed")
    tokens: Readable = Field(None, description="file of bearer tokens, one a line; # begins a comment")
    tenants: Readable = Field(
        None, description="TOML file of tenants: token_sha256, certificates, role, prefix, quotas"
    )
    insecure: bool = Field(False, description="allow anyone on an address that other machines reach")

    @model_validator(mode="after")
    def _pairs(self) -> Security:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together: give both or none")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs certificate and key: clients are only asked for theirs over TLS")
        return self

    @property
    def identifies(self) -> bool:
        """True if clients must say who they are."""
        return any(file is not None for file in (self.client_ca, self.tokens, self.tenants))


class Settings(BaseSettings):
    """All settings of `moeplan serve`; every one has a default."""

    model_config = SettingsConfigDict(
        env_prefix="MOEPLAN_", env_nested_delimiter="__", extra="forbid", frozen=True, env_ignore_empty=True
    )

    listen: str = Field("127.0.0.1:7433", description="address: host:port (port 0 takes a free one) or unix:path")
    advertise: str = Field("", description="address by which others reach this daemon; `listen` if empty")
    metrics: str = Field("127.0.0.1:7434", description="address of Prometheus metrics over HTTP; empty for none")
    traces: str = Field("", description="collector of OpenTelemetry traces, http(s)://host:port (OTLP over gRPC)")
    page: bool = Field(True, description="answer the live page where metrics are, to browsers on this machine")
    store: str = Field("", description="SQLAlchemy URL, for instance postgresql://host/moeplan; SQLite if empty")
    data: Path = Field(default_factory=default_data_folder, description="folder of the embedded store")
    workers: int = Field(
        default_factory=lambda: max(3, processors() - 1),  # one for jobs alone, two that share a free solve's layers
        ge=1,
        le=1024,
        description="processes that solve",
    )
    lease_s: float = Field(
        10.0, ge=0.5, le=3_600, description="how long a dead daemon's jobs stay its own, behind a shared store"
    )
    drain_s: float = Field(10.0, ge=0, le=3_600, description="time for calls to end after SIGTERM")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning or error")
    reflection: bool = Field(True, description="answer gRPC reflection")
    limits: ServiceLimits = ServiceLimits()
    security: Security = Security()

    @field_validator("data", mode="before")
    @classmethod
    def _data_is_named(cls, value: object) -> object:
        if value == "":  # a path would make it the current folder
            raise ValueError("is empty; give a folder, or leave it out for the default one")
        return value

    @field_validator("traces")
    @classmethod
    def _collector_is_named(cls, value: str) -> str:
        if value and not re.fullmatch(r"https?://[^/@\s]+", value):  # without a scheme, TLS would be a guess
            raise ValueError(f"traces = {value}: must be http://host:port, or https://host:port for TLS")
        return value

    @model_validator(mode="after")
    def _address_is_safe(self) -> Settings:
        if self.listen == "unix:":
            raise ValueError("listen = unix: has no path; write unix:path")
        if not self.listen.startswith("unix:"):
            host, colon, port = self.listen.rpartition(":")
            if not (host and colon and port.isdigit() and int(port) < 65_536):
                raise ValueError(f"listen = {self.listen}: must be host:port or unix:path")
        if loopback(self.listen) or self.security.insecure:
            return self
        if self.security.certificate is None:
            raise ValueError(
                f"listen = {self.listen} can be reached from other machines: "
                "give security.certificate and security.key, "
                "listen on 127.0.0.1, or say --insecure"
            )
        if not self.security.identifies:
            raise ValueError(
                f"listen = {self.listen} can be reached from other machines: "
                "give security.tokens, security.tenants or security.client_ca, "
                "listen on 127.0.0.1, or say --insecure"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Strongest first: flags, environment, file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, deep_merge=True)


def load(file: Path | None, flags: dict[str, Any]) -> Settings:
    """Read all sources.

    Args:
        file: TOML file; None for none.
        flags: Values by (nested) field, only those that were given.

    Raises:
        pydantic.ValidationError: a value is out of range, or a name is not known.
        UnknownSettingError: a variable MOEPLAN_... is no setting.
        OSError: the file cannot be read.
        tomllib.TOMLDecodeError: the file is not TOML.
    """
    _check_names(os.environ)
    if file is None:
        return Settings(**flags)
    file.open("rb").close()  # pydantic-settings takes a missing file for an empty one

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    return FromFile(**flags)


def _check_names(names: Iterable[str]) -> None:
    known = set(OTHERS)
    for name, info in Settings.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            known |= {f"{PREFIX}{name}__{field}".upper() for field in section.model_fields}
        else:
            known.add(f"{PREFIX}{name}".upper())
    for name in sorted(names):
        if not name.startswith(PREFIX) or name in known or INJECTED.fullmatch(name):
            continue
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "see `moeplan serve --show`"
        raise UnknownSettingError(f"{name} is set, but is no setting: {hint}")
