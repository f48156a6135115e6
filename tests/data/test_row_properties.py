"""Rows, files, templates and settings of any kind: what comes out is what went in, or one error that a user can read.

``HYPOTHESIS_PROFILE=long`` tries ten times as many cases: 200,000 instead of 20,000.
"""

from __future__ import annotations

import copy
import json
import os
import random
import string
from functools import cache
from pathlib import Path

import jinja2
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tutelage.data import Columns, Tokenization, read_rows
from tutelage.data.columns import Peek
from tutelage.data.demonstrations import holds_prompts_alone, read_prompts
from tutelage.data.readers import read_file
from tutelage.data.tables import table_of
from tutelage.data.tokenized import DataSummary, tokenized_prompts, tokenized_rows
from tutelage.errors import UserError
from tutelage.groups import Role
from tutelage.testing.tokenizers import tiny_tokenizer

_COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
    "phases": (Phase.generate, Phase.shrink),
}
settings.register_profile("short", max_examples=4_000, derandomize=True, **_COMMON)  # five tests: 20,000 cases
settings.register_profile("long", max_examples=40_000, **_COMMON)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

pytestmark = pytest.mark.timeout(3600)

WORDS = (
    "a",
    "7",
    "Yes.",
    "user",
    "assistant",
    "the answer",
    "3 + 4?",
    "naïve 🦊",
    "e\u0301",
    "{{ 1 }}",
    "[/]",
)
ODD = (
    "",
    " ",
    "\n",
    "\u2028",
    "<think>",
    "</think>",
    "</s>",
    "<|im_end|>",
    "<s>",
    "\x00",
    "\x1b[2J",
    "\ud83d",
    "tutelage0000text",
)

# Values come from pools: drawing each word by itself would take longer than what is tested.
LONG = PROFILE.max_examples > 4_000
CHANCE = random.Random(0)


def pool(make, size=300):
    return st.sampled_from([make() for _ in range(size * 10 if LONG else size)])


def some_text():
    return " ".join(CHANCE.choices(WORDS, k=CHANCE.randint(1, 4)))


def some_odd_text():
    return "".join(CHANCE.choices(WORDS + ODD, k=CHANCE.randint(0, 4)))


text, odd_text = pool(some_text), pool(some_odd_text)

# -- rows -----------------------------------------------------------------------------------------------------------------


def some_talk(last=None):
    """A conversation in order; it ends with whoever is asked for."""
    turns = CHANCE.randint(1, 5)
    if last is not None:
        turns += (turns % 2 == 0) if last == "user" else (turns % 2)
    messages = [{"role": ("user", "assistant")[i % 2], "content": some_text()} for i in range(turns)]
    return [{"role": "system", "content": some_text()}, *messages] if CHANCE.random() < 0.3 else messages


def some_odd_message():
    if CHANCE.random() < 0.4:
        return {"from": CHANCE.choice(("human", "gpt", "tool", None)), "value": some_odd_text()}
    keys = ("role", "content", "tool_calls", "reasoning_content", "weight", "name", "from")
    values = (None, "", "x", [], [1], {}, 0, 1, False, ["a"], {"type": "text"})
    role = CHANCE.choice(("system", "user", "assistant"))
    return {"role": role, "content": some_text(), CHANCE.choice(keys): CHANCE.choice(values)}


def some_cell():
    return CHANCE.choice(
        (
            some_text,
            some_text,
            some_talk,
            lambda: some_talk("assistant"),
            lambda: some_talk("user"),
            some_odd_text,
            lambda: [some_odd_message() for _ in range(CHANCE.randint(0, 3))],
            lambda: CHANCE.choice((json.dumps, str))(some_talk()),
            lambda: [[some_text(), some_text()] for _ in range(CHANCE.randint(0, 2))],
            lambda: CHANCE.choice(SIMPLE),
        )
    )()


SIMPLE = (
    None, True, False, 0, 1, 2.5, 2**70, -1, float("nan"), [], {}, [None], [[]], {"a": 1}, "true", "false",
)  # fmt: skip
talk, cell = pool(lambda: some_talk("user")), pool(some_cell, 600)
NAMES = (
    ("prompt", "completion"), ("prompt", "chosen", "rejected"), ("real", "generated"), ("chosen", "rejected"),
    ("messages",), ("conversations",), ("instruction", "output"), ("question", "answer"), ("prompt",), ("other", "x"),
)  # fmt: skip
EXTRA = (
    "system", "system_prompt", "history", "label", "kto_tag", "tools", "images", "context", "input", "id", "answer",
    "prompt", "messages", "",
)  # fmt: skip


@st.composite
def some_rows(draw):
    """One to three rows of mostly the same columns, and what they hold."""
    names = (*draw(st.sampled_from(NAMES)), *draw(st.lists(st.sampled_from(EXTRA), max_size=2)))
    rows = [{name: draw(cell) for name in names} for _ in range(draw(st.integers(1, 3)))]
    if draw(st.integers(0, 9)) == 0:
        rows[-1].pop(names[0])
    return rows


named = st.builds(
    lambda prompt, completion, messages: (prompt, completion, None) if messages is None else (None, None, messages),
    st.sampled_from((None, None, "prompt", "other", "question")),
    st.sampled_from((None, None, "x", "answer")),
    st.sampled_from((None, None, None, "messages", "other")),
).map(lambda names: Columns(*names))


def _is_clear(error, file, count, *, said=""):
    """The error names the file and, if it is about one, a row that is there."""
    assert error.file == file
    assert error.row is None or 1 <= error.row <= count
    assert said in error.problem


def words_of(value):
    """All texts in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from words_of(each)
    elif isinstance(value, list):
        for each in value:
            yield from words_of(each)


@settings(PROFILE)
@given(rows=some_rows(), columns=named, turns=st.sampled_from(("last", "all")), stored=st.booleans())
def test_rows_of_any_kind(rows, columns, turns, stored):
    assume(any(rows))
    dataset = table_of(rows) if stored else Peek(rows)
    try:
        if holds_prompts_alone(dataset, columns):
            prompts = list(read_prompts(dataset, source="x", columns=columns))
            assert len(prompts) == len(rows)
            found = [[(prompt, None)] for prompt in prompts]
        else:
            found = [
                [(each.prompt, each.completion) for each in row]
                for row in read_rows(dataset, source="x", columns=columns, turns=turns)
            ]
    except UserError as refused:
        _is_clear(refused, "x", len(rows))
        return
    assert len(found) == len(rows)
    assert len({isinstance(prompt, list) for row in found for prompt, _ in row}) <= 1
    for row, demonstrations in zip(rows, found, strict=True):
        given_texts = list(words_of(row))
        for prompt, completion in demonstrations:
            assert completion is None or any(completion in each for each in given_texts)
            if isinstance(prompt, str):
                assert any(part in each for part in prompt.split("\n\n") for each in given_texts)
                continue
            talk = prompt[prompt[0]["role"] == "system" :]
            assert [message["role"] for message in talk] == ["user", "assistant"] * (len(talk) // 2) + ["user"]
            for message in prompt:
                assert message.keys() == {"role", "content"}
                assert any(part in each for part in message["content"].split("\n\n") for each in given_texts)


# -- files ----------------------------------------------------------------------------------------------------------------

JSON = (
    None, True, 0, 42, -(2**63), 2**64, 1.5, 1e300, "42", "null", "0042", "NA", "", "\ud83d", "🦊", "\u2028",
)  # fmt: skip


def some_value(depth=0):
    kind = CHANCE.random() + 0.2 * depth
    if kind < 0.15:
        return [some_value(depth + 1) for _ in range(CHANCE.randint(0, 3))]
    if kind < 0.3:
        return {name: some_value(depth + 1) for name in CHANCE.sample(("a", "b", ""), CHANCE.randint(0, 2))}
    return CHANCE.choice(JSON)


def some_object():
    return {name: some_value() for name in CHANCE.sample(("prompt", "x", "y", "é"), CHANCE.randint(0, 3))}


json_rows = st.lists(pool(some_object), min_size=1, max_size=4)
DAMAGE = (
    b"",
    b"",
    b"",
    b"\xff",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"]",
    b",",
    b'"',
    b"\n",
    b"\r",
    b"\x00",
    b" ",
    b"NaN",
    b"\\",
    b"9" * 20,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def as_python_reads(content: bytes, kind: str):
    """The rows of a file by Python's own module; None where it has none."""
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
        rows = json.loads(text) if kind == "json" else [json.loads(line) for line in text.rstrip().split("\n")]
    except ValueError:
        return None
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else None


@settings(PROFILE)
@given(
    rows=json_rows, kind=st.sampled_from(("json", "jsonl")), damage=st.sampled_from(DAMAGE), place=st.integers(0, 200)
)
def test_files_of_any_kind(folder, rows, kind, damage, place):
    content = (json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)).encode()
    content = content[: place % (len(content) + 1)] + damage + content[place % (len(content) + 1) :]
    path = Path(folder) / f"data.{kind}"
    path.write_bytes(content)
    wanted = as_python_reads(content, kind)
    try:
        found = list(read_file(path))
    except UserError as refused:
        _is_clear(refused, str(path), len(rows) + 2, said="" if wanted is None else "stands twice")
        return
    assert json.dumps(found) == json.dumps(wanted)
    if any(found):
        stored = list(table_of(found))
        names = {name for row in found for name in row}
        assert json.dumps(stored, sort_keys=True) == json.dumps(
            [{name: row.get(name) for name in names} for row in found], sort_keys=True
        )


# -- templates --------------------------------------------------------------------------------------------------------------

CONTENT = {
    "m.content": True, "m.content | trim": True, "(m.content)": True,
    "m.content | upper": False, "m.content[:3]": False, "''": False, "m.content * 2": False, "m.content | tojson": False,
    "messages[0].content": False, "(m.content.split('</think>')[-1])": True,
}  # fmt: skip
LOOPS = {
    "messages": True, "messages[-2:]": False, "messages[1:]": False, "messages[:-1]": False, "messages | reverse": False,
}  # fmt: skip
ENDS = ("<|im_end|>\n", "<|im_end|>", " <|im_end|>\n", "</s>", "\n")
ASKS = ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n", "Assistant:", "")
STARTS = (
    "",
    "{{ bos_token }}",
    "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n",
    "\n",
    "{{ raise_exception('no') }}",
)

template = st.tuples(
    st.sampled_from([*["m.content"] * 4, *CONTENT]),
    st.sampled_from([*["messages"] * 4, *LOOPS]),
    st.sampled_from(ENDS),
    st.sampled_from(ASKS),
    st.sampled_from(STARTS),
)


@cache
def source_of(parts):
    content, loop, end, ask, start = parts
    return (
        f"{start}{{% for m in {loop} %}}{{{{ '<|im_start|>' + m.role + '\n' + ({content}) }}}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{ask}{{% endif %}}"
    )


@cache
def chat_tokenizer():
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


@cache
def template_tokenization(parts):
    tokenizer = copy.copy(chat_tokenizer())
    tokenizer.chat_template = source_of(parts)
    return Tokenization(tokenizer, max_prompt_length=4096, max_completion_length=4096)


@cache
def plain_template(parts):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    now = template_tokenization(parts).now
    environment.globals["strftime_now"] = now.strftime
    return environment.from_string(source_of(parts))


def some_answer():
    said = some_text()
    return CHANCE.choice((said, said, f"<think>\n{said}\n</think>\n\n{said}", some_odd_text()))


answers = pool(some_answer)


@settings(PROFILE)
@given(parts=template, prompt=talk, answer=answers)
def test_templates_of_any_kind(parts, prompt, answer):
    content, loop, end, ask, start = parts
    tokenization = template_tokenization(parts)
    faithful = CONTENT[content] and LOOPS[loop] and "raise" not in start
    usual = all(each not in answer for each in ODD[3:]) and answer.strip()
    try:
        prompt_ids = tokenization.prompt_ids(prompt)
        completion = tokenization.completion(prompt, answer, Role.DEMONSTRATION)
    except UserError:
        assert not (faithful and usual and "<think>" not in ask), "a row that is right was refused"
        return
    before, after = (tokenization.text(ids, skip_special_tokens=False) for ids in (prompt_ids, completion.token_ids))
    said = [message["content"] for message in prompt]
    if not faithful:  # then the template happens to write this conversation as it is
        place = 0
        for each in said:
            place = before.index(each.strip(), place) + len(each.strip())
    ended = end.strip() if end.strip() else "</s>"
    assert after.endswith(ended)
    assert after.count(ended) == 1
    visible = answer.rpartition("</think>")[2].strip()
    while visible.endswith(("</s>", "<|im_end|>")):
        visible = visible.removesuffix("</s>").removesuffix("<|im_end|>").strip()
    assert visible in after.removesuffix(ended)
    opened = "<think>" in ask and not answer.lstrip().startswith("<think>")  # by the template, and not once more
    own = answer.count("<think>") + opened + sum(each.count("<think>") for each in said)
    assert (before + after).count("<think>") <= max(1, own)
    if "<think>" in ask:
        assert "</think>" in after
    if faithful and usual and ask == ASKS[0] and "</think>" not in content:
        whole = plain_template(parts).render(
            messages=[*prompt, {"role": "assistant", "content": answer}], bos_token="<s>", add_generation_prompt=False
        )
        if end == "\n":  # nothing special ends a turn: what is written after the answer belongs to it
            assert before + after == whole + "</s>"
        else:
            assert before + after == whole[: whole.rindex(ended) + len(ended)]


# -- pieces -----------------------------------------------------------------------------------------------------------------


def metaspace(**options):
    words = [
        "▁",
        *string.ascii_lowercase[:8],
        *"0123456789",
        ".",
        "?",
        "\n",
        "▁a",
        "▁b",
        "12",
        "▁1",
        "▁12",
        "ab",
        "▁ab",
    ]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words, *(f"<0x{i:02X}>" for i in range(256))])
    }
    merges = [
        ("▁", "a"),
        ("▁", "b"),
        ("1", "2"),
        ("▁", "1"),
        ("▁", "12"),
        ("▁1", "2"),
        ("a", "b"),
        ("▁", "ab"),
        ("▁a", "b"),
    ]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if options:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False, **options)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def piece_tokenizer(kind):
    if kind == "byte level with a space before":
        tokenizer = tiny_tokenizer("plain")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return tokenizer
    if kind == "letters":  # lossy: it knows a few letters, and no space
        backend = Tokenizer(
            models.WordLevel({each: i for i, each in enumerate(["<unk>", "</s>", "a", "7", "b"])}, "<unk>")
        )
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    if kind.startswith("metaspace"):
        return metaspace(**({"prepend_scheme": kind.split()[1]} if " " in kind else {}))
    return tiny_tokenizer(kind)


PIECES = (
    "plain", "llama3", "zephyr", "metaspace", "metaspace always", "metaspace first", "metaspace never",
    "byte level with a space before", "letters",
)  # fmt: skip
PARTS = ("a", "b", "ab", "1", "2", "12", " ", "  ", "\n", ".", "?", "é", "🦊", "the answer", "7")
piece = pool(lambda: "".join(CHANCE.choices(PARTS, k=CHANCE.randint(1, 5))))


@settings(PROFILE)
@given(kind=st.sampled_from(PIECES), prompt=piece, answer=piece, limit=st.integers(1, 12))
def test_pieces_decode_to_the_text(kind, prompt, answer, limit):
    assume(prompt.strip() and answer.strip())
    tokenization = Tokenization(piece_tokenizer(kind), max_completion_length=limit)
    whole = Tokenization(piece_tokenizer(kind), max_completion_length=999)
    try:
        prompt_ids = whole.prompt_ids(prompt)
        completion = whole.completion(prompt, answer, Role.DEMONSTRATION)
    except UserError:
        assert kind == "letters", "a text that can be written was refused"
        return
    found = whole.text((*prompt_ids, *completion.token_ids))
    if kind != "letters":
        expected = prompt + answer
        if kind.startswith(("metaspace", "byte")):  # its own spelling: spaces before the text
            expected, found = expected.lstrip(" "), found.lstrip(" ")
        assert found == expected
    cut = tokenization.completion(prompt, answer, Role.DEMONSTRATION)
    assert cut.token_ids == completion.token_ids[:limit]
    assert cut.finished == (len(completion.token_ids) <= limit)
    assert completion.token_ids[-1] == whole.end_of_turn_id(False)


# -- settings ---------------------------------------------------------------------------------------------------------------


def some_good_row():
    a, b, c = some_text(), some_text(), some_text()
    return CHANCE.choice(
        (
            {"prompt": a, "completion": b, "label": CHANCE.random() < 0.5},
            {"prompt": a, "completion": b},
            {"prompt": a, "chosen": b, "rejected": c},
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]},
            {"instruction": a, "output": b, "history": [[c, a]]},
        )
    )


good_row = pool(some_good_row)


@settings(PROFILE)
@given(
    row=good_row,
    others=st.lists(text, max_size=2),
    style=st.sampled_from(("zephyr", "llama3", "gemma3", "qwen3")),
    limits=st.tuples(st.integers(-1, 60), st.integers(-1, 30)),
    on_long_prompt=st.sampled_from(("error", "drop", "drop", "drop", "cut")),
    turns=st.sampled_from(("last", "all")),
)
def test_settings_of_any_kind(row, others, style, limits, on_long_prompt, turns):
    last = list(row)[0 if "prompt" in row else -1]
    rows = [row, *({**row, last: other} if isinstance(row[last], str) else row for other in others)]
    summary = DataSummary()
    try:
        tokenization = Tokenization(tiny(style), *limits, on_long_prompt)
        found = list(tokenized_rows(table_of(rows), tokenization, turns=turns, summary=summary))
        prompts = list(tokenized_prompts(table_of(rows), tokenization))
    except UserError as refused:
        if min(limits) >= 1 and on_long_prompt != "cut":
            _is_clear(refused, "dataset", len(rows), said="the prompt has")
        return
    assert summary.rows == len(rows) == summary.demonstrations + sum(summary.dropped.values())
    assert summary.demonstrations == len(found) == len(prompts)
    ends = tokenization.stop_ids(found[0].demonstration.conversational) if found else frozenset()
    for each in found:
        (completion,) = each.group.completions
        assert len(each.group.prompt_ids) <= limits[0]
        assert len(completion.token_ids) <= limits[1]
        assert completion.finished == (completion.token_ids[-1] in ends)
        assert not ends & set(completion.token_ids[:-1])


tiny = cache(tiny_tokenizer)
