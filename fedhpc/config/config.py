"""The configuration of a run: its sections together, what determines its numbers, and a class for each combination of
parts."""

import hashlib
import json
import math
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, Union

from pydantic import Field, ValidationError, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo

from fedhpc import yaml_files
from fedhpc.config.combinations import check_combinations, check_privacy
from fedhpc.config.sections import (
    CLOCK,
    AttackConfig,
    CheckpointConfig,
    CurriculumConfig,
    DataConfig,
    DeviceConfig,
    EvaluateConfig,
    ExchangeConfig,
    FederationConfig,
    MethodConfig,
    ModelConfig,
    PathName,
    PrivacyConfig,
    Section,
    SelectionConfig,
    SimulationConfig,
    SparseConfig,
    TuningConfig,
)
from fedhpc.registry import METHODS, SECTIONS, STRATEGIES, TRACKERS, TUNINGS, Registry, load_plugins, source_sha256

WITHOUT_EFFECT = (
    *("run_dir", "trace", "data.", "checkpoint.", "evaluate.", "plugins", "trackers"),
    *("exchange.timeout_s", "exchange.on_rank_failure", "server.max_rejected"),
)
"""Keys, and beginnings of keys, that do not determine a run's numbers; those of the data and plug-ins say where they
are and what is expected of them, and their content counts by itself."""


class Config(Section):
    """A whole run.

    Sections whose keys depend on the part that they name have that part's Config: `tuning` is a `LoRA.Config` where
    `tuning.kind` is lora. Keys of the section's other parts are valid there, too, so that a file need not change with
    the part; they are checked and left out.
    """

    plugins: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Modules with parts of your own, imported before anything is read; they may lie in the current folder."""
    run_dir: PathName
    """Where everything the run writes goes; with several hosts, a file system that all of them share."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 42
    """Every random draw follows from it."""
    model: ModelConfig
    data: DataConfig
    federation: FederationConfig = FederationConfig()
    tuning: TuningConfig = TuningConfig()
    selection: SelectionConfig = SelectionConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    sparse: SparseConfig = SparseConfig()
    device: DeviceConfig = DeviceConfig()
    server: MethodConfig = MethodConfig()
    exchange: ExchangeConfig = ExchangeConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    simulation: SimulationConfig = SimulationConfig()
    attack: AttackConfig = AttackConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    trace: bool = False
    """Write every round's broadcast, uploads and result to traces/."""
    trackers: list[dict[str, Any]] = Field(default=[])
    """What else sees each round's metrics: a `kind` and its keys, one for each."""

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> "Config":
        """The configuration of these values, in a class whose sections have the keys of the parts that they name.

        Raises:
            ValidationError: with all that is wrong.
            ConfigError: a plug-in cannot be imported.
        """
        if not isinstance(obj, dict) or cls is not Config:
            return super().model_validate(obj, **kwargs)
        modules = obj.get("plugins")
        load_plugins([each for each in modules if isinstance(each, str)] if isinstance(modules, list) else [])
        values = _with_implied(obj)
        sections = {registry.section: _section_class(registry, _part_in(values, registry)) for registry in SECTIONS}
        return _config_class(tuple(sections.items())).model_validate(values, **kwargs)

    @property
    def parts(self) -> dict[str, Any]:
        """The classes of the parts that the configuration names, by section."""
        return {r.section: r[getattr(getattr(self, r.section), r.key)] for r in SECTIONS}

    @model_validator(mode="after")
    def _goes_together(self) -> "Config":
        """What undoes privacy comes first: the other checks would propose what is refused there."""
        check_privacy(self)
        for registry, key in unused_keys(self):
            for name, part in registry.items():
                if key in part.exclusive:
                    where = registry.section
                    raise ValueError(f"{where}.{key} and {where}.{registry.key}: {name} go together")
        for part in self.parts.values():
            part.check(self)
        check_combinations(self)
        return self

    @property
    def devices_sampled(self) -> int:
        """Devices that a round samples, those of over-selection included."""
        return math.ceil((1 + self.simulation.over_selection) * self.federation.devices_per_round - 1e-9)

    @property
    def clock_decides(self) -> bool:
        """Whether the run's numbers depend on the simulated clock."""
        simulation = self.simulation
        by_choice = simulation.deadline_s is not None or simulation.over_selection > 0
        return by_choice or self.parts[METHODS.section].concurrency(self) > 0

    @property
    def tracker_sections(self) -> list[Any]:
        """The entries of `trackers`, each as its tracker's Config."""
        return [TRACKERS[entry["kind"]].Config.model_validate(entry) for entry in self.trackers]

    @field_validator("trackers")
    @classmethod
    def _trackers_are_known(cls, trackers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for place, entry in enumerate(trackers):
            kind = entry.get("kind")
            if kind not in TRACKERS:
                found = f"{kind!r} is no tracker" if "kind" in entry else f"no key kind in {entry}"
                raise ValueError(f"trackers: entry {place}: {found}; kind is one of {', '.join(TRACKERS)}")
            try:
                TRACKERS[entry["kind"]].Config.model_validate(entry)
            except ValidationError as error:
                wrong = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
                raise ValueError(f"trackers: entry {place}: {'; '.join(wrong)}") from None
        return trackers

    def resolved(self, *, task: str, max_length: int) -> "Config":
        """The configuration with what the prepared data say of themselves."""
        data = self.data.model_copy(update={"task": task, "max_length": max_length})
        return self.model_copy(update={"data": data})

    def to_yaml(self) -> str:
        """The configuration with every key."""
        return yaml_files.write(self.model_dump())

    @property
    def sha256(self) -> str:
        """Digest of what determines the run's numbers."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """Dotted key -> value of everything that determines the run's numbers.

        Left out: where files are, how often to save or evaluate, what to do about faults, what only another setting
        would use, and the number of rounds unless a schedule or calibrated noise depends on it. Those may change when a
        run is resumed.
        """
        free = [*WITHOUT_EFFECT]
        if not self.clock_decides:
            free += [f"simulation.{key}" for key in CLOCK]
        if not self.selection.is_automatic:
            free += ["selection.auto_by", "selection.warmup_rounds"]
        if not self.privacy.is_on:
            free.append("privacy.")
        elif not self.privacy.is_calibrated:
            free.append("privacy.epsilon")
        schedules = self.device.schedule != "constant" or self.curriculum.order != "random"
        if not schedules and not self.privacy.is_calibrated:
            free.append("federation.rounds")
        sources = source_sha256(self.parts.values(), self.plugins)
        found = {f"source of {name}": sha256 for name, sha256 in sources.items()}
        for part in self.parts.values():
            found |= part.identity(self)
        return found | {
            key: value for key, value in flatten(self.model_dump()).items() if not key.startswith(tuple(free))
        }


def _part_in(values: dict[str, Any], registry: Registry) -> str:
    """The name of the part that a section names; the default where it names none that there is."""
    section = values.get(registry.section)
    name = section.get(registry.key) if isinstance(section, dict) else None
    return name if isinstance(name, str) and name in registry else registry.default


def _with_implied(values: dict[str, Any]) -> dict[str, Any]:
    """The values with what follows from others; nulls of other parts' keys left out, and sections left empty.

    A tuning without layers has none to select from, and is exchanged whole.
    """
    values = {key: value for key, value in values.items() if value is not None}
    selection = values.get("selection", {})
    if isinstance(selection, dict) and not TUNINGS[_part_in(values, TUNINGS)].has_layers:
        values["selection"] = {STRATEGIES.key: "all", **selection}
    for registry in SECTIONS:
        section, own = values.get(registry.section), registry[_part_in(values, registry)].Config.model_fields
        if isinstance(section, dict):
            known = {key for _, part in registry.items() for key in part.Config.model_fields} - own.keys()
            values[registry.section] = {k: v for k, v in section.items() if v is not None or k not in known}
    return values


def _section_class(registry: Registry, name: str) -> type[Section]:
    """A part's Config, which also takes, checks and leaves out the keys of the section's other parts."""
    return _extended(registry.key, name, registry[name].Config, tuple(registry.items()))


@lru_cache(maxsize=256)
def _extended(key: str, name: str, own: type[Section], parts: tuple[tuple[str, Any], ...]) -> type[Section]:
    names = tuple(name for name, _ in parts)
    others: dict[str, list[FieldInfo]] = {}
    for _, part in parts:
        for field, info in part.Config.model_fields.items():
            if field not in own.model_fields:
                others.setdefault(field, []).append(info)
    fields: dict[str, Any] = {key: (Literal[names], name)}
    for field, infos in others.items():
        kinds = [Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation for info in infos]
        kind: Any = Union[tuple(kinds)]  # noqa: UP007 - of any number of kinds
        fields[field] = (kind, Field(infos[0].get_default(call_default_factory=True), exclude=True))
    return create_model(own.__qualname__, __base__=own, __module__=own.__module__, **fields)


@lru_cache(maxsize=256)
def _config_class(sections: tuple[tuple[str, type[Section]], ...]) -> type[Config]:
    """The class of a configuration with these sections."""
    fields: dict[str, Any] = {
        name: (kind, Field(default_factory=partial(kind.model_validate, {}))) for name, kind in sections
    }
    return create_model("Config", __base__=Config, __module__=Config.__module__, **fields)


def unused_keys(config: Config) -> list[tuple[Registry, str]]:
    """Keys of other parts that a section was given, unless as what they are by default, with the section's registry."""
    found = []
    for registry in SECTIONS:
        section, own = getattr(config, registry.section), config.parts[registry.section].Config.model_fields
        for key in sorted(section.model_fields_set - own.keys()):
            owners = [part.Config.model_fields for _, part in registry.items() if key in part.Config.model_fields]
            if any(getattr(section, key) != fields[key].get_default(call_default_factory=True) for fields in owners):
                found.append((registry, key))
    return found


def every_default() -> dict[str, Any]:
    """Dotted key -> default of every key, those of all parts included."""
    found: dict[str, Any] = {}
    for registry in SECTIONS:
        for _, part in registry.items():
            for key, info in part.Config.model_fields.items():
                found.setdefault(f"{registry.section}.{key}", info.get_default(call_default_factory=True))
    return found


def least_values() -> dict[str, Any]:
    """The least that a valid configuration says, for what needs no more of one than its other keys."""
    return {"run_dir": "-", "model": {"name": "-"}, "data": {"path": "-"}}


def section_of(registry: Registry, **values: Any) -> Any:
    """A section by itself, of the part that the values name.

    Raises:
        ValidationError: with all that is wrong.
    """
    return _section_class(registry, _part_in({registry.section: values}, registry)).model_validate(values)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
