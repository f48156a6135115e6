"""What chat templates make of conversations: right, or one error."""

from __future__ import annotations

from datetime import datetime

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tutelage.data import Tokenization, read_row
from tutelage.data.templates import with_fixed_time
from tutelage.errors import UserError
from tutelage.groups import Role
from tutelage.testing.tokenizers import tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How many apples?"}
ASSISTANT = {"role": "assistant", "content": "There are 12."}
MORE = {"role": "user", "content": "And more?"}

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK


def tokenization_of(template, **settings) -> Tokenization:
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = template
    return Tokenization(tokenizer, **settings)


def shown(tokenization, prompt, answer):
    """Prompt and completion as text."""
    prompt_ids = tokenization.prompt_ids(prompt)
    completion = tokenization.completion(prompt, answer, Role.DEMONSTRATION)
    return tuple(tokenization.text(ids, skip_special_tokens=False) for ids in (prompt_ids, completion.token_ids))


# -- templates that make something else of a conversation ---------------------------------------------------------------

WRONG = {
    "drops the user": "{% for m in messages if m.role != 'user' %}" + TURN + "{% endfor %}" + ASK,
    "drops the system message": "{% for m in messages if m.role != 'system' %}" + TURN + "{% endfor %}" + ASK,
    "drops the last answer": "{% for m in messages if not (loop.last and m.role == 'assistant') %}"
    + TURN
    + "{% endfor %}"
    + ASK,
    "drops earlier answers": "{% for m in messages if loop.last or m.role != 'assistant' %}"
    + TURN
    + "{% endfor %}"
    + ASK,
    "keeps the last three messages": "{% for m in messages[-3:] %}" + TURN + "{% endfor %}" + ASK,
    "writes the question twice": "{{ messages[0].content + messages[1].content }}" + CHATML,
    "turns the conversation around": "{% for m in messages | reverse %}" + TURN + "{% endfor %}" + ASK,
    "writes in capitals": CHATML.replace("m.content", "m.content | upper"),
    "cuts long texts": CHATML.replace("m.content", "m.content[:8]"),
    "writes no content": CHATML.replace("m.content", "m.text | default('')"),
    "writes one role's content for all": CHATML.replace("m.content", "messages[-1].content"),
    "answers twice": CHATML.replace("m.content", "(m.content * 2 if m.role == 'assistant' else m.content)"),
}


@pytest.mark.parametrize("template", WRONG.values(), ids=WRONG)
def test_a_template_that_makes_something_else_of_the_row_is_an_error(template):
    tokenization = tokenization_of(template)
    (demonstration,) = read_row({"messages": [SYSTEM, USER, ASSISTANT, MORE, ASSISTANT]}, number=3)
    with pytest.raises(UserError, match=r"^data\.jsonl, row 3: .*chat template"):
        tokenization.group(demonstration, source="data.jsonl")


LOOKS_INSIDE = {
    "replaces what it does not like": CHATML.replace("m.content", "m.content | replace('12', 'twelve')"),
    "drops what follows a mark": CHATML.replace("m.content", "m.content.split('are')[0]"),
    "escapes": CHATML.replace("m.content", "m.content | tojson"),
    "repeats": CHATML.replace("m.content", "(m.content * 2 if 'apples' in m.content else m.content)"),
}


@pytest.mark.parametrize("template", LOOKS_INSIDE.values(), ids=LOOKS_INSIDE)
def test_a_template_that_changes_some_texts_is_an_error_for_rows_that_have_them(template):
    tokenization = tokenization_of(template)
    plain = [{"role": "user", "content": "Is it so? I want to know it."}]
    if "tojson" not in template:
        assert shown(tokenization, plain, "Yes.")[1] == "Yes.<|im_end|>"
    asked = [{"role": "user", "content": 'How many "apples" are there? I want 12.'}]
    with pytest.raises(UserError, match="chat template"):
        shown(tokenization, asked, 'There are "12".')


RIGHT = {
    "chatml": CHATML,
    "strips": CHATML.replace("m.content", "m.content | trim"),
    "system in the first question": "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.s = m.content + '\n\n' %}{% else %}{{ '<|im_start|>' + m.role + '\n' + ns.s + m.content + '<|im_end|>\n' }}"
    "{% set ns.s = '' %}{% endif %}{% endfor %}" + ASK,
    "system in the last question": "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'user' and messages[0].role == 'system' and (loop.last or loop.index == (messages | length) - 2) %}"
    "{{ messages[0].content + '\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}" + ASK,
    "a system message of its own": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + CHATML,
    "answers set off by spaces": CHATML.replace("m.content", "' ' + m.content + ' '"),
    "parts": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK,
    "macros": "{% macro turn(m) %}" + TURN + "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}" + ASK,
    "drops earlier reasoning": CHATML.replace(
        "m.content", "(m.content if loop.last else m.content.split('</think>')[-1])"
    ),
}


@pytest.mark.parametrize("prompt", [[USER], [SYSTEM, USER], [USER, ASSISTANT, MORE], [SYSTEM, USER, ASSISTANT, MORE]])
@pytest.mark.parametrize("template", RIGHT.values(), ids=RIGHT)
def test_templates_that_keep_the_conversation(template, prompt):
    before, after = shown(tokenization_of(template), prompt, "There were 34.")
    places = [before.index(message["content"]) for message in prompt if message["role"] != "system"]
    assert places == sorted(places)
    assert all(before.count(m["content"]) == 1 for m in prompt)
    assert after.split() == ["There", "were", "34.<|im_end|>"] or after == " There were 34. <|im_end|>"
    assert before.count("<|im_start|>") > len([m for m in prompt if m["role"] != "system"])


def test_short_texts_that_occur_everywhere():
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "s"},
        {"role": "user", "content": "us"},
    ]
    for template in RIGHT.values():
        assert shown(tokenization_of(template), prompt, "e")[1].strip() in ("e<|im_end|>", "e <|im_end|>")


def test_earlier_reasoning_is_the_templates_to_leave_out():
    talk = [USER, {"role": "assistant", "content": "<think>\n6 + 6\n</think>\n\nThere are 12."}, MORE]
    before, after = shown(tokenization_of(RIGHT["drops earlier reasoning"]), talk, "<think>\nnone\n</think>\n\nNo.")
    assert "6 + 6" not in before
    assert after == "<think>\nnone\n</think>\n\nNo.<|im_end|>"


# -- reasoning ----------------------------------------------------------------------------------------------------------

OPENS = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set c = m.content %}{% if m.role == 'assistant' %}"
    "{% set r = '' %}{% if '</think>' in c %}{% set r = c.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set c = c.split('</think>')[-1] | trim %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{% endif %}{{ c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""Opens a block for the assistant, and writes reasoning, also none, into it: Qwen3 for thinking."""

DROPS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""Opens a block for the assistant, and writes no reasoning of answers: DeepSeek-R1."""

REASONED = ["<think>\nadd\n</think>\n\n7", "<think>add</think>7", "<think>\n\n</think>\n\n7"]


@pytest.mark.parametrize("answer", REASONED)
@pytest.mark.parametrize("template", [OPENS, QWEN, DROPS], ids=["opens", "qwen", "drops"])
def test_a_block_that_the_prompt_opens_is_opened_once_and_closed(template, answer):
    whole = "".join(shown(tokenization_of(template), [USER], answer))
    assert whole.count("<think>") == whole.count("</think>") == 1
    assert whole.index("<think>") < whole.index("</think>") < whole.index("7<|im_end|>")
    assert ("add" in whole) == ("add" in answer)


def test_an_answer_without_reasoning_is_not_learned_inside_an_open_block():
    for template in (OPENS, DROPS):
        with pytest.raises(
            UserError, match="opens a <think> block for the assistant, and the answer does not close it"
        ):
            shown(tokenization_of(template), [USER], "7")
    assert shown(tokenization_of(QWEN), [USER], "7")[1] == "\n</think>\n\n7<|im_end|>"


@pytest.mark.parametrize("opening", ["<thinking>", "[THINK]", "<|begin_of_thought|>", "<seed:think>"])
def test_other_marks_of_reasoning(opening):
    template = CHATML.replace("assistant\n' }}{% endif %}", f"assistant\n{opening}\n' }}}}{{% endif %}}")
    with pytest.raises(UserError, match="does not close it"):
        shown(tokenization_of(template), [USER], "7")


def test_a_block_of_the_templates_own_beside_the_answers_is_an_error():
    tokenization = Tokenization(tiny_tokenizer("qwen3"))  # writes an empty block before every answer
    with pytest.raises(UserError, match="of its own beside the answer's"):
        shown(tokenization, [USER], "<think>\nadd\n</think>\n\n7")


# -- ends ---------------------------------------------------------------------------------------------------------------


def test_the_turns_end_is_not_the_tokenizers():
    tokenizer = tiny_tokenizer("llama3")
    assert tokenizer.eos_token != "<|eot_id|>"
    tokenization = Tokenization(tokenizer, model_end_ids=frozenset({7, tokenizer.eos_token_id}))
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert tokenization.end_ids(conversational=True) == (end, tokenizer.eos_token_id, 7)
    assert tokenization.end_ids(conversational=False) == (tokenizer.eos_token_id, 7)
    assert tokenization.stop_ids(True) == {end, tokenizer.eos_token_id, 7}


def test_a_template_that_ends_some_turns_only_is_an_error_for_the_others():
    template = CHATML.replace("'<|im_end|>\n' }}", "('<|im_end|>\n' if 'x' not in m.content[:2] else '') }}")
    tokenization = tokenization_of(template)
    assert shown(tokenization, [USER], "Yes.")[1] == "Yes.<|im_end|>"
    with pytest.raises(UserError, match=r"does not end this answer with <\|im_end\|>"):
        shown(tokenization, [USER], "x")


def test_an_end_of_the_models_generation_config_inside_an_answer_is_an_error():
    tokenizer = tiny_tokenizer("llama3")
    header = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    tokenization = Tokenization(tokenizer, model_end_ids=frozenset({header}))
    with pytest.raises(UserError, match="in the middle of the answer"):
        tokenization.completion("a", "b<|start_header_id|>c", Role.DEMONSTRATION)


# -- templates that fail ------------------------------------------------------------------------------------------------

FAILING = {
    "raises": "{{ raise_exception('no') }}",
    "is no Jinja": "{% for %}",
    "adds text and nothing": "{{ 'a' + messages[0].name }}",
    "divides by zero": "{{ 1 / 0 }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "asks for too much": "{{ messages.__class__.__mro__ }}",
    "takes what is not there": "{{ messages[9].content }}",
    "is empty": " ",
}


@pytest.mark.parametrize("template", FAILING.values(), ids=FAILING)
def test_a_template_that_fails_is_an_error_with_the_row(template):
    (demonstration,) = read_row({"messages": [USER, ASSISTANT]}, number=4)
    with pytest.raises(UserError, match=r"^x, row 4: .*chat template"):
        tokenization_of(template).group(demonstration, source="x")


def test_named_templates():
    named = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(UserError, match=r"chat templates rag, tool_use and none named 'default'"):
        shown(tokenization_of(named), [USER], "Yes.")
    assert shown(tokenization_of(named | {"default": CHATML}), [USER], "Yes.")[1] == "Yes.<|im_end|>"


# -- time ---------------------------------------------------------------------------------------------------------------

NOW = datetime(2024, 2, 5, 7, 8, 9, 123456)


@pytest.mark.parametrize(
    "format",
    ["%d %b %Y", "%Y-%m-%d %H:%M:%S", "%-d/%-m", "100%%", "%A, %B %e", "%I:%M %p", "no time", "%j %U"],
)
def test_a_template_is_told_the_time_of_the_run(format):
    template = "{{ '<|im_start|>' + strftime_now('" + format + "') + '\n' }}" + CHATML
    before, _ = shown(tokenization_of(template, now=NOW), [USER], "Yes.")
    assert before.startswith("<|im_start|>" + NOW.strftime(format) + "\n")


def test_a_time_is_asked_for_as_templates_do():
    template = "{% if strftime_now is defined %}{% set date = strftime_now('%Y') %}{% endif %}{{ date }}" + CHATML
    assert shown(tokenization_of(template, now=NOW), [USER], "Yes.")[0].startswith("2024<|im_start|>")
    assert tokenization_of(template).asks_for_time
    assert not tokenization_of(CHATML).asks_for_time


@pytest.mark.parametrize(
    "start", ["", "\n", "  \n", "  {% if true %}x{% endif %}", "\n\n  {%- if true %}x{% endif %}"]
)
def test_telling_the_time_changes_nothing_else(start):
    tokenizer = tiny_tokenizer("qwen3")
    template = start + CHATML
    plain, timed = (
        tokenizer.apply_chat_template([USER], tokenize=False, chat_template=each)
        for each in (template, with_fixed_time(template, NOW))
    )
    assert plain == timed


# -- pieces -------------------------------------------------------------------------------------------------------------


def sentencepiece(*, legacy: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that writes a space before every text, as SentencePiece does."""
    words = ["▁", "1", "2", "3", "a", "b", ".", "?", "▁1", "▁2", "12", "▁12", "▁a", "ab", "▁ab"]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words, *(f"<0x{i:02X}>" for i in range(256))])
    }
    merges = [
        ("▁", "1"),
        ("▁", "2"),
        ("1", "2"),
        ("▁", "12"),
        ("▁1", "2"),
        ("▁", "a"),
        ("a", "b"),
        ("▁a", "b"),
        ("▁", "ab"),
    ]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize(
    ("prompt", "answer"), [("1", "2"), ("a", "b"), ("1 ", "2"), ("1", " 2"), ("1?", "2"), ("é", "é"), ("a\n", "12")]
)
def test_nothing_appears_between_prompt_and_completion(prompt, answer, conversational, legacy):
    tokenization = Tokenization(sentencepiece(legacy=legacy))
    asked = [{"role": "user", "content": prompt}] if conversational else prompt
    prompt_ids = tokenization.prompt_ids(asked)
    completion = tokenization.completion(asked, answer, Role.DEMONSTRATION)
    assert tokenization.text((*prompt_ids, *completion.token_ids)) == prompt + answer


def test_a_text_that_the_tokenizer_cannot_write_is_an_error():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "yes": 2, "no": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenization = Tokenization(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"))
    assert tokenization.completion("yes ", "no", Role.DEMONSTRATION).token_ids == (3, 1)
    with pytest.raises(UserError, match="the tokens of the answer do not decode to its text"):
        tokenization.completion("yes ", "🦊", Role.DEMONSTRATION)
    with pytest.raises(UserError, match="the tokens of the prompt do not decode to its text"):
        tokenization.prompt_ids("yes 🦊")


def test_a_tokenizers_own_spelling_is_no_error():
    tokenizer = tiny_tokenizer("plain")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenization = Tokenization(tokenizer)
    assert tokenization.text(tokenization.prompt_ids("Cafe\u0301  A")) == "caf\u00e9  a"
