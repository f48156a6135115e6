"""From a demonstration to tokens: the single code path that training, sampling and scoring share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import jinja2
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from tutelage.data.demonstrations import Demonstration, Messages, Turns, holds_prompts_alone, read_prompts, read_rows
from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role

__all__ = [
    "FEATURES",
    "DataSummary",
    "Tokenization",
    "TokenizedPrompt",
    "TokenizedRow",
    "group_from_row",
    "preference_group_from_row",
    "row_of_group",
    "tokenize_dataset",
    "tokenized_prompts",
    "tokenized_rows",
]

logger = logging.getLogger(__name__)

_PROBE = "tutelage"


@dataclass
class Tokenization:
    """Makes tokens of prompts and completions, the same ones wherever they are needed.

    A prompt that is a list of messages goes through the chat template with its generation prompt; a prompt that is
    text stays as it is. The BOS token stands at the start exactly once if the tokenizer adds one by default, whether
    or not the template writes it too; a tokenizer without that habit gets no second one.

    Args:
        tokenizer: of the model.
        max_prompt_length: in tokens, BOS included.
        max_completion_length: in tokens, end-of-turn included. A longer completion is truncated to this length and
            then has no end-of-turn token, like a sample of the same length.
        on_long_prompt: ``"error"`` raises on a prompt that is too long, ``"drop"`` leaves it out; it is never
            truncated.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int = 512
    max_completion_length: int = 256
    on_long_prompt: Literal["error", "drop"] = "error"

    def __post_init__(self):
        for name in ("max_prompt_length", "max_completion_length"):
            if getattr(self, name) < 1:
                raise UserError(f"must be at least 1, not {getattr(self, name)}.", field=name)
        if self.on_long_prompt not in ("error", "drop"):
            raise UserError(f"must be 'error' or 'drop', not {self.on_long_prompt!r}.", field="on_long_prompt")

    @property
    def pad_id(self) -> int:
        """What fills a batch: the tokenizer's pad token, else EOS, which does no harm because padding is masked.

        Raises:
            UserError: the tokenizer has neither.
        """
        pad_id, eos_id = _id(self.tokenizer.pad_token_id), _id(self.tokenizer.eos_token_id)
        if pad_id is not None:
            return pad_id
        if eos_id is not None:
            return eos_id
        raise UserError("the tokenizer has neither a pad nor an EOS token.", remedy="Set tokenizer.pad_token.")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(id for id, token in added.items() if token.special) | frozenset(
            self.tokenizer.all_special_ids
        )

    def end_of_turn_id(self, conversational: bool) -> int:
        """The token that ends a completion: EOS after text, in conversations what the template ends a turn with.

        Raises:
            UserError: there is no such token, or no chat template.
        """
        return self._template_end_of_turn_id if conversational else self._eos_id

    def stop_ids(self, conversational: bool) -> frozenset[int]:
        """The tokens that end a sample: end-of-turn and EOS."""
        eos_id = _id(self.tokenizer.eos_token_id)
        return frozenset({self.end_of_turn_id(conversational)} | ({eos_id} if eos_id is not None else set()))

    def prompt_ids(self, prompt: str | Messages) -> tuple[int, ...]:
        """The tokens of a prompt, exactly as the sampler sees them; of any length.

        Raises:
            UserError: a conversation, and the tokenizer has no chat template or the template refuses it.
        """
        return self._encode_start(self._render_prompt(prompt), is_text=isinstance(prompt, str))

    def short_prompt_ids(self, prompt: str | Messages) -> tuple[int, ...] | None:
        """``prompt_ids``; None if the prompt is too long and such rows are to be dropped.

        Raises:
            UserError: the prompt is too long and such rows are an error; or as ``prompt_ids``.
        """
        prompt_ids = self.prompt_ids(prompt)
        if len(prompt_ids) <= self.max_prompt_length:
            return prompt_ids
        if self.on_long_prompt == "drop":
            return None
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, the limit is {self.max_prompt_length}.",
            remedy="Raise --max_prompt_length, or leave such rows out with --on_long_prompt drop.",
        )

    def completion(self, prompt: str | Messages, text: str, role: Role) -> Completion:
        """The tokens of ``text`` as the answer to ``prompt``, finished or truncated.

        They are what follows the prompt's tokens in the tokens of prompt and answer together. Where the tokenizer
        merges the end of the prompt with the start of the answer there is no such place, and what the template puts
        after the prompt is tokenized alone. Where a template rewrites the prompt once the answer is there, it is
        ``text`` itself that is tokenized alone. The end-of-turn token stands at the end exactly once, whatever the
        template writes and whether or not ``text`` ends with it.

        Other special tokens spelled out in ``text`` are parsed as the tokenizer does.

        Raises:
            UserError: a token that ends a turn stands in the middle of ``text``; ``text`` is nothing but such tokens;
                or as ``prompt_ids``.
        """
        is_text = isinstance(prompt, str)
        end_of_turn = self.end_of_turn_id(not is_text)
        text = self._without_end(text, self.stop_ids(not is_text))
        prompt_text = self._render_prompt(prompt)
        joint_text = prompt_text + text if is_text else self._render([*prompt, _assistant(text)])
        prompt_ids = self._encode_start(prompt_text, is_text=is_text)
        joint_ids = self._encode_start(joint_text, is_text=is_text)
        if not joint_text.startswith(prompt_text):
            token_ids = self._encode(text)
        elif joint_ids[: len(prompt_ids)] == prompt_ids:
            token_ids = joint_ids[len(prompt_ids) :]
        else:
            token_ids = self._encode(joint_text[len(prompt_text) :])
        if end_of_turn in token_ids:
            token_ids = token_ids[: token_ids.index(end_of_turn)]
        token_ids = (*token_ids, end_of_turn)
        finished = len(token_ids) <= self.max_completion_length
        return Completion(token_ids[: self.max_completion_length], role, finished)

    def text(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some tokens."""
        text = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def group(self, demonstration: Demonstration, *, source: str | None = None) -> Group | None:
        """The prompt with the demonstration; None if the prompt is too long and such rows are to be dropped.

        Raises:
            UserError: names ``source`` and the row. A prompt that is too long; or as ``completion``.
        """
        try:
            prompt_ids = self.short_prompt_ids(demonstration.prompt)
            if prompt_ids is None:
                return None
            completion = self.completion(demonstration.prompt, demonstration.completion, Role.DEMONSTRATION)
        except UserError as error:
            raise _located(error, source, demonstration.number) from error
        return Group(prompt_ids, (completion,), row=demonstration.row)

    def preference_group(self, demonstration: Demonstration, *, source: str | None = None) -> Group | None:
        """The prompt with the preferred and the rejected answer.

        None if there is no rejected one, if both are the same after truncation, or as in ``group``.

        Raises:
            UserError: as ``group``.
        """
        group = self.group(demonstration, source=source)
        return None if group is None else self.pair(group, demonstration, source=source)

    def pair(self, group: Group, demonstration: Demonstration, *, source: str | None = None) -> Group | None:
        """``preference_group`` of a demonstration whose ``group`` is known."""
        if demonstration.rejected is None:
            return None
        try:
            rejected = self.completion(demonstration.prompt, demonstration.rejected, Role.REJECTED)
        except UserError as error:
            raise _located(error, source, demonstration.number) from error
        (demonstrated,) = group.completions
        if rejected.token_ids == demonstrated.token_ids:
            return None
        preferred = Completion(demonstrated.token_ids, Role.PREFERRED, demonstrated.finished)
        return Group(group.prompt_ids, (preferred, rejected), row=group.row)

    def _render_prompt(self, prompt: str | Messages) -> str:
        return prompt if isinstance(prompt, str) else self._render(prompt, add_generation_prompt=True)

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            raise UserError(
                "the data holds conversations, but the tokenizer has no chat template.",
                remedy="Use a model whose tokenizer has one, or give the data as text in 'prompt' and 'completion'.",
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses the conversation: {error}.") from error
        assert isinstance(rendered, str)
        return rendered

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _encode_start(self, text: str, *, is_text: bool) -> tuple[int, ...]:
        """Tokens of a text that starts the sequence: special tokens before it, BOS at most once, nothing after it."""
        token_ids = self._encode(text)
        bos = self.tokenizer.bos_token_id
        if is_text:
            token_ids = self._prefix_ids + token_ids
        elif bos in self._prefix_ids:
            token_ids = (bos, *token_ids)
        while bos is not None and token_ids[:2] == (bos, bos):
            token_ids = token_ids[1:]
        return token_ids

    @cached_property
    def _prefix_ids(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text by default; what it puts after, such as EOS, is not wanted."""
        bare = self._encode(_PROBE)
        full = tuple(self.tokenizer(_PROBE)["input_ids"])
        start = next(start for start in range(len(full)) if full[start : start + len(bare)] == bare)
        return full[:start]

    @cached_property
    def _template_end_of_turn_id(self) -> int:
        rendered = self._render([{"role": "user", "content": "?"}, _assistant(_PROBE)])
        after = self._encode(rendered.rpartition(_PROBE)[2])
        special = [token_id for token_id in after if token_id in self.special_ids]
        return special[0] if special else self._eos_id

    @property
    def _eos_id(self) -> int:
        eos_id = _id(self.tokenizer.eos_token_id)
        if eos_id is None:
            raise UserError(
                "the tokenizer has no EOS token, so nothing can end a completion.", remedy="Set tokenizer.eos_token."
            )
        return eos_id

    def _without_end(self, text: str, stop_ids: frozenset[int]) -> str:
        stops = tuple(self.tokenizer.convert_ids_to_tokens(sorted(stop_ids)))
        while (stripped := text.rstrip()).endswith(stops):
            stop = next(stop for stop in stops if stripped.endswith(stop))
            text = stripped.removesuffix(stop)
        if not text.strip():
            raise UserError("the answer consists only of end-of-turn tokens.", remedy="Leave the row out.")
        for stop in stops:
            if stop in text:
                raise UserError(
                    f"{stop} is an end-of-turn token in the middle of the answer.",
                    remedy="Split the row into turns or take the token out.",
                )
        return text


def _id(token_id: Any) -> int | None:
    return token_id  # transformers types these attributes as nearly anything


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _located(error: UserError, source: str | None, number: int) -> UserError:
    return UserError(error.problem, remedy=error.remedy, file=source, row=number, field=error.field)


@dataclass
class DataSummary:
    """What became of the rows of a dataset, counted while they were tokenized.

    Attributes:
        rows: rows read.
        demonstrations: demonstrations kept.
        pairs: how many of them can be compared with a rejected answer.
        truncated: how many of them were truncated at the length limit.
        empty: rows left out because the last turn of a dialogue in text is empty.
        long_prompts: demonstrations left out because their prompt is too long.
    """

    rows: int = 0
    demonstrations: int = 0
    pairs: int = 0
    truncated: int = 0
    empty: int = 0
    long_prompts: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """Why something was left out, and how often; empty if nothing was."""
        reasons = {"empty last turn of a dialogue": self.empty, "prompt too long": self.long_prompts}
        return {reason: count for reason, count in reasons.items() if count}


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A demonstration as it was read and as tokens.

    Attributes:
        demonstration: as it was read, with the row's other columns.
        group: its prompt and the demonstration.
        pair: the prompt with the preferred and the rejected answer, if the row has both and they differ.
    """

    demonstration: Demonstration
    group: Group
    pair: Group | None


def tokenized_rows(
    dataset: Dataset | IterableDataset,
    tokenization: Tokenization,
    *,
    turns: Turns = "last",
    source: str = "dataset",
    summary: DataSummary | None = None,
) -> Iterator[TokenizedRow]:
    """Read and tokenize a dataset's demonstrations one by one; the way from rows to groups that everything takes.

    Args:
        dataset: of a recognized format, map-style or streamed.
        turns: as in ``read_row``.
        source: file or dataset, for messages to people.
        summary: is counted up as rows are read.

    Yields:
        every demonstration that remains: those with a prompt that is too long are left out or raise, as ``tokenization`` says.

    Raises:
        UserError: as ``read_rows`` and ``Tokenization.group`` for the first bad row.
    """
    summary = DataSummary() if summary is None else summary
    for demonstrations in read_rows(dataset, turns=turns, source=source):
        summary.rows += 1
        summary.empty += not demonstrations
        for demonstration in demonstrations:
            group = tokenization.group(demonstration, source=source)
            if group is None:
                summary.long_prompts += 1
                continue
            pair = tokenization.pair(group, demonstration, source=source)
            summary.demonstrations += 1
            summary.pairs += pair is not None
            summary.truncated += not group.completions[0].finished
            yield TokenizedRow(demonstration, group, pair)


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt to sample from.

    Attributes:
        group: the prompt, with the demonstration that the data give, if they give one.
        conversational: whether it is a list of messages.
    """

    group: Group
    conversational: bool


def tokenized_prompts(
    dataset: Dataset | IterableDataset, tokenization: Tokenization, *, source: str = "dataset"
) -> Iterator[TokenizedPrompt]:
    """The prompts of a dataset of a recognized format, or of one that holds a ``prompt`` column and no answers.

    Raises:
        UserError: as ``tokenized_rows``; or a prompt is no text and no list of messages.
    """
    if not holds_prompts_alone(dataset):
        for row in tokenized_rows(dataset, tokenization, source=source):
            yield TokenizedPrompt(row.group, row.demonstration.conversational)
        return
    for number, prompt in enumerate(read_prompts(dataset, source=source), start=1):
        try:
            prompt_ids = tokenization.short_prompt_ids(prompt)
        except UserError as error:
            raise UserError(error.problem, remedy=error.remedy, file=source, row=number, field="prompt") from error
        if prompt_ids is not None:
            yield TokenizedPrompt(Group(prompt_ids, row=number - 1), isinstance(prompt, list))


FEATURES = Features(  # of what is tokenized; without a demonstration its tokens are an empty list
    {
        "row": Value("int64"),
        "prompt_ids": List(Value("int32")),
        "demonstration_ids": List(Value("int32")),
        "demonstration_finished": Value("bool"),
        "rejected_ids": List(Value("int32")),
        "rejected_finished": Value("bool"),
    }
)


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenization: Tokenization,
    *,
    turns: Turns = "last",
    source: str = "dataset",
    summary: DataSummary | None = None,
) -> Dataset | IterableDataset:
    """The tokens of every demonstration, and of the rejected answer where there is one.

    Columns of the result: ``row``; ``prompt_ids``, ``demonstration_ids`` and ``rejected_ids``, lists of tokens, the
    last one empty without a rejected answer; ``demonstration_finished`` and ``rejected_finished``. ``group_from_row`` and
    ``preference_group_from_row`` read them. No data is cached on disk.

    Args:
        dataset: of a recognized format; streamed data is read lazily, other data entirely, now.
        tokenization: how.
        turns: as in ``read_row``.
        source: file or dataset, for messages to people.
        summary: is counted up; of streamed data, while it is read.

    Raises:
        UserError: as ``read_rows`` and ``Tokenization.group`` for the first bad row; or nothing remains.
    """
    arguments = {
        "dataset": dataset,
        "tokenization": tokenization,
        "turns": turns,
        "source": source,
        "summary": summary or DataSummary(),
    }
    if isinstance(dataset, IterableDataset):
        # One generator, hence one shard: numbering rows in shards would give two rows the same number.
        return IterableDataset.from_generator(_columns, features=FEATURES, gen_kwargs=arguments)
    rows = _columns(**arguments)
    chunks = iter(lambda: list(islice(rows, 1000)), [])  # Python's lists of tokens are large: not all at once
    tokenized = concatenate_datasets([Dataset.from_list(chunk, features=FEATURES) for chunk in chunks])
    for reason, count in arguments["summary"].dropped.items():
        logger.warning("%s: left out %d of %d: %s", source, count, arguments["summary"].rows, reason)
    return tokenized


def _columns(
    dataset: Dataset | IterableDataset, tokenization: Tokenization, turns: Turns, source: str, summary: DataSummary
) -> Iterator[dict[str, Any]]:
    any_left = False
    for row in tokenized_rows(dataset, tokenization, turns=turns, source=source, summary=summary):
        any_left = True
        yield row_of_group(row.group, row.pair)
    if not any_left:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in summary.dropped.items())
        raise UserError(
            f"no demonstration remains: {reasons}.",
            remedy="Look at the data or raise --max_prompt_length.",
            file=source,
        )


def row_of_group(group: Group, pair: Group | None = None) -> dict[str, Any]:
    """The columns of a prompt with its demonstration, if it has one, and with its rejected answer, if it has one."""
    demonstration = group.completions[0] if group.completions else None
    rejected = pair.completions[1] if pair else None
    return {
        "row": group.row,
        "prompt_ids": list(group.prompt_ids),
        "demonstration_ids": list(demonstration.token_ids) if demonstration else [],
        "demonstration_finished": demonstration.finished if demonstration else False,
        "rejected_ids": list(rejected.token_ids) if rejected else [],
        "rejected_finished": rejected.finished if rejected else False,
    }


def group_from_row(row: Mapping[str, Any]) -> Group:
    """The prompt with its demonstration, if it has one, from a row of ``tokenize_dataset`` or ``tokenize_prompts``."""
    if not row["demonstration_ids"]:
        return Group(tuple(row["prompt_ids"]), row=row["row"])
    demonstration = Completion(tuple(row["demonstration_ids"]), Role.DEMONSTRATION, row["demonstration_finished"])
    return Group(tuple(row["prompt_ids"]), (demonstration,), row=row["row"])


def preference_group_from_row(row: Mapping[str, Any]) -> Group | None:
    """The prompt with its preferred and rejected answer, from a row of ``tokenize_dataset``; None without a pair."""
    if not row["rejected_ids"]:
        return None
    preferred = Completion(tuple(row["demonstration_ids"]), Role.PREFERRED, row["demonstration_finished"])
    rejected = Completion(tuple(row["rejected_ids"]), Role.REJECTED, row["rejected_finished"])
    return Group(tuple(row["prompt_ids"]), (preferred, rejected), row=row["row"])
