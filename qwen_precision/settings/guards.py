"""What the guards of ``qprec generate`` can be told, and the profiles that tell it. No torch.

Each guard has a switch (``enabled``) and numbers of its own. A profile is a YAML file of ``configs/guards/`` by its
name, or any file by its path; what it does not mention keeps the default. ``name: false`` switches a guard off.
"""

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qwen_precision.dtypes import DTYPES
from qwen_precision.errors import UsageError
from qwen_precision.settings.config import configs_folder, first_error, known, near_or_known, read_yaml

OnFailure = Literal["stop", "fallback", "rescale"]

ON_FAILURE = get_args(OnFailure)
"""What ``recover`` may do with a row whose logits cannot be mended."""


class Guard(BaseModel):
    """Base of a guard's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    enabled: bool = True


class Float32Logits(Guard):
    """Upcasts the last position's logits before any warper and softmax; prefills a long prompt in chunks."""

    chunk: int = Field(default=2048, ge=0)
    """Tokens of the prompt that go through the model at once; 0 for all."""


class Watch(Guard):
    """Looks at every row of logits at every step: NaN, +inf, all equal; probability, margin and entropy."""

    flat: float = Field(default=1e-4, ge=0, le=1)
    """Nats above -ln(top-1 probability), the entropy of equal logits, within which a row is looked at; 0 for never."""


class Clamp(Guard):
    """Repairs a partly bad row: NaN is never chosen, +inf is clamped, never zeroed."""

    bound: float = Field(default=1e30, gt=0, le=1e38)
    """Clamped to this, or less where the temperature and the penalty would overflow it. 1e30 is SGLang's."""
    share: float = Field(default=0.5, ge=0, lt=1)
    """A row of which more than this is bad is not repaired."""
    most: int = Field(default=3, ge=0)
    """A row that was repaired at so many steps is not repaired again."""


class Epsilon(Guard):
    """Keeps the likeliest token where the filters leave none, in place of dividing by zero."""


class Degenerate(Guard):
    """Notices text that says nothing: a run of one token, descending ids, a short cycle; stops what NaN made."""

    run: int = Field(default=8, ge=3)
    """Equal tokens in a row."""
    descending: int = Field(default=6, ge=3)
    """Ids in a row, each one less than the last, from top-k minus 1 or down to 0: what top-k makes of a NaN row."""
    period: int = Field(default=16, ge=2, le=1024)
    """Longest cycle looked for, in tokens."""
    repeats: int = Field(default=4, ge=2)
    """How often a cycle must come round."""
    stop_loops: bool = False
    """Whether to end a mere loop, with healthy logits, too."""


class Recover(Guard):
    """Computes a failed step again from the last clean prefix, in the next dtype of the ladder, or ends the row."""

    on_failure: OnFailure = "fallback"
    """Rescale: in the same dtype, fp16, with weights rescaled to stay inside it."""
    margin: float = Field(default=4.0, ge=1, le=1024)
    """Headroom that every operation shall have after rescaling."""
    ladder: list[str] = Field(default_factory=lambda: list(DTYPES), min_length=1)
    """Dtypes in the order in which they are tried; those after the one that failed."""
    then: Literal["stay", "return"] = "stay"
    """Whether the row stays in that dtype or goes back after ``return_after`` tokens."""
    return_after: int = Field(default=8, ge=1)

    @field_validator("ladder")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            known(name, DTYPES, "dtype")
        if len(set(value)) != len(value):
            raise ValueError("names a dtype twice; name each once, in the order to try them")
        return value


class Advice(Guard):
    """Names settings that are known to make it worse."""

    temperature: float = Field(default=0.3, ge=0)
    """Sampling below this is near greedy: the logits are divided by it."""
    penalty: float = Field(default=0.3, ge=0)
    """How far from 1 a repetition penalty may be."""
    headroom: float = Field(default=4.0, ge=1)
    """Least headroom of the dtype in the probe given with ``--probe-run``."""


class GuardSettings(BaseModel):
    """All guards; ``act: false`` lets them report what they would have done, and change nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    act: bool = True
    float32_logits: Float32Logits = Float32Logits()
    watch: Watch = Watch()
    clamp: Clamp = Clamp()
    epsilon: Epsilon = Epsilon()
    degenerate: Degenerate = Degenerate()
    recover: Recover = Recover()
    advice: Advice = Advice()

    @model_validator(mode="before")
    @classmethod
    def _switches(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: {"enabled": v} if isinstance(v, bool) and k != "act" else v for k, v in data.items()}

    @model_validator(mode="after")
    def _eyes(self) -> "GuardSettings":
        blind = [name for name in ("clamp", "recover") if getattr(self, name).enabled and not self.watch.enabled]
        if blind:
            raise ValueError(f"{blind[0]} acts on what watch sees; switch watch on, or {blind[0]} off")
        if self.recover.on_failure == "rescale" and self.recover.then == "return":
            raise ValueError("recover: rescaled weights are fp16 already: nothing to return to; use then: stay")
        if self.recover.enabled and not self.float32_logits.enabled:
            raise ValueError("recover puts rows of two dtypes side by side; switch float32_logits on, or recover off")
        return self


GUARDS: dict[str, type[Guard]] = {
    name: field.annotation
    for name, field in GuardSettings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Guard)
}
"""Every guard by name, in the order in which they meet a row; its first docstring line says what it does."""


def guard_profiles() -> list[str]:
    """The guard profiles that come with qprec."""
    return sorted(path.stem for path in (configs_folder() / "guards").glob("*.yaml"))


def load_guards(profile: str, on_failure: str | None = None) -> GuardSettings:
    """Guards of a profile, by name or file; ``on_failure`` (the flag) wins over it.

    Raises:
        UsageError: no such profile, an unknown guard or setting, a wrong value, or what is not there yet.
    """
    data = _read(profile)
    if on_failure is not None:
        recover = data.get("recover")
        recover = {"enabled": recover} if isinstance(recover, bool) else recover or {}
        if isinstance(recover, dict):  # anything else is refused below, by its name
            if recover.get("enabled") is False:
                raise UsageError(f"--on-failure {on_failure}: the guard recover is off in {profile!r}; choose others.")
            data["recover"] = {**recover, "on_failure": on_failure}
    try:
        settings = GuardSettings.model_validate(data)
    except ValidationError as error:
        key, message = first_error(error)
        raise UsageError(f"--guards {profile}: {f'{key}: ' if key else ''}{message}.") from error
    return settings


def _read(profile: str) -> dict[str, Any]:
    path = Path(profile)
    if not path.suffix and profile in guard_profiles():
        path = configs_folder() / "guards" / f"{profile}.yaml"
    label, expected = f"--guards {profile}", f"a YAML file or one of the profiles {', '.join(guard_profiles())}"
    data = read_yaml(path, label, expected)
    if not isinstance(data, dict):
        raise UsageError(f"{label}: should hold guards and their settings, like `clamp: false`.")
    for key, value in data.items():
        if key not in GuardSettings.model_fields:
            raise UsageError(f"{label}: unknown guard {str(key)!r}; {near_or_known(str(key), ['act', *GUARDS])}")
        if isinstance(value, dict) and key in GUARDS:
            for inner in value:
                if inner not in GUARDS[key].model_fields:
                    near = near_or_known(str(inner), list(GUARDS[key].model_fields))
                    raise UsageError(f"{label}: unknown setting {str(inner)!r} of {key}; {near}")
    return data
