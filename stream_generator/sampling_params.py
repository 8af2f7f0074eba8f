"""How one reply is sampled: a frozen record that is validated once.

Names and meanings are transformers'. Frequency and presence penalties, `logit_bias` and `stop` are
OpenAI's, because transformers has none. The bounds of all parameters are defined only here. The
HTTP bodies inherit them, and `GET /` publishes them.
"""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DEFAULT_TEMPERATURE = 0.6
DEFAULT_TOP_P = 0.9
DEFAULT_MAX_NEW_TOKENS = 1024
LOWEST_TEMPERATURE = 0.01  # logits divided by a lower value leave float32's range

# Parameters of a random draw. They have no effect with `do_sample: false`.
DRAW_FIELDS = ("temperature", "top_k", "top_p", "min_p", "typical_p")

StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingParams(BaseModel):
    """Sampling parameters. `None` means: use the value of the checkpoint's generation config.

    Raises pydantic's `ValidationError` for a value out of bounds or of the wrong type, for an
    unknown name, and for parameters that contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    max_new_tokens: int | None = Field(None, ge=1, le=1_000_000)
    min_new_tokens: int | None = Field(None, ge=0, le=1_000_000)
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, le=5)
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="0: no limit")
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    no_repeat_ngram_size: int | None = Field(None, ge=0, le=1000, description="0: off")
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: tuple[StopString, ...] | None = Field(None, max_length=16)
    stop_token_ids: tuple[TokenId, ...] | None = Field(None, max_length=64)
    logprobs: int | None = Field(None, ge=0, le=20, description="alternatives to report per id")

    @field_validator("stop", "stop_token_ids", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _integer_keys(cls, value: Any) -> Any:
        # JSON has no integer keys, so OpenAI's form is {"1234": -100}.
        if not isinstance(value, dict):
            return value
        return {int(k) if _is_token_id(k) else k: v for k, v in value.items()}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.temperature is not None and 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {LOWEST_TEMPERATURE}, "
                f"not {self.temperature}"
            )
        if self.do_sample is False:
            unused = [name for name in DRAW_FIELDS if getattr(self, name) is not None]
            if unused and not (unused == ["temperature"] and self.temperature == 0):
                raise ValueError(
                    f"do_sample is false, so {', '.join(unused)} would have no effect; leave out "
                    "either do_sample or those parameters"
                )
        if self.do_sample and self.temperature == 0:
            raise ValueError("temperature 0 is greedy; leave out do_sample, or raise temperature")
        least, most = self.min_new_tokens, self.max_new_tokens
        if least is not None and most is not None and least > most:
            raise ValueError(f"min_new_tokens ({least}) must not exceed max_new_tokens ({most})")
        return self

    @property
    def greedy(self) -> bool:
        """Whether each step takes the most likely token and draws nothing."""
        return self.do_sample is False or self.temperature == 0

    def resolved(self, defaults: "SamplingParams", *, room: int, seed: int) -> "SamplingParams":
        """The parameters that a request uses: gaps are filled by `defaults`, constants and `seed`.

        `max_new_tokens` is at most `room`, the number of tokens that the context still holds. If
        the result is greedy, the parameters that only affect the draw are None.
        """
        given = self.model_dump(exclude_none=True)
        filled = defaults.model_dump(exclude_none=True) | given
        if self.temperature is not None:
            filled["do_sample"] = self.temperature > 0
        elif self.do_sample and defaults.temperature == 0:
            del filled["temperature"]
        if SamplingParams.model_construct(**filled).greedy:
            filled = {k: v for k, v in filled.items() if k not in DRAW_FIELDS}
            filled["do_sample"] = False
        else:
            filled["do_sample"] = True
            filled.setdefault("temperature", DEFAULT_TEMPERATURE)
            filled.setdefault("top_p", DEFAULT_TOP_P)
            filled.setdefault("seed", seed)
        default = max(DEFAULT_MAX_NEW_TOKENS, filled.get("min_new_tokens", 0))
        limit = filled.get("max_new_tokens", default)
        filled["max_new_tokens"] = min(limit, room)
        least = min(filled.get("min_new_tokens", 0), filled["max_new_tokens"])
        if least:
            filled["min_new_tokens"] = least
        return SamplingParams(**filled)


def _is_token_id(key: object) -> bool:
    # An id has only one spelling, so no two keys mean the same id.
    return isinstance(key, str) and len(key) < 10 and key.isdecimal() and str(int(key)) == key
