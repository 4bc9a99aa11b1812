"""Who belongs to a project: the file `project.toml`, and what each member is called in a certificate."""

from __future__ import annotations

import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self, final

from cryptography import x509
from cryptography.x509.oid import NameOID
from pydantic import Field, ValidationError, model_validator

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.config import explained
from dp_federated_lora.lab.sections import Section

Role = Literal["site", "coordinator", "admin"]
Right = Literal["submit", "stop", "view"]

# A name is a folder, a word of a subject and a part of a certificate's subject, so it holds nothing that means something there.
Name = Annotated[str, Field(pattern="^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$")]
Names = Annotated[tuple[Name, ...], Field(strict=False)]
Rights = Annotated[tuple[Right, ...], Field(min_length=1, strict=False)]

# Folders that provisioning makes beside those of members.
RESERVED: Final = ("authority", "broker")


@final
@dataclass(frozen=True, slots=True)
class Member:
    """A program that may connect: one site, one coordinator or one administrator."""

    role: Role
    name: str

    def __str__(self) -> str:
        return f"{self.role}/{self.name}"


class Server(Section):
    """[[servers]]: the host name or IP address and the port at which members reach one server of the broker."""

    host: Annotated[str, Field(pattern="^[A-Za-z0-9:]([A-Za-z0-9.:-]{0,251}[A-Za-z0-9])?$")]
    port: Annotated[int, Field(ge=1, le=65535)]

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Servers = Annotated[tuple[Server, ...], Field(min_length=1, strict=False)]


class Project(Section):
    """A whole project.toml. Names are small letters, digits and hyphens, at most 48, and no two members share one.

    ```toml
    name = "lung-study"
    days = 365                                  # how long certificates are valid
    sites = ["hospital-a", "hospital-b"]
    coordinators = ["main"]

    [administrators]                            # what each may do
    alice = ["submit", "stop", "view"]
    bob = ["view"]

    [[servers]]
    host = "broker.example.org"
    port = 4222
    ```
    """

    name: Name
    days: Annotated[int, Field(ge=1, le=1825)]
    sites: Annotated[Names, Field(min_length=1)]
    coordinators: Annotated[Names, Field(min_length=1)]
    administrators: dict[Name, Rights]
    servers: Servers

    @model_validator(mode="after")
    def _every_name_once(self) -> Self:
        counts = Counter([*RESERVED, *(member.name for member in self.members)])
        if repeated := [name for name, count in counts.items() if count > 1]:
            raise ValueError(
                f"two members, or a member and a folder of provisioning, are called {', '.join(repeated)}; give each a name of "
                f"its own, and none {' or '.join(RESERVED)}"
            )
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a project file.

        Raises:
            ConfigError: if there is none, or naming the file and every key at fault.
        """
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(
                f"cannot read the project {path}: {error.strerror}; name the file that lists the members"
            ) from error
        except ValidationError as error:
            raise ConfigError(f"the project {path} cannot be used; correct:{explained(error)}") from error
        except ValueError as error:  # of TOML or UTF-8
            raise ConfigError(f"the project {path} is not valid TOML: {error}") from error

    @property
    def members(self) -> tuple[Member, ...]:
        """Everybody who may connect: sites, coordinators, administrators, as listed."""
        return (
            *(Member("site", name) for name in self.sites),
            *(Member("coordinator", name) for name in self.coordinators),
            *(Member("admin", name) for name in self.administrators),
        )


def subject_of(project: str, name: str) -> x509.Name:
    """The subject of a certificate, for example CN=site/hospital-a,O=lung-study: to the broker, this is the user."""
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, project), x509.NameAttribute(NameOID.COMMON_NAME, name)],
    )
