"""From a demonstration to tokens: the single code path that training, sampling and scoring share."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from tutelage.data.demonstrations import Columns, Demonstration, Messages
from tutelage.data.teacher_prompt import TeacherPrompt
from tutelage.data.templates import ChatTemplate, Rendered, asks_for_time
from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role

__all__ = ["Tokenization"]

_PROBE = "tutelage"

_ANCHORS = ("\n", ".", "a", "1", ")")
"""Texts after which a completion may be tokenized as what goes on, not as what begins."""


@dataclass
class Tokenization:
    """Makes tokens of prompts and completions, the same ones wherever they are needed.

    A prompt that is a list of messages goes through the chat template with its generation prompt; a prompt that is
    text stays as it is. The BOS token stands at the start exactly once if the tokenizer adds one by default, whether
    or not the template writes it too; a tokenizer without that habit gets no second one.

    What the template makes of a row is held against the row, and the tokens against the text that they are of: what
    would be learned is what the row says, or an error.

    Args:
        tokenizer: of the model.
        max_prompt_length: in tokens, BOS included.
        max_completion_length: in tokens, end-of-turn included. A longer completion is truncated to this length and
            then has no end-of-turn token, like a sample of the same length.
        on_long_prompt: ``"error"`` raises on a prompt that is too long, ``"drop"`` leaves it out; it is never
            truncated.
        model_end_ids: the tokens that end the model's text by its own generation config.
        columns: those of the data that the user named.
        now: the time that a template is told if it asks; a run keeps its own, so that its prompts stay the same.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int = 512
    max_completion_length: int = 256
    on_long_prompt: Literal["error", "drop"] = "error"
    model_end_ids: frozenset[int] = frozenset()
    columns: Columns = field(default_factory=Columns)
    now: datetime = field(default_factory=datetime.now, compare=False)

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
            UserError: there is no such token, or no chat template, or it leaves the answer out.
        """
        if conversational and self._written_end_id is not None:
            return self._written_end_id
        return self._eos_id

    def end_ids(self, conversational: bool) -> tuple[int, ...]:
        """The tokens that end a sample: first end-of-turn, then EOS, then those of the model's generation config.

        Whoever generates with what was trained has to stop at them.

        Raises:
            UserError: as ``end_of_turn_id``.
        """
        eos_id = _id(self.tokenizer.eos_token_id)
        known = (self.end_of_turn_id(conversational), eos_id, *sorted(self.model_end_ids))
        return tuple(dict.fromkeys(token_id for token_id in known if token_id is not None))

    def stop_ids(self, conversational: bool) -> frozenset[int]:
        """``end_ids`` as a set."""
        return frozenset(self.end_ids(conversational))

    @property
    def asks_for_time(self) -> bool:
        """Whether the chat template reads the clock: what it writes then depends on ``now``."""
        templates = self.tokenizer.chat_template
        return asks_for_time(str(templates)) if templates else False

    def prompt_ids(self, prompt: str | Messages) -> tuple[int, ...]:
        """The tokens of a prompt, exactly as the sampler sees them; of any length.

        Raises:
            UserError: a conversation, and the tokenizer has no chat template, or the template refuses it or makes
                something else of it; or the tokens do not decode to the text.
        """
        is_text = isinstance(prompt, str)
        text = prompt if isinstance(prompt, str) else self._template.prompt(prompt)
        token_ids = self._encode_start(text, is_text=is_text)
        self._check_decodes(token_ids, text, "prompt")
        return token_ids

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
        after the prompt is tokenized by itself, so that both decode to the text. Where a template rewrites the prompt
        once the answer is there, it is ``text`` itself that is tokenized. The end-of-turn token stands at the end
        exactly once, whatever the template writes and whether or not ``text`` ends with it.

        Other special tokens spelled out in ``text`` are parsed as the tokenizer does.

        Raises:
            UserError: a token that ends a turn stands in the middle of ``text``; ``text`` is nothing but such tokens;
                the template makes something else of it; the tokens do not decode to the text; or as ``prompt_ids``.
        """
        is_text = isinstance(prompt, str)
        end_of_turn = self.end_of_turn_id(not is_text)
        text = self._without_end(text, not is_text)
        rendered = Rendered(prompt, text) if isinstance(prompt, str) else self._answered(prompt, text)
        token_ids = self._following(rendered, is_text=is_text)
        if end_of_turn in token_ids:  # the tokenizer may read one where none is written
            raise UserError("the tokenizer reads an end-of-turn token in the middle of the answer.", remedy=_TAKE_OUT)
        self._check_decodes(token_ids, rendered.completion, "answer")
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

    def teacher_prompt_ids(
        self, demonstration: Demonstration, seen: TeacherPrompt, *, source: str | None = None
    ) -> tuple[int, ...] | None:
        """The tokens of the prompt that a teacher sees; None if it is too long and such rows are to be dropped.

        Raises:
            UserError: names ``source`` and the row. A prompt that is too long; or as ``prompt_ids``.
        """
        conversational = not isinstance(demonstration.prompt, str)
        try:
            answer = self._without_end(demonstration.completion, conversational)
            prompt_ids = self.prompt_ids(seen.of(demonstration.prompt, answer))
            if len(prompt_ids) > seen.max_length and self.on_long_prompt == "error":
                raise UserError(
                    f"the prompt that the teacher sees has {len(prompt_ids)} tokens, the limit is {seen.max_length}.",
                    remedy="Raise --max_teacher_prompt_length, or leave such rows out with --on_long_prompt drop.",
                )
        except UserError as error:
            raise _located(error, source, demonstration.number) from error
        return prompt_ids if len(prompt_ids) <= seen.max_length else None

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

    # --- templates -------------------------------------------------------------------------------------------------------

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.now)

    @cached_property
    def _written_end_id(self) -> int | None:
        """The first special token that the template writes after an answer; None if it writes none."""
        after = self._encode(self._template.end)
        return next((token_id for token_id in after if token_id in self.special_ids), None)

    def _answered(self, prompt: Messages, text: str) -> Rendered:
        end_id = self._written_end_id
        end = None if end_id is None else self._spelled(end_id)
        return self._template.answered(prompt, text, end)

    @property
    def _eos_id(self) -> int:
        eos_id = _id(self.tokenizer.eos_token_id)
        if eos_id is None:
            raise UserError(
                "the tokenizer has no EOS token, so nothing can end a completion.", remedy="Set tokenizer.eos_token."
            )
        return eos_id

    def _without_end(self, text: str, conversational: bool) -> str:
        ends = (*self.end_ids(conversational)[:2], *(self.model_end_ids & self.special_ids))
        stops = tuple(dict.fromkeys(self._spelled(end) for end in ends if end < len(self.tokenizer)))
        while (stripped := text.rstrip()).endswith(stops):
            stop = next(stop for stop in stops if stripped.endswith(stop))
            text = stripped.removesuffix(stop)
        if not text.strip():
            raise UserError("the answer consists only of end-of-turn tokens.", remedy="Leave the row out.")
        for stop in stops:
            if stop in text:
                raise UserError(f"{stop} is an end-of-turn token in the middle of the answer.", remedy=_TAKE_OUT)
        return text

    def _spelled(self, token_id: int) -> str:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        assert isinstance(token, str)
        return token

    # --- tokens ----------------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = "the text is no Unicode text: it holds half of a surrogate pair."
            raise UserError(problem, remedy="Take it out.") from error
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

    def _following(self, rendered: Rendered, *, is_text: bool) -> tuple[int, ...]:
        """The tokens of the completion, which after those of the prompt decode to the text of both.

        A text tokenized by itself may begin otherwise than inside another: SentencePiece puts a space before it.

        Raises:
            UserError: no tokens do.
        """
        prompt_ids = self._encode_start(rendered.prompt, is_text=is_text)
        joint_ids = self._encode_start(rendered.prompt + rendered.completion, is_text=is_text)
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            return joint_ids[len(prompt_ids) :]
        wanted = self.text(joint_ids, skip_special_tokens=False)
        for anchor in ("", *_ANCHORS):
            before, token_ids = self._encode(anchor), self._encode(anchor + rendered.completion)
            found = token_ids[len(before) :]
            if (
                token_ids[: len(before)] == before
                and self.text((*prompt_ids, *found), skip_special_tokens=False) == wanted
            ):
                return found
        raise UserError(
            "the tokens of prompt and answer do not decode to the text of both: the tokenizer writes something between "
            "them.",
            remedy="Let the answer begin with a space, or the prompt end with a line break.",
        )

    def _check_decodes(self, token_ids: Sequence[int], text: str, what: str) -> None:
        """Raise ``UserError`` for tokens that lose more of the text than the tokenizer's own spelling of it."""
        found = self.text(token_ids, skip_special_tokens=False)
        if text in found or _bare(text) in _bare(found):
            return
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        bos = self.tokenizer.bos_token
        wanted = text.replace(bos, "") if isinstance(bos, str) else text
        found = found.replace(bos, "") if isinstance(bos, str) else found
        if normalizer is not None:
            wanted = normalizer.normalize_str(wanted)
        if _bare(wanted) not in _bare(found):
            lost = "".join(dict.fromkeys(char for char in _bare(wanted) if char not in _bare(found)))[:20]
            raise UserError(
                f"the tokens of the {what} do not decode to its text: "
                f"{f'the tokenizer has none for {lost!r}.' if lost else 'some of it is lost.'}",
                remedy="Leave the row out, or use a tokenizer that can write it.",
            )


_TAKE_OUT = "Split the row into turns or take the token out."


def _bare(text: str) -> str:
    """A text without what tokenizers spell in their own way: white space, case, forms of a character."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(folded.replace("\u2581", " ").split())


def _id(token_id: Any) -> int | None:
    return token_id  # transformers types these attributes as nearly anything


def _located(error: UserError, source: str | None, number: int) -> UserError:
    return UserError(error.problem, remedy=error.remedy, file=source, row=number, field=error.field)
