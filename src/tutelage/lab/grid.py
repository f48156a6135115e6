"""A grid as a file: worlds × methods × seeds, what is tuned, and what is reported. The reader is strict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from tutelage.errors import UserError
from tutelage.lab.base import BaseModel
from tutelage.lab.worlds import WORLDS, WorldOptions

__all__ = ["Cell", "Grid", "Like", "Method", "Where", "read_grid", "shipped_grids"]

_HOME = "tutelage.lab.grids"


@dataclass(frozen=True, slots=True)
class Like:
    """A setting that follows another method's.

    Attributes:
        method: whose chosen setting (for samples at temperature 1) is taken.
        times: what it is multiplied by.
        setting: its name there; None for the same name.
    """

    method: str
    times: float = 1.0
    setting: str | None = None


@dataclass(frozen=True, slots=True)
class Where:
    """Settings in some cells alone.

    Attributes:
        world: of the cells; None for all.
        varied: values of varied options of the cells.
        settings: fixed ones that go before the method's.
    """

    world: str | None
    varied: Mapping[str, Any]
    settings: Mapping[str, Any]

    def holds(self, cell: Cell) -> bool:
        """Whether the cell is one of them."""
        return self.world in (None, cell.world) and all(cell.varied.get(k) == v for k, v in self.varied.items())


@dataclass(frozen=True, slots=True)
class Method:
    """An algorithm with settings, some of them to be tuned.

    Attributes:
        name: as the table calls it.
        algorithm: its name in the registry; "none" leaves the start as it is.
        start: the method from whose policy (chosen for samples at temperature 1) it starts; None for the base model.
        settings: fixed ones; a ``Like`` follows another method.
        tune: values to choose from, for each setting; all combinations are tried.
        takes_prompts: it gets the prompts without demonstrations.
        where: other fixed settings in some cells; the last that holds goes before the others.
    """

    name: str
    algorithm: str
    start: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    takes_prompts: bool = False
    where: tuple[Where, ...] = ()

    def candidates(self, cell: Cell) -> list[dict[str, Any]]:
        """The settings of each combination in a cell, with ``Like`` where they follow another method."""
        fixed = dict(self.settings)
        for part in self.where:
            fixed |= part.settings if part.holds(cell) else {}
        return [{**fixed, **dict(zip(self.tune, values, strict=True))} for values in product(*self.tune.values())]

    @property
    def needs(self) -> set[str]:
        """The methods whose choice must be known before this one can run."""
        mappings = [self.settings, *(part.settings for part in self.where)]
        values = [value for mapping in mappings for value in mapping.values()]
        values += [value for tried in self.tune.values() for value in tried]
        return {value.method for value in values if isinstance(value, Like)} | ({self.start} if self.start else set())


@dataclass(frozen=True, slots=True)
class Cell:
    """A world with its options: methods are compared, and their settings chosen, within one.

    Attributes:
        world: its name.
        options: where numbers come from; ``tuning``: where settings are chosen.
        varied: the options that tell the cells of a world apart.
    """

    world: str
    options: WorldOptions
    tuning: WorldOptions
    varied: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """For people: the world and what is varied."""
        return ", ".join([self.world, *(f"{name} {value:g}" for name, value in self.varied.items())])


@dataclass(frozen=True, slots=True)
class Grid:
    """Everything that is to be run.

    Attributes:
        name, description: for people.
        cells: worlds with options.
        methods: in an order in which each stands behind those that it needs.
        recipe: the method that the others are held against; None to compare nothing.
        tuning_seeds, report_seeds: no seed is in both.
        base: the base model.
    """

    name: str
    description: str
    cells: tuple[Cell, ...]
    methods: tuple[Method, ...]
    recipe: str | None
    tuning_seeds: tuple[int, ...]
    report_seeds: tuple[int, ...]
    base: BaseModel

    def method(self, name: str) -> Method:
        """The method of a name."""
        return next(method for method in self.methods if method.name == name)

    def only(self, worlds: Sequence[str] | None = None, seeds: int | None = None) -> Grid:
        """A part of the grid.

        Args:
            worlds: names; by default all of the grid's.
            seeds: how many of the reporting seeds, from the first.

        Raises:
            UserError: the grid has no such world, or not as many seeds.
        """
        names = {cell.world for cell in self.cells}
        for world in worlds or ():
            if world not in names:
                raise UserError(
                    f"the grid has no world '{world}'.",
                    remedy=f"Its worlds: {', '.join(sorted(names))}.",
                    field="worlds",
                )
        if seeds is not None and not 1 <= seeds <= len(self.report_seeds):
            raise UserError(
                f"must be between 1 and {len(self.report_seeds)}, the grid's reporting seeds, not {seeds}.",
                field="seeds",
            )
        cells = tuple(cell for cell in self.cells if not worlds or cell.world in worlds)
        return replace(self, cells=cells, report_seeds=self.report_seeds[:seeds])


def shipped_grids() -> dict[str, str]:
    """Names of the grids that come with the package, and their descriptions."""
    found = {}
    for entry in sorted(files(_HOME).iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".yaml"):
            found[entry.name] = str(yaml.safe_load(entry.read_text(encoding="utf-8"))["description"]).strip()
    return found


def read_grid(name: str) -> Grid:
    """Read and check a grid.

    Args:
        name: a file, or the name of a grid that comes with the package.

    Raises:
        UserError: no such file; a field that is missing, unknown or wrong; a seed that is tuned on and reported.
    """
    path = Path(name)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif (shipped := files(_HOME).joinpath(name.removesuffix(".yaml") + ".yaml")).is_file() and "/" not in name:
        text = shipped.read_text(encoding="utf-8")
    else:
        raise UserError("there is no such grid.", remedy=f"A file, or one of {', '.join(shipped_grids())}.", file=name)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"is no YAML: {' '.join(str(error).split())}", file=name) from error
    try:
        return _grid(path.name.removesuffix(".yaml"), content)
    except UserError as error:
        raise UserError(error.problem, remedy=error.remedy, file=name, field=error.field) from error


# --- the parts of a file ------------------------------------------------------------------------------------------------


def _grid(name: str, content: Any) -> Grid:
    required, optional = ("description", "worlds", "tuning", "report", "methods"), ("vary", "recipe", "base")
    content = _mapping(content, "", required, optional)
    methods = _methods(content["methods"])
    recipe = _text_or_none(content.get("recipe"), "recipe")
    if recipe is not None and recipe not in {method.name for method in methods}:
        raise UserError(f"there is no method '{recipe}'.", field="recipe")
    tuning, report = (_seeds(content[part], part) for part in ("tuning", "report"))
    if both := sorted(set(tuning) & set(report)):
        raise UserError(
            f"seed {both[0]} is also one that settings are chosen on.",
            remedy="Report other seeds than those of 'tuning'.",
            field="report.seeds",
        )
    cells = _cells(content["worlds"], _given(content.get("vary")))
    for method in methods:
        _check_where(method, cells)
    return Grid(
        name=name,
        description=_text(content["description"], "description").strip(),
        cells=cells,
        methods=methods,
        recipe=recipe,
        tuning_seeds=tuning,
        report_seeds=report,
        base=_made(BaseModel(), _given(content.get("base")), "base"),
    )


def _cells(worlds: Any, vary: Any) -> tuple[Cell, ...]:
    worlds = _mapping(worlds, "worlds", (), tuple(WORLDS))
    vary = _mapping(vary, "vary", (), tuple(entry.name for entry in fields(WorldOptions)))
    if not worlds:
        raise UserError("names no world.", remedy=f"Worlds: {', '.join(WORLDS)}.", field="worlds")
    for name, values in vary.items():
        if not isinstance(values, list) or not values:
            raise UserError("must be a list of values.", field=f"vary.{name}")
        for value in values:
            _made(WorldOptions(), {name: value}, "vary")
    return tuple(cell for world, given in worlds.items() for cell in _cells_of(world, given, vary))


def _cells_of(world: str, given: Any, vary: Mapping[str, Sequence[Any]]) -> Iterator[Cell]:
    place = f"worlds.{world}"
    given = _open_mapping(given, place)
    tuning = _open_mapping(given.pop("tuning", None), f"{place}.tuning")
    most = [name for name in ("demonstrations", "prompts") if f"most_{name}" in given]
    limits = {name: _number(given.pop(f"most_{name}"), f"{place}.most_{name}") for name in most}
    for name in limits:
        if name not in vary:
            raise UserError(f"limits what 'vary' has of {name}, which it has not.", field=f"{place}.most_{name}")
    base = _made(WorldOptions(), given, place)
    _made(base, tuning, f"{place}.tuning")
    for values in product(*vary.values()):
        varied = dict(zip(vary, values, strict=True))
        if any(varied[name] > limit for name, limit in limits.items()):
            continue
        options = _made(base, varied, "vary")
        # What is varied is varied where settings are chosen too, up to what the smaller half of prompts has.
        own = {name: min(varied[name], tuning[name]) if name in varied else value for name, value in tuning.items()}
        yield Cell(world, options, _made(options, own, f"{place}.tuning"), varied)


def _made(start: Any, given: Any, place: str) -> Any:
    """A dataclass with some fields replaced, which must have the type of the old ones."""
    old = asdict(start)
    given = _mapping(given, place, (), tuple(old))
    for name, value in given.items():
        _number(value, f"{place}.{name}", whole=not isinstance(old[name], float))
    try:
        return replace(start, **given)
    except UserError as error:
        raise UserError(error.problem, remedy=error.remedy, field=f"{place}.{error.field}") from error


def _seeds(content: Any, part: str) -> tuple[int, ...]:
    seeds = _mapping(content, part, ("seeds",), ())["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError("must be a list of whole numbers.", field=f"{part}.seeds")
    if len(set(seeds)) < len(seeds):
        raise UserError("names a seed twice.", field=f"{part}.seeds")
    return tuple(seeds)


def _methods(content: Any) -> tuple[Method, ...]:
    if not isinstance(content, dict) or not content:
        raise UserError("must name at least one method.", field="methods")
    found = {str(name): _method(str(name), given) for name, given in content.items()}
    return tuple(_in_order(found))


def _method(name: str, content: Any) -> Method:
    place = f"methods.{name}"
    content = _mapping(content, place, ("algorithm",), ("start", "settings", "tune", "takes_prompts", "where"))
    settings, tune = (_open_mapping(content.get(part), f"{place}.{part}") for part in ("settings", "tune"))
    for key, values in tune.items():
        if not isinstance(values, list) or not values:
            raise UserError("must be a list of values.", field=f"{place}.tune.{key}")
        if key in settings:
            raise UserError("is fixed and tuned.", field=f"{place}.tune.{key}")
    takes_prompts = content.get("takes_prompts", False)
    if not isinstance(takes_prompts, bool):
        raise UserError(f"must be true or false, not {takes_prompts!r}.", field=f"{place}.takes_prompts")
    return Method(
        name=name,
        algorithm=_text(content["algorithm"], f"{place}.algorithm"),
        start=_text_or_none(content.get("start"), f"{place}.start"),
        settings=_values(settings, f"{place}.settings"),
        tune={key: [_value(value, f"{place}.tune.{key}") for value in values] for key, values in tune.items()},
        takes_prompts=takes_prompts,
        where=tuple(_wheres(content.get("where"), f"{place}.where", tune)),
    )


def _wheres(content: Any, place: str, tune: Mapping[str, Any]) -> Iterator[Where]:
    content = [] if content is None else content
    if not isinstance(content, list):
        raise UserError("must be a list of conditions with settings.", field=place)
    for number, part in enumerate(content, 1):
        yield _where(part, f"{place}.{number}", tune)


def _where(content: Any, place: str, tune: Mapping[str, Any]) -> Where:
    options = tuple(entry.name for entry in fields(WorldOptions))
    content = dict(_mapping(content, place, ("settings",), ("world", *options)))
    settings = _open_mapping(content.pop("settings"), f"{place}.settings")
    if both := sorted(set(settings) & set(tune)):
        raise UserError("is fixed and tuned.", field=f"{place}.settings.{both[0]}")
    world = _text_or_none(content.pop("world", None), f"{place}.world")
    return Where(world, content, _values(settings, f"{place}.settings"))


def _check_where(method: Method, cells: Sequence[Cell]) -> None:
    """Each condition can hold, and so do all conditions of one in some cell together."""
    for number, part in enumerate(method.where, 1):
        place = f"methods.{method.name}.where.{number}"
        worlds = dict.fromkeys(cell.world for cell in cells)
        if part.world not in (None, *worlds):
            raise UserError(
                f"the grid has no world '{part.world}'.",
                remedy=f"Its worlds: {', '.join(worlds)}.",
                field=f"{place}.world",
            )
        for name, value in part.varied.items():
            found = [cell.varied[name] for cell in cells if name in cell.varied]
            if not found:
                raise UserError("is not varied, so this never holds.", remedy="See 'vary'.", field=f"{place}.{name}")
            if value not in found:
                raise UserError(
                    f"{value!r} is none of the values in 'vary', so this never holds.", field=f"{place}.{name}"
                )
        if not any(part.holds(cell) for cell in cells):
            raise UserError("holds in no cell of the grid.", field=place)


def _values(settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Fixed settings; null leaves one at the algorithm's default, also where a merged mapping (<<) has a value."""
    return {key: _value(value, f"{place}.{key}") for key, value in settings.items() if value is not None}


def _value(value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        return value
    given = _mapping(value, place, ("like",), ("times", "setting"))
    times = _number(given.get("times", 1.0), f"{place}.times")
    setting = _text_or_none(given.get("setting"), f"{place}.setting")
    return Like(_text(given["like"], f"{place}.like"), float(times), setting)


def _in_order(methods: dict[str, Method]) -> Iterator[Method]:
    """Each behind those that it needs."""
    done: set[str] = set()
    waiting = dict(methods)
    for method in methods.values():
        for needed in sorted(method.needs - methods.keys()):
            raise UserError(f"there is no method '{needed}'.", field=f"methods.{method.name}")
    while waiting:
        ready = [method for method in waiting.values() if method.needs <= done]
        if not ready:
            raise UserError(f"{', '.join(waiting)} need one another.", field="methods")
        for method in ready:
            done.add(method.name)
            del waiting[method.name]
            yield method


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"must be a text, not {value!r}.", field=place)
    return value


def _text_or_none(value: Any, place: str) -> str | None:
    return None if value is None else _text(value, place)


def _number(value: Any, place: str, *, whole: bool = False) -> Any:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise UserError(f"must be a {'whole ' if whole else ''}number, not {value!r}.", field=place)
    return value


def _given(content: Any) -> Any:
    """A mapping that may be left out or empty."""
    return {} if content is None else content


def _open_mapping(content: Any, place: str) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError("must be a mapping of names to values.", field=place)
    return {str(name): value for name, value in content.items()}


def _mapping(content: Any, place: str, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    """A mapping with these keys and no others."""
    if not isinstance(content, dict):
        raise UserError("must be a mapping of names to values.", field=place or None)
    for name in content:
        if name not in (*required, *optional):
            raise UserError(
                "is not known.", remedy=f"Known: {', '.join((*required, *optional))}.", field=_under(place, name)
            )
    for name in required:
        if name not in content:
            raise UserError("is missing.", field=_under(place, name))
    return content


def _under(place: str, name: Any) -> str:
    return f"{place}.{name}" if place else str(name)
