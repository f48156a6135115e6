"""A learned reward model: a body with a scalar head, which may share its frozen base with the policy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from tutelage.data.tokenization import Tokenization
from tutelage.errors import UserError
from tutelage.files import write_json
from tutelage.groups import Group
from tutelage.models.adapters import named_by_peft, named_for_both_loaders
from tutelage.models.generation import mend_generation_config
from tutelage.models.loading import (
    base_causal_lm,
    first_line,
    load_model,
    loading,
    model_body,
    require_base,
    require_exists,
    run_part,
)
from tutelage.models.weights import WeightSet, fingerprint
from tutelage.rewards.base import reward_func
from tutelage.rewards.classifier import HEAD_NAME, classifier_adapter_config, empty_classifier, why_no_classifier
from tutelage.scoring.logps import Layout, end_hidden_states, in_batches

__all__ = ["ExplicitReward"]

_ADAPTER = "adapter_model.safetensors"
_HEAD = f"base_model.model.{HEAD_NAME}.weight"
_HEAD_FILE = "reward_head.safetensors"
_FACTS = "reward.json"


class ExplicitReward:
    """r(x, y) = w · h, the head's weights times the body's last hidden state at the completion's last token.

    That token is the end-of-turn token, unless the completion was truncated.

    Args:
        model: the body, a transformers model with or without adapters and with any head, which is not used.
        head: linear, from the hidden size to one number.
        weights: if the body is shared with a policy, the reward's own values of its trainable weights; None if the
            reward has its own body.
        layout, batch_size, pad_token_id: as for ``cached_logps``.
        autocast: makes a context for mixed precision.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        *,
        weights: WeightSet | None = None,
        layout: Layout = "auto",
        batch_size: int = 16,
        pad_token_id: int = 0,
        autocast: Any = nullcontext,
    ):
        self.model, self.head, self.weights = model, head, weights
        self.layout: Layout = layout
        self.batch_size, self.pad_token_id = batch_size, pad_token_id
        self.autocast = autocast

    @staticmethod
    def fresh(model: nn.Module, *, shared: bool, **options: Any) -> ExplicitReward:
        """An untrained reward, which is 0 everywhere.

        A random head would turn some large hidden states into large rewards, and the first pass would only unlearn
        them.

        Args:
            model: its body. ``shared``: the body belongs to a policy, and the reward gets its own copy of the
                trainable weights, initialized from the policy's.
            options: further arguments of the constructor.
        """
        base = base_causal_lm(model)
        output = base.get_output_embeddings()
        size = output.weight.shape[1] if output is not None else base.config.get_text_config().hidden_size
        head = nn.Linear(cast(int, size), 1, bias=False)
        nn.init.zeros_(head.weight)
        head.to(base_causal_lm(model).device)
        return ExplicitReward(model, head, weights=WeightSet(model) if shared else None, **options)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters: the body's trainable weights and the head."""
        body = (
            self.weights.parameters
            if self.weights
            else [p for n, p in self.model.named_parameters() if p.requires_grad and p is not self.head.weight]
        )
        return [*body, *self.head.parameters()]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the body has the reward's weights. Run forward and backward inside it."""
        with self.weights.active() if self.weights else nullcontext():
            yield

    def recompute_activations(self, options: Mapping[str, Any] | None = None) -> None:
        """From now on, training computes the activations of the body's layers a second time instead of keeping them.

        For a body of the reward's own; one that is a policy's follows the policy.

        Args:
            options: transformers' ``activation_checkpointing_kwargs``: ``every_n_layers``, ``offload``, and what
                ``torch.utils.checkpoint`` takes.

        Raises:
            UserError: the architecture cannot.
        """
        further = dict(options or {})
        settings = {name: further.pop(name) for name in ("every_n_layers", "offload") if name in further}
        base = base_causal_lm(self.model)
        try:
            if hasattr(base, "activation_checkpointing_enable"):
                base.activation_checkpointing_enable(activation_checkpointing_kwargs=further or None, **settings)
            else:  # transformers before 5.23
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=further or None, **settings)
        except ValueError as error:
            raise UserError(
                f"the reward model cannot recompute its activations: {error}",
                remedy="Leave out --activation_checkpointing.",
                field="activation_checkpointing",
            ) from error

    def rewards(self, groups: Sequence[Group]) -> Tensor:
        """[C] float32 rewards with gradient, groups and completions in order; call it within ``active``."""
        hidden_CH = end_hidden_states(self.model, groups, layout=self.layout, pad_token_id=self.pad_token_id)
        # The head is tiny and its outputs are compared, so it does not run in bfloat16 unless it was loaded in it.
        with torch.autocast(hidden_CH.device.type, enabled=False):
            return self.head(hidden_CH.to(cast(Tensor, self.head.weight).dtype)).squeeze(-1).float()

    def score(self, groups: Sequence[Group]) -> Tensor:
        """[C] rewards without gradient and without dropout; see ``Reward``."""
        return torch.tensor([value for values in self.scores(groups) for value in values])

    def scores(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """As ``score``, one tuple per group."""

        def of_batch(batch: Sequence[Group]) -> list[tuple[float, ...]]:
            rewards = iter(self.rewards(batch).tolist())
            return [tuple(next(rewards) for _ in group.completions) for group in batch]

        with self.active(), self.autocast():
            return in_batches(of_batch, self.model, groups, batch_size=self.batch_size)

    # --- elsewhere --------------------------------------------------------------------------------------------------

    @cached_property
    def why_no_classifier(self) -> str | None:
        """Why transformers has no model for sequence classification that computes this reward; None if it has one."""
        with self.active(), self.autocast():
            return why_no_classifier(self.model, cast(Tensor, self.head.weight).shape[1], self.pad_token_id)

    def as_reward_func(self, tokenization: Tokenization) -> Callable[..., list[float]]:
        """A function for ``reward_funcs`` of TRL's trainers; see ``reward_func``."""
        return reward_func(self, tokenization, "explicit_reward")

    # --- on disk ----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, **facts: Any) -> None:
        """Write what ``AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)`` loads.

        With an adapter: the adapter, with the head in it, and the name of its base. Else a full model. Where transformers has
        no such class (``why_no_classifier``): the model or adapter for causal language modeling with the head in
        ``reward_head.safetensors``, which ``ExplicitReward.from_pretrained`` loads. ``loaded_by`` in reward.json says which.

        Args:
            facts: further entries of ``reward.json``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        why = self.why_no_classifier
        with self.active():
            if isinstance(self.model, PeftModel):
                self._save_adapter(folder)
                facts["base_fingerprint"] = fingerprint(frozen_parameters(self.model))
            elif why is None:
                self._save_classifier(folder, tokenizer)
            else:
                body = base_causal_lm(self.model)
                mend_generation_config(body)  # it is not read, and must not keep the reward from being written
                body.save_pretrained(folder)
        if why is not None:
            save_file({HEAD_NAME: cast(Tensor, self.head.weight).detach().cpu().contiguous()}, folder / _HEAD_FILE)
        tokenizer.save_pretrained(folder)
        facts |= {"loaded_by": "transformers"} if why is None else {"loaded_by": "tutelage", "why": why}
        write_json(folder / _FACTS, {"pad_token_id": self.pad_token_id, **facts})

    def _save_adapter(self, folder: Path) -> None:
        model = cast(PeftModel, self.model)
        name = str(model.active_adapter)
        state = get_peft_model_state_dict(model, adapter_name=name)
        if self.why_no_classifier is None:
            classifier_adapter_config(model).save_pretrained(str(folder))
            state[_HEAD] = cast(Tensor, self.head.weight)
        else:
            config: Any = copy.deepcopy(model.peft_config[name])
            config.inference_mode = True
            config.save_pretrained(str(folder))
        state = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}  # some share memory
        save_file(named_for_both_loaders(state), folder / _ADAPTER, metadata={"format": "pt"})

    def _save_classifier(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        body = base_causal_lm(self.model)
        # transformers reads the last token that is not padding. If EOS is the pad token, that is the one before EOS.
        # Without a pad token it scores single rows correctly and refuses batches.
        pad_token_id = None if self.pad_token_id == tokenizer.eos_token_id else self.pad_token_id
        whole = empty_classifier(body.config, pad_token_id)
        whole.base_model.load_state_dict(model_body(body).state_dict(), assign=True)
        scalar_head(whole).weight = nn.Parameter(cast(Tensor, self.head.weight).detach().to(body.dtype))
        whole.save_pretrained(folder)

    def start_from(self, folder: str | Path) -> None:
        """Load the weights of an earlier run's reward, an adapter or a whole model like this one.

        Args:
            folder: the run's, or its ``reward`` folder.

        Raises:
            UserError: there is none, it cannot be read, its base is another one, or it is of another kind or shape.
        """
        folder = Path(run_part(str(folder), "reward"))
        if (folder / _ADAPTER).exists() and (folder / _FACTS).exists():
            self._start_from_adapter(folder)
        elif (folder / "config.json").exists():
            self._start_from_whole(folder)
        else:
            raise _refuse(folder, "no reward is there.", "Give the reward folder of a run.")

    def _start_from_whole(self, folder: Path) -> None:
        if isinstance(self.model, PeftModel):
            raise _refuse(
                folder,
                "a whole model is there, and this run's reward is an adapter.",
                "Leave out --use_peft, or start from a reward with an adapter.",
            )
        earlier = ExplicitReward.from_pretrained(folder, field="init_reward_from")
        body = model_body(base_causal_lm(self.model))
        found = dict(model_body(cast(PreTrainedModel, earlier.model)).named_parameters())
        own = dict(body.named_parameters())
        if {name: p.shape for name, p in own.items()} != {name: p.shape for name, p in found.items()}:
            raise _refuse(
                folder,
                f"the reward's model has other layers than {base_causal_lm(self.model).name_or_path}.",
                "Start from a reward that was learned on the same model.",
            )
        with self.active(), torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(found[name])
            cast(Tensor, self.head.weight).copy_(cast(Tensor, earlier.head.weight))

    def _start_from_adapter(self, folder: Path) -> None:
        def refuse(problem: str, remedy: str) -> UserError:
            return _refuse(folder, problem, remedy)

        if not isinstance(self.model, PeftModel):
            raise refuse("a reward adapter needs a model with an adapter.", "Add --use_peft.")
        try:
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            config = PeftConfig.from_pretrained(str(folder))
            state = named_by_peft(load_file(folder / _ADAPTER))
            alone = folder / _HEAD_FILE
            head = load_file(alone)[HEAD_NAME] if alone.exists() else state.pop(_HEAD)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise refuse(f"the reward cannot be read: {first_line(error)}", "Copy the folder anew.") from error
        if facts.get("base_fingerprint") != fingerprint(frozen_parameters(self.model)):
            raise refuse(
                f"the reward's base differs from {base_causal_lm(self.model).name_or_path}.",
                "Start from a reward that was learned on the same base, by this version of tutelage.",
            )
        own = self.model.active_peft_config
        with self.active():
            expected = get_peft_model_state_dict(self.model)
            if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in state.items()}:
                raise refuse(
                    "the reward's adapter has another shape than the policy's.",
                    "Use the same --lora_r and --lora_target_modules.",
                )
            for name in ("peft_type", "lora_alpha", "use_rslora", "use_dora"):
                if getattr(config, name, None) != getattr(own, name, None):
                    raise refuse(
                        f"the reward's adapter has {name} {getattr(config, name, None)}, the policy's "
                        f"{getattr(own, name, None)}.",
                        f"Use the same --{name}.",
                    )
            set_peft_model_state_dict(self.model, state, adapter_name=str(self.model.active_adapter))
        with torch.no_grad():
            cast(Tensor, self.head.weight).copy_(head)

    @staticmethod
    def from_pretrained(
        folder: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        trust_remote_code: bool = False,
        layout: Layout = "padded",
        field: str = "reward",
        **options: Any,
    ) -> ExplicitReward:
        """Load a reward model: a run's ``reward`` folder, or any causal model for sequence classification with one label.

        Args:
            layout: not "auto", because its probe compares log-probs, and a reward model has none.
            field: what errors call the setting that named the folder.
            options: ``batch_size``, ``pad_token_id``, ``autocast`` of the constructor.

        Raises:
            UserError: there is none, or it has no single scalar head.
        """
        name = str(folder)
        require_exists(name, field=field)
        alone = Path(name) / _HEAD_FILE
        if alone.exists():
            language_model = load_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
            with loading("the reward's head", "Copy the folder anew.", file=str(alone), field=field):
                weight = load_file(alone)[HEAD_NAME]
                linear = nn.Linear(weight.shape[1], 1, bias=False, dtype=weight.dtype)
                linear.weight.data.copy_(weight)
            return ExplicitReward(language_model.eval(), linear, layout=layout, **options)
        remedy = "Give the reward folder of a run, or a model for sequence classification with one label."
        if find_adapter_config_file(name):
            require_base(name, field=field, trust_remote_code=trust_remote_code)
        with loading("the reward model", remedy, file=name, field=field):
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                name, num_labels=1, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
        head = scalar_head(model)
        headless_adapter = hasattr(model, "peft_config") and not isinstance(head, ModulesToSaveWrapper)
        if loaded["missing_keys"] or headless_adapter:  # transformers initializes them at random
            raise UserError(
                "this is a language model (or its adapter), not a reward model: it has no reward head.",
                remedy="Give the reward folder of a run, or a model for sequence classification with one label.",
                file=name,
                field=field,
            )
        return ExplicitReward(model.eval(), head, layout=layout, **options)


def _refuse(folder: Path, problem: str, remedy: str) -> UserError:
    return UserError(problem, remedy=remedy, file=str(folder), field="init_reward_from")


def frozen_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The base's weights under an adapter, by names that do not depend on which layers the adapter is on."""
    return [
        (name.replace(".base_layer", ""), p)
        for name, p in base_causal_lm(model).named_parameters()
        if not p.requires_grad
    ]


def scalar_head(model: PreTrainedModel) -> nn.Module:
    """The linear layer that turns a hidden state into a reward.

    Raises:
        UserError: the model has none, or there is more than one layer between its body and its reward.
    """
    heads = [child for name, child in model.named_children() if name != model.base_model_prefix]
    if len(heads) != 1 or getattr(getattr(heads[0], "weight", None), "shape", (0,))[0] != 1:
        raise UserError(
            f"{type(model).__name__} is not a body with one linear layer to one number.",
            remedy="Use a causal model for sequence classification with num_labels 1.",
            field="reward",
        )
    return heads[0]
