"""Sidecars: TOML files beside the data that say what the data do not."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from napari_recon.scans.errors import ScanError

Sidecar = TypeVar("Sidecar", bound=BaseModel)


def load_sidecar(file: Path, kind: type[Sidecar]) -> Sidecar:
    """Read a sidecar, telling what is wrong with it in one sentence.

    Parameters
    ----------
    file
        TOML.
    kind
        The model of its fields, whose descriptions complete "it must be ...".

    Raises
    ------
    ScanError
        If it is not TOML, or a field is unknown, missing, or will not do.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScanError(f"{file} is not valid TOML: {error}.") from None
    fields = kind.model_fields
    for name in table:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(fields)}."
            raise ScanError(f"{file}: there is no field {name!r}; {hint}")
    try:
        return kind(**table)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        what = fields[name].description
        if name not in table:
            raise ScanError(f"{file}: the field {name!r} is missing; add {name} = {what}.") from None
        raise ScanError(f"{file}: {name} = {table[name]!r} will not do; it must be {what}.") from None
