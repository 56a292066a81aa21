"""What all sections of a config, and a sweep's file, have in common: strictness, and the kinds of numbers."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with `changes` in place."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})


def no_boolean(value: Any) -> Any:
    """YAML's yes and no are no numbers. Raises PydanticCustomError, a ValueError."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


Count = Annotated[int, BeforeValidator(no_boolean), Field(ge=1)]
Index = Annotated[int, BeforeValidator(no_boolean), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(no_boolean), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(no_boolean), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(no_boolean), Field(ge=0, le=1)]
# The weight of the past in a running mean: at 1 it would never learn of the present.
Decay = Annotated[float, BeforeValidator(no_boolean), Field(ge=0, lt=1)]
Seed = Annotated[int, BeforeValidator(no_boolean), Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(min_length=1)]
