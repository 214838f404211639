"""The base class of all sections and the number types they share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Url = Annotated[str, Field(pattern=r"^(https?://[^/\s]+|unix:/[^\s]{1,100})$")]


class Strict(BaseModel):
    """A frozen section; an unknown key or a wrong type is an error. The docstring below each key is its meaning in
    docs/config.md."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
