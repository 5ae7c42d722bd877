"""Who may call what: tenants from a file, each with a role, a prefix of job names and quotas.

The jobs of a tenant are those whose name begins with its prefix, so that nothing of it is stored, and a file that
changes holds at once for every job, on every daemon.
"""

from __future__ import annotations

import hashlib
import hmac
import tomllib
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from moeplan.planner.daemon.statuses import RefusalError, denied

__all__ = ["ANYONE", "CALLER", "NOBODY", "Caller", "Role", "Tenant", "Tenants", "may"]

SHORTEST = 16
"""Characters of the shortest token."""


class Role(IntEnum):
    """The rights of a tenant; each may do what those before it may."""

    READ = 1
    RUN = 2
    ADMIN = 3


def _role(value: object) -> object:
    names = [role.name.lower() for role in Role]
    if isinstance(value, Role):
        return value
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"must be one of {', '.join(names)}")
    return Role[value.upper()]


class Tenant(BaseModel):
    """Someone who uses the daemon. Quotas are of one daemon, except `jobs`, which is of the store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern="^[a-z0-9][a-z0-9._-]{0,62}$")
    role: Annotated[Role, BeforeValidator(_role)] = Role.RUN
    prefix: str = Field("", pattern="^([a-z][a-z0-9-]{0,61})?$")
    token_sha256: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    jobs: int | None = Field(None, ge=0)
    memory_bytes: int | None = Field(None, ge=0)
    streams: int | None = Field(None, ge=0)
    solve_s: float | None = Field(None, gt=0, allow_inf_nan=False)

    @field_validator("token_sha256")
    @classmethod
    def _digests(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if len(value) != 64 or not set(value.lower()) <= set("0123456789abcdef"):
                raise ValueError("must be 64 hexadecimal digits; try `tr -d '\\n' < TOKEN | sha256sum`")
        return tuple(value.lower() for value in values)

    @model_validator(mode="after")
    def _counts_what_is_its_own(self) -> Tenant:
        if not self.prefix and (self.jobs is not None or self.memory_bytes is not None):
            raise ValueError("jobs and memory_bytes count the jobs of a prefix; give prefix too")
        return self

    @property
    def listed(self) -> bool:
        """True if it is of a file, and so not just anyone."""
        return bool(self.token_sha256 or self.certificates)

    def owns(self, identity: str) -> bool:
        """True if a job, by its id, is one of this tenant's."""
        return identity.startswith(self.prefix)

    def check_job(self, identity: str) -> None:
        """Raise RefusalError for a job of someone else; it says nothing of whether that exists."""
        if not self.owns(identity):
            raise denied(f"jobs/{identity[:63]}: {self.name} may use jobs whose name begins with {self.prefix}")


ANYONE = Tenant(name="anyone", role=Role.ADMIN)
"""Who calls a daemon that asks nobody who it is."""

NOBODY = Tenant(name="nobody", role=Role.READ)
"""Who calls and is refused."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and from where."""

    tenant: Tenant
    peer: str


_DAEMON = Caller(ANYONE, "")

CALLER: ContextVar[Caller] = ContextVar("CALLER", default=_DAEMON)
"""Of the call that runs."""


class Tenants:
    """All tenants, read from files; none at all means that everyone who may connect may do everything.

    Args:
        tenants: File of tenants; None for none.
        tokens: File of tokens whose bearers may do everything; None for none.

    Raises:
        ValueError: a file cannot be used; the message says which and why.
        OSError: a file cannot be read.
    """

    def __init__(self, tenants: Path | None, tokens: Path | None) -> None:
        self._tenants_file, self._tokens_file = tenants, tokens
        self.reload()

    @property
    def files(self) -> list[Path]:
        """The files that they are read from."""
        return [path for path in (self._tenants_file, self._tokens_file) if path is not None]

    def reload(self) -> None:
        """Read the files again; what is known stays where that fails."""
        tenants = _read_tenants(self._tenants_file) if self._tenants_file is not None else ()
        tokens = _read_tokens(self._tokens_file) if self._tokens_file is not None else ()
        self._count = len(tenants)
        owner = Tenant(name="token", role=Role.ADMIN)
        self._digests = [(digest, tenant) for tenant in tenants for digest in tenant.token_sha256]
        self._digests += [(digest, owner) for digest in tokens]
        self._certificates = {name: tenant for tenant in tenants for name in tenant.certificates}
        # The longest prefix decides whose a job is.
        self._by_prefix = sorted((tenant for tenant in tenants if tenant.prefix), key=lambda one: -len(one.prefix))

    @property
    def count(self) -> int:
        """Tenants of the file."""
        return self._count

    @property
    def asks(self) -> bool:
        """True if a caller must say who it is, by a token or a certificate."""
        return bool(self._digests or self._certificates)

    @property
    def by_certificate(self) -> bool:
        """True if a certificate may say it."""
        return bool(self._certificates)

    def with_token(self, header: str | bytes) -> Tenant | None:
        """Whose token an `authorization` header holds."""
        text = header.decode("latin-1") if isinstance(header, bytes) else header
        kind, _, token = text.partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        found = None
        for known, tenant in self._digests:  # every one is compared, so that the time taken tells nothing
            if hmac.compare_digest(digest, known):
                found = tenant
        return found if kind.lower() == "bearer" else None

    def with_certificate(self, names: Mapping[str, Iterable[bytes]]) -> Tenant | None:
        """Whose certificate it is, by its subject's alternative names or its common name.

        Args:
            names: Of a call, as gRPC gives them (`auth_context`).
        """
        found = [*names.get("x509_subject_alternative_name", []), *names.get("x509_common_name", [])]
        for name in found:
            tenant = self._certificates.get(name.decode("utf-8", "replace"))
            if tenant is not None:
                return tenant
        return None

    def of_job(self, identity: str) -> str:
        """Name of the tenant whose job it is; empty for nobody's."""
        return next((tenant.name for tenant in self._by_prefix if tenant.owns(identity)), "")


def _read_tokens(path: Path) -> tuple[str, ...]:
    """SHA-256 of each bearer token of a file: one a line, # begins a comment.

    Raises:
        ValueError: there is none, or one is too short to be a secret. The message holds no token.
    """
    digests = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if len(token) < SHORTEST:
            raise ValueError(
                f"{path}:{number}: a token must have at least {SHORTEST} characters; try `openssl rand -hex 32`"
            )
        digests.append(hashlib.sha256(token.encode()).hexdigest())
    if not digests:
        raise ValueError(f"{path} holds no token; write one a line, for instance from `openssl rand -hex 32`")
    return tuple(digests)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text file; give one in UTF-8") from None


def _read_tenants(path: Path) -> tuple[Tenant, ...]:
    """The tenants of a TOML file: a table for each, named as it.

    Raises:
        ValueError: the file is not TOML, a value is out of range, or a token or certificate is of two tenants.
        OSError: it cannot be read.
    """
    try:
        tables = tomllib.loads(_text(path))
        tenants = tuple(Tenant(name=name, **table) for name, table in tables.items())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    except TypeError:
        raise ValueError(f"{path} must hold a table for each tenant, as in [alpha]") from None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise ValueError(f"{path}: {place or 'tenant'}: {problem['msg'].removeprefix('Value error, ')}") from None
    if not tenants:
        raise ValueError(f"{path} holds no tenant; write a table for each, as in [alpha]")
    known: dict[str, str] = {}
    for tenant in tenants:
        for secret in (*tenant.token_sha256, *tenant.certificates):
            if known.setdefault(secret, tenant.name) != tenant.name:
                raise ValueError(f"{path}: {known[secret]} and {tenant.name} have the same token or certificate")
        if not (tenant.token_sha256 or tenant.certificates):
            raise ValueError(f"{path}: {tenant.name} has neither token_sha256 nor certificates; give one")
    return tenants


def may(tenant: Tenant, role: Role, method: str) -> RefusalError | None:
    """Why a tenant may not call a method that needs a role; None where it may."""
    if tenant.role >= role:
        return None
    return denied(f"{method} needs the role {role.name.lower()}, and {tenant.name} has {tenant.role.name.lower()}")
