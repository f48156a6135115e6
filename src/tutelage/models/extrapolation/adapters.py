"""Extrapolating LoRA: exactly, since what it adds to a weight, scale · B · A, is linear in B."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor

from tutelage.errors import UserError
from tutelage.files import json_text, read_json, storing
from tutelage.models.adapters import ADAPTER_FILE
from tutelage.models.extrapolation.arithmetic import Tally, computed_in, extrapolated
from tutelage.models.extrapolation.source import FLOATS, copy_for_loaders, require_finite
from tutelage.models.loading import loading
from tutelage.models.stored import StoredTensor, StoredWeights, weight_files, write_tensors

__all__ = ["JoinedAdapters", "ScaledAdapter", "adapter_config", "lora_part"]

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."  # of the names that peft gives
_LORA = re.compile(r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.weight)?$")
_SECONDS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}

# Fields under which what LoRA adds is scale · B · A, whatever they say. Any other one has to have its default.
_KNOWN = {
    *(
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "runtime_config"),
    *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
}
_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")  # ways to begin that change no weight of the base


def lora_part(name: str) -> tuple[str, str] | None:
    """Module and part of a tensor of LoRA; None for a weight that is stored whole.

    >>> lora_part("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    ('model.layers.0.mlp.up_proj', 'lora_B')
    """
    found = _LORA.match(name.removeprefix(_PREFIX))
    return (found["module"], found["part"]) if found else None


def adapter_config(folder: Path, *, field: str) -> LoraConfig:
    """The config of an adapter that is linear in its B.

    Raises:
        UserError: it cannot be read, or is of another kind: it names the field that makes it so.
    """
    with loading("the adapter", "Copy the folder anew.", file=str(folder), field=field):
        config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise _not_linear(folder, field, f"it is of the kind {getattr(config.peft_type, 'value', config.peft_type)}")
    plain = LoraConfig()
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if entry.name not in _KNOWN and value and value != getattr(plain, entry.name, None):
            raise _not_linear(folder, field, f"{entry.name} is {value}")
    if config.init_lora_weights not in _LEAVE_THE_BASE:
        raise _not_linear(
            folder, field, f"init_lora_weights {config.init_lora_weights} changes the weights of the base"
        )
    return config


def _not_linear(folder: Path, field: str, reason: str) -> UserError:
    return UserError(
        f"this adapter cannot be extrapolated by its own weights: {reason}.",
        remedy="Merge both into their bases (merge_and_unload, save_pretrained) and give the whole models.",
        file=str(folder),
        field=field,
    )


class _Adapters:
    """What both ways of extrapolating an adapter share.

    Attributes:
        route: how, for people.
        files: names of the weight files that were read, of the start and of the aligned model.
    """

    route = ""

    def __init__(self, aligned: Path, dtype: torch.dtype | None):
        self._config = adapter_config(aligned, field="aligned")
        self._aligned, self._dtype = StoredWeights(aligned, field="aligned"), dtype
        require_lora(self._aligned)
        self._whole, self._modules = whole_weights(self._aligned), {self._aligned: modules(self._aligned)}

    def write(self, folder: Path, alpha: float) -> Tally:
        """Write the adapter at α into a folder, with what loaders need.

        Raises:
            UserError: a weight is not finite, or would not be; the two are the same; a weight that the adapter has whole is not in
                the base; the disk does not take it.
        """
        tally, parts = Tally(), self._parts(alpha)
        layout = {
            name: StoredTensor(ADAPTER_FILE, self._dtype or part.dtype, part.shape) for name, part in parts.items()
        }

        def tensor(name: str) -> list[Tensor]:
            found = parts[name].make(layout[name].dtype, tally)
            if not torch.isfinite(found).all():
                raise self._aligned.error(
                    f"{name} leaves the range of {found.dtype} at alpha = {alpha:g}.",
                    "Take a smaller alpha, or --dtype float32.",
                )
            return [found]

        write_tensors(folder / ADAPTER_FILE, layout, tensor, self._aligned.metadata[ADAPTER_FILE] or {"format": "pt"})
        if not tally.differs:
            raise self._aligned.error(
                "its weights are those of the start: there is no way to go on along.", "Give two different models."
            )
        copy_for_loaders(self._aligned.folder, folder, besides=(CONFIG,))
        config = read_json(self._aligned.folder / CONFIG) | self._fields(alpha)
        with storing(folder / CONFIG):
            (folder / CONFIG).write_text(json_text(config, indent=2) + "\n", encoding="utf-8")
        return tally

    def _parts(self, alpha: float) -> dict[str, _Part]:
        raise NotImplementedError

    def _fields(self, alpha: float) -> dict[str, Any]:
        """What the config says otherwise than the aligned adapter's."""
        return {}

    def _whole_part(self, name: str, start: StoredWeights, theirs: str, alpha: float) -> _Part:
        """A weight that an adapter has whole, such as a head that was trained with it."""
        if start.tensors[theirs].shape != self._aligned.tensors[name].shape:
            raise start.error(
                f"{theirs} has the shape {list(start.tensors[theirs].shape)}, and the adapter's {name} "
                f"{list(self._aligned.tensors[name].shape)}.",
                "Give the model that the adapter was trained on.",
            )

        def make(dtype: torch.dtype, tally: Tally) -> Tensor:
            ours, others = _finite(self._aligned, name), _finite(start, theirs)
            found = extrapolated(ours, others, alpha, dtype)
            tally.add(ours, others, alpha, found)
            return found

        source = start.tensors[theirs] if alpha == -1 else self._aligned.tensors[name]
        return _Part(source.dtype, self._aligned.tensors[name].shape, make)

    def _squared_update(self, module: str, others: Iterable[tuple[StoredWeights, LoraConfig, float]] = ()) -> float:
        """‖Σ sign · scale · B · A‖² of a module, over the aligned adapter and others: the trace of a product of [r, r] matrices."""
        left, right = [], []
        for weights, config, sign in ((self._aligned, self._config, 1.0), *others):
            if parts := self._modules[weights].get(module):
                first, second = (weights.read(parts[name]).double() for name in sorted(parts))
                right.append(first.flatten(1))
                left.append(second.flatten(1) * (sign * scaling(config, module, len(first))))
        product_b, product_a = torch.cat(left, dim=1), torch.cat(right)
        return max(0.0, ((product_b.T @ product_b) * (product_a @ product_a.T)).sum().item())


class ScaledAdapter(_Adapters):
    """An adapter that was trained on the start itself: B becomes (1 + α)B, and the rank stays.

    Args:
        start, aligned: folders of the base and of the adapter.
        dtype: what to store in; by default as the adapter does.

    Raises:
        UserError: it is no plain LoRA; a weight that it has whole is not in the base.
    """

    route = "the adapter's own weights, its B times 1 + α"

    def __init__(self, start: Path, aligned: Path, *, dtype: torch.dtype | None = None):
        super().__init__(aligned, dtype)
        self._folder = start
        self._base: StoredWeights | None = None
        if self._whole:
            self._base = base = StoredWeights(start, field="start")
            for name in sorted(self._whole):
                if of_base(name) not in base.tensors:
                    raise base.error(
                        f"holds no {of_base(name)}, which the adapter has whole (modules_to_save): it is tied there, or has "
                        "another name.",
                        "Merge both into their bases (merge_and_unload, save_pretrained) and give the whole models.",
                    )

    @property
    def files(self) -> tuple[list[Path], list[Path]]:
        try:
            names = weight_files(self._folder, field="start")
        except UserError:  # pickled: nothing of the base is read, and a hash of it is all that is lost
            names = []
        return [self._folder / name for name in names], [self._aligned.folder / ADAPTER_FILE]

    def _parts(self, alpha: float) -> dict[str, _Part]:
        found = {}
        for name, tensor in self._aligned.tensors.items():
            if part := lora_part(name):
                moves = part[1] not in _SECONDS
                found[name] = _Part(
                    tensor.dtype, tensor.shape, self._times(name, part[0], 1 + alpha if moves else 1.0)
                )
            elif self._base:
                found[name] = self._whole_part(name, self._base, of_base(name), alpha)
        return found

    def _times(self, name: str, module: str, factor: float) -> Callable[[torch.dtype, Tally], Tensor]:
        def make(dtype: torch.dtype, tally: Tally) -> Tensor:
            value = _finite(self._aligned, name)
            exact = value if factor == 1 else value.to(computed_in(value)) * factor
            found = exact.to(dtype)
            tally.rounded(exact, found)
            if name in (self._modules[self._aligned][module].get(second) for second in _SECONDS.values()):
                tally.differs |= bool(value.any())
                tally.squared_distance += self._squared_update(module)
            return found

        return make


class JoinedAdapters(_Adapters):
    """Two adapters of one base: A = [A₁; A₀] and B = [(1 + α)s₁B₁, −αs₀B₀] add exactly (1 + α)ΔW₁ − αΔW₀, with both ranks together.

    α = 0 gives the aligned adapter and α = −1 the start's, as they are.

    Args:
        start, aligned: folders of the adapters.
        dtype: what to store in; by default the wider of both adapters', tensor by tensor.

    Raises:
        UserError: one of them is no plain LoRA; they have weights of their own (``modules_to_save``) in different places.
    """

    route = "both adapters' weights side by side, with both ranks together"

    def __init__(self, start: Path, aligned: Path, *, dtype: torch.dtype | None = None):
        super().__init__(aligned, dtype)
        self._start_config = adapter_config(start, field="start")
        self._start = StoredWeights(start, field="start")
        require_lora(self._start)
        if self._config.fan_in_fan_out != self._start_config.fan_in_fan_out:
            raise self._start.error(
                "fan_in_fan_out is not what it is in the aligned adapter.", "Give two states of one adapter."
            )
        theirs = whole_weights(self._start)
        if other := self._whole ^ theirs:
            where = "aligned adapter" if min(other) in self._whole else "start"
            raise self._start.error(
                f"{min(other)} is a weight of its own (modules_to_save) in the {where} alone.",
                "Merge both into their bases (merge_and_unload, save_pretrained) and give the whole models.",
            )
        self._modules[self._start] = modules(self._start)

    @property
    def files(self) -> tuple[list[Path], list[Path]]:
        return [self._start.folder / ADAPTER_FILE], [self._aligned.folder / ADAPTER_FILE]

    def _parts(self, alpha: float) -> dict[str, _Part]:
        if alpha in (0, -1):
            return self._of_one(self._start if alpha else self._aligned)
        found = {name: self._whole_part(name, self._start, name, alpha) for name in self._whole}
        for module, first in sorted(self._kinds().items()):
            for part in (first, _SECONDS[first]):
                pairs = [
                    (weights, self._modules[weights][module][part])
                    for weights in (self._aligned, self._start)
                    if module in self._modules[weights]
                ]
                found[pairs[0][1]] = self._joined(pairs, module, part, alpha)
        return found

    def _of_one(self, weights: StoredWeights) -> dict[str, _Part]:
        """One of the two, as it is."""

        def part(name: str) -> _Part:
            def make(dtype: torch.dtype, tally: Tally) -> Tensor:
                value = _finite(weights, name)
                found = value.to(dtype)
                tally.rounded(value, found)
                if (place := lora_part(name)) and place[1] in _SECONDS:
                    self._see(place[0], tally)
                elif place is None:
                    ours, theirs = _finite(self._aligned, name), _finite(self._start, name)
                    tally.add(ours, theirs, 0.0, ours)
                return found

            return _Part(weights.tensors[name].dtype, weights.tensors[name].shape, make)

        return {name: part(name) for name in weights.tensors}

    def _see(self, module: str, tally: Tally) -> None:
        """Tell the tally how far the two adapters are apart in a module."""
        tally.squared_distance += self._squared_update(module, [(self._start, self._start_config, -1.0)])
        ours, theirs = (self._modules[weights].get(module, {}) for weights in (self._aligned, self._start))
        scales = {
            scaling(config, module, self._rank(weights, module) or 1)
            for config, weights in ((self._config, self._aligned), (self._start_config, self._start))
        }
        tally.differs |= len(scales) > 1 or ours.keys() != theirs.keys()
        tally.differs |= ours.keys() == theirs.keys() and any(
            not torch.equal(self._aligned.read(ours[part]), self._start.read(theirs[part])) for part in ours
        )

    def _joined(self, pairs: list[tuple[StoredWeights, str]], module: str, part: str, alpha: float) -> _Part:
        along = 0 if part in _SECONDS else 1
        shapes = [list(weights.tensors[name].shape) for weights, name in pairs]
        bare = [shape[:along] + shape[along + 1 :] for shape in shapes]
        if any(shape != bare[0] for shape in bare):
            raise self._start.error(
                f"{pairs[-1][1]} has the shape {shapes[-1]}, and {shapes[0]} in the aligned adapter.",
                "Give two adapters of one base.",
            )
        shape = list(shapes[0])
        shape[along] = sum(each[along] for each in shapes)
        dtype = pairs[0][0].tensors[pairs[0][1]].dtype
        for weights, name in pairs[1:]:
            dtype = torch.promote_types(dtype, weights.tensors[name].dtype)

        def make(dtype: torch.dtype, tally: Tally) -> Tensor:
            values = []
            for weights, name in pairs:
                value = _finite(weights, name)
                if part not in _SECONDS:
                    is_aligned = weights is self._aligned
                    scale = scaling(
                        self._config if is_aligned else self._start_config, module, self._rank(weights, module)
                    )
                    value = value.to(computed_in(value)) * ((1 + alpha if is_aligned else -alpha) * scale)
                values.append(value)
            if part in _SECONDS:
                self._see(module, tally)
            exact = torch.cat([value.to(computed_in(*values)) for value in values], dim=along)
            found = exact.to(dtype)
            tally.rounded(exact, found)
            return found

        return _Part(dtype, tuple(shape), make)

    def _kinds(self) -> dict[str, str]:
        """Of each module that either adapter changes, the name of its first part."""
        found: dict[str, str] = {}
        for modules in self._modules.values():
            for module, parts in modules.items():
                first = next(part for part in parts if part in _SECONDS)
                if found.setdefault(module, first) != first:
                    raise self._start.error(
                        f"{module} has another kind of LoRA in the aligned adapter.", "Give two alike."
                    )
        return found

    def _rank(self, weights: StoredWeights, module: str) -> int:
        parts = self._modules[weights].get(module)
        if parts is None:
            return 0
        return weights.tensors[next(name for part, name in parts.items() if part in _SECONDS)].shape[0]

    def _fields(self, alpha: float) -> dict[str, Any]:
        if alpha == 0:
            return {}
        if alpha == -1:
            return read_json(self._start.folder / CONFIG)
        ranks = {module: sum(self._rank(weights, module) for weights in self._modules) for module in self._kinds()}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        others = {module: each for module, each in sorted(ranks.items()) if each != rank}
        fields: dict[str, Any] = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": {re.escape(module): each for module, each in others.items()},
            "alpha_pattern": {re.escape(module): each for module, each in others.items()},
            "use_rslora": False,
            "init_lora_weights": True,
            "eva_config": None,
        }
        ours, theirs = (self._modules[weights].keys() for weights in (self._aligned, self._start))
        if ours != theirs:
            fields |= {"target_modules": sorted(ours | theirs), "exclude_modules": None}
            fields |= {"layers_to_transform": None, "layers_pattern": None}
        return fields


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A tensor to write.

    Attributes:
        dtype, shape: what it is stored as, unless the user says another precision.
        make: gives it in a precision, and tells the tally.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[torch.dtype, Tally], Tensor]


def scaling(config: LoraConfig, module: str, rank: int) -> float:
    """What B · A of a module is multiplied by, as peft does."""
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def require_lora(weights: StoredWeights) -> None:
    """Raise ``UserError`` for a tensor that is neither a part of scale · B · A nor a whole weight, or of no floating type."""
    for name, tensor in weights.tensors.items():
        if "lora_" in name and lora_part(name) is None:
            raise _not_linear(weights.folder, weights.field, f"{name} is no part of scale · B · A")
        if tensor.dtype not in FLOATS:
            raise weights.error(
                f"{name} is stored as {tensor.dtype}.", "Give weights in 16 or 32 bits.", file=ADAPTER_FILE
            )


def whole_weights(weights: StoredWeights) -> set[str]:
    """The tensors of an adapter that are no part of LoRA."""
    return {name for name in weights.tensors if lora_part(name) is None}


def modules(weights: StoredWeights) -> dict[str, dict[str, str]]:
    """By module, the names of its parts."""
    found: dict[str, dict[str, str]] = {}
    for name in weights.tensors:
        if part := lora_part(name):
            found.setdefault(part[0], {})[part[1]] = name
    for module, parts in found.items():
        _require_both(weights, module, parts)
    return found


def _require_both(weights: StoredWeights, module: str, parts: Iterable[str]) -> None:
    if {*parts} not in ({first, second} for first, second in _SECONDS.items()):
        raise weights.error(f"{module} lacks one of its A and B.", "Copy the folder anew.", file=ADAPTER_FILE)


def _finite(weights: StoredWeights, name: str) -> Tensor:
    value = weights.read(name)
    require_finite(value, name, weights)
    return value


def of_base(name: str) -> str:
    """The name of an adapter's whole weight in the base."""
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")
