"""Options of a scan: some changed, and what is wrong said in one sentence."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from napari_recon.scans.errors import ScanError

Options = TypeVar("Options", bound=BaseModel)


def changed(options: Options, changes: dict[str, Any]) -> Options:
    """The options with some of them changed.

    Raises
    ------
    ScanError
        If one is unknown or out of range.
    """
    if not changes:
        return options
    try:
        return type(options)(**{**options.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise ScanError(
                f"There is no scan option {name!r}; there are {', '.join(type(options).model_fields)}."
            ) from None
        raise ScanError(f"The scan option {name} = {first['input']!r} will not do: {first['msg']}.") from None
