"""What all TOML files of this project share: strict keys, and an error that names the first one that is refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from slimserve.core.errors import UserError


class Strict(BaseModel):
    """A table that refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def refused_key(kind: str, error: ValidationError, root: str, origin: object) -> UserError:
    """The first problem of a `kind` of file that came from `origin`; `root` names what is wrong with no single key."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or root
    return UserError(f"{kind} key {where}", first["input"], f"is refused: {first['msg']}", f"mend it in {origin}")
