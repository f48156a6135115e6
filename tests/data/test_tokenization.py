"""The one templating path: BOS, end-of-turn, boundaries, lengths."""

from __future__ import annotations

import datasets
import pytest
from transformers import AutoTokenizer

from tutelage.data import (
    DataSummary,
    Tokenization,
    group_from_row,
    preference_group_from_row,
    read_row,
    tokenize_dataset,
)
from tutelage.errors import UserError
from tutelage.groups import Role
from tutelage.testing.tokenizers import STYLES, tiny_tokenizer

CHAT_STYLES = [style for style in STYLES if style != "plain"]
BOS = {"llama3": "<|begin_of_text|>", "gemma3": "<bos>", "zephyr": "<s>", "qwen3": "", "plain": ""}
EOS = {
    "llama3": "<|end_of_text|>",
    "gemma3": "<eos>",
    "zephyr": "</s>",
    "qwen3": "<|im_end|>",
    "plain": "<|endoftext|>",
}
END_OF_TURN = {"llama3": "<|eot_id|>", "gemma3": "<end_of_turn>", "zephyr": "</s>", "qwen3": "<|im_end|>"}

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "How many apples?"}
ASSISTANT = {"role": "assistant", "content": "There are 12."}
MORE = {"role": "user", "content": "And more?"}
CONVERSATIONS = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "two turns": [USER, ASSISTANT, MORE],
    "system, two turns": [SYSTEM, USER, ASSISTANT, MORE],
}


@pytest.fixture(autouse=True)
def library_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tokenization_of(style, **arguments) -> Tokenization:
    return Tokenization(tiny_tokenizer(style), **arguments)


def shown(tokenization: Tokenization, token_ids) -> str:
    return tokenization.text(token_ids, skip_special_tokens=False)


def complete(tokenization, prompt, text):
    return tokenization.completion(prompt, text, Role.DEMONSTRATION)


# -- prompts ----------------------------------------------------------------------------------------------------------

PROMPTS = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHow many apples?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many apples?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma3": "<bos><start_of_turn>user\nBe brief.\n\nHow many apples?<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": "<s><|system|>\nBe brief.</s>\n<|user|>\nHow many apples?</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("style", CHAT_STYLES)
def test_conversations_are_rendered_in_the_familys_format(style):
    tokenization = tokenization_of(style)
    assert shown(tokenization, tokenization.prompt_ids([SYSTEM, USER])) == PROMPTS[style]


@pytest.mark.parametrize("style", STYLES)
def test_text_gets_bos_and_nothing_else(style):
    tokenization = tokenization_of(style)
    assert shown(tokenization, tokenization.prompt_ids("The question")) == BOS[style] + "The question"


@pytest.mark.parametrize("style", ["llama3", "gemma3", "zephyr"])
def test_bos_spelled_out_in_the_text_is_not_doubled(style):
    tokenization = tokenization_of(style)
    assert tokenization.prompt_ids(BOS[style] + "The question") == tokenization.prompt_ids("The question")


def test_bos_that_only_the_template_writes_is_kept_once():
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + tokenizer.chat_template
    tokenization = Tokenization(tokenizer)
    assert shown(tokenization, tokenization.prompt_ids([USER])).count("<|endoftext|>") == 1
    assert "<|endoftext|>" not in shown(tokenization, tokenization.prompt_ids("The question"))


def test_eos_that_the_tokenizer_appends_is_not_part_of_a_prompt():
    from tokenizers import processors

    tokenizer = tiny_tokenizer("zephyr")
    ids = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    tokenization = Tokenization(tokenizer)
    assert shown(tokenization, tokenization.prompt_ids("a")) == "<s>a"
    assert shown(tokenization, complete(tokenization, "a", "b").token_ids) == "b</s>"


# -- completions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("style", CHAT_STYLES)
def test_prompt_and_completion_are_what_the_template_renders(style, conversation):
    tokenization = tokenization_of(style)
    tokenizer = tokenization.tokenizer
    answer = {"role": "assistant", "content": "There were 34."}
    completion = complete(tokenization, conversation, answer["content"])
    token_ids = tokenization.prompt_ids(conversation) + completion.token_ids

    rendered = tokenizer.apply_chat_template([*conversation, answer], tokenize=False)
    rendered = rendered[: rendered.rindex(END_OF_TURN[style]) + len(END_OF_TURN[style])]
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    if style == "zephyr":  # its template leaves BOS to the tokenizer
        expected = [tokenizer.bos_token_id, *expected]
    assert list(token_ids) == expected
    assert token_ids.count(tokenizer.bos_token_id) == (1 if BOS[style] else 0)
    assert completion.finished
    assert completion.token_ids.count(tokenization.end_of_turn_id(True)) == 1
    assert completion.token_ids[-1] == tokenization.end_of_turn_id(True)


@pytest.mark.parametrize("style", STYLES)
def test_text_completions_end_with_eos(style):
    tokenization = tokenization_of(style)
    completion = complete(tokenization, "How many? ", "There were 34.")
    assert shown(tokenization, completion.token_ids) == "There were 34." + EOS[style]
    assert completion.finished


@pytest.mark.parametrize(
    ("style", "prompt"),
    [*((style, "How many?") for style in STYLES), *((style, [USER]) for style in CHAT_STYLES)],
)
def test_the_length_limit_includes_the_end_of_turn(style, prompt):
    whole = complete(tokenization_of(style), prompt, "There were 34 and 56 more.")
    length = len(whole.token_ids)
    exact = complete(tokenization_of(style, max_completion_length=length), prompt, "There were 34 and 56 more.")
    assert exact == whole
    tokenization = tokenization_of(style, max_completion_length=length - 1)
    cut = complete(tokenization, prompt, "There were 34 and 56 more.")
    assert not cut.finished
    assert cut.token_ids == whole.token_ids[:-1]
    assert not set(cut.token_ids) & tokenization.stop_ids(prompt == [USER])


def test_a_token_across_the_boundary_leaves_the_prompt_as_the_sampler_sees_it():
    tokenization = tokenization_of("plain")
    prompt, text = "What is the su", "m of two numbers?"
    prompt_ids, completion = tokenization.prompt_ids(prompt), complete(tokenization, prompt, text)
    joint = tuple(tokenization.tokenizer(prompt + text)["input_ids"])
    assert joint[: len(prompt_ids)] != prompt_ids  # else this tests nothing
    assert tokenization.text(prompt_ids) == prompt
    assert completion.token_ids == (*tokenization.tokenizer(text)["input_ids"], tokenization.end_of_turn_id(False))


def test_a_token_across_the_boundary_of_a_template_keeps_what_the_template_adds():
    tokenizer = tiny_tokenizer("zephyr")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'the ' + m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'th' }}{% endif %}"
    )
    tokenization = Tokenization(tokenizer)
    assert shown(tokenization, complete(tokenization, [USER], "Yes.").token_ids) == "e assistant: Yes.</s>"


def test_a_template_that_rewrites_the_prompt_falls_back_on_the_text_alone():
    tokenizer = tiny_tokenizer("qwen3")
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    tokenization = Tokenization(tokenizer)
    assert shown(tokenization, complete(tokenization, [USER], "Yes.").token_ids) == "Yes.<|im_end|>"


def test_what_the_template_puts_before_the_answer_belongs_to_the_completion():
    tokenization = tokenization_of("qwen3")
    completion = complete(tokenization, [USER], "Yes.")
    assert shown(tokenization, completion.token_ids) == "<think>\n\n</think>\n\nYes.<|im_end|>"


@pytest.mark.parametrize("style", CHAT_STYLES)
@pytest.mark.parametrize("ending", ["{}", "{}\n", "{}{}"])
def test_an_end_that_the_text_spells_out_is_not_doubled(style, ending):
    tokenization = tokenization_of(style)
    for end in (EOS[style], END_OF_TURN[style]):
        text = "Yes." + ending.replace("{}", end)
        assert complete(tokenization, [USER], text) == complete(tokenization, [USER], "Yes.")


@pytest.mark.parametrize("style", STYLES)
def test_an_end_in_the_middle_of_an_answer_is_an_error(style):
    (demonstration,) = read_row({"prompt": "a", "completion": f"b{EOS[style]}c"}, number=5)
    with pytest.raises(UserError, match=r"^train\.csv, row 5: .* is an end-of-turn token in the middle"):
        tokenization_of(style).group(demonstration, source="train.csv")


def test_an_answer_of_nothing_but_ends_is_an_error():
    with pytest.raises(UserError, match="consists only of end-of-turn tokens"):
        complete(tokenization_of("zephyr"), "a", "</s>\n</s>")


# -- ends and pads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_what_ends_a_sample(style):
    tokenization = tokenization_of(style)
    ids = tokenization.tokenizer.convert_tokens_to_ids
    assert tokenization.stop_ids(conversational=False) == {ids(EOS[style])}
    if style != "plain":
        assert tokenization.end_of_turn_id(conversational=True) == ids(END_OF_TURN[style])
        assert tokenization.stop_ids(conversational=True) == {ids(END_OF_TURN[style]), ids(EOS[style])}


def test_a_template_without_special_tokens_ends_a_turn_with_eos():
    tokenizer = tiny_tokenizer("plain")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenization = Tokenization(tokenizer)
    completion = complete(tokenization, [USER], "Yes.")
    assert shown(tokenization, completion.token_ids) == "Yes.\n<|endoftext|>"


def test_pad_id():
    gemma, zephyr = tokenization_of("gemma3"), tokenization_of("zephyr")
    assert gemma.pad_id == gemma.tokenizer.pad_token_id != gemma.tokenizer.eos_token_id
    assert zephyr.pad_id == zephyr.tokenizer.eos_token_id
    zephyr.tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"Set tokenizer\.pad_token"):
        _ = zephyr.pad_id
    with pytest.raises(UserError, match="no EOS token"):
        complete(zephyr, "a", "b")


def test_a_conversation_needs_a_chat_template():
    with pytest.raises(UserError, match=r"no chat template\. Use a model .* 'prompt' and 'completion'"):
        tokenization_of("plain").prompt_ids([USER])


def test_a_template_that_refuses_is_an_error_with_the_row():
    tokenizer = tiny_tokenizer("zephyr")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    (demonstration,) = read_row({"messages": [SYSTEM, USER, ASSISTANT]}, number=2)
    with pytest.raises(UserError, match="row 2: the chat template refuses the conversation: no system role"):
        Tokenization(tokenizer).group(demonstration)


@pytest.mark.parametrize(
    "arguments", [{"max_prompt_length": 0}, {"max_completion_length": 0}, {"on_long_prompt": "cut"}]
)
def test_bad_settings(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        tokenization_of("plain", **arguments)


@pytest.mark.parametrize("style", STYLES)
def test_tiny_tokenizers_survive_saving(style, tmp_path):
    tokenizer = tiny_tokenizer(style)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) < 450
    assert loaded.chat_template == tokenizer.chat_template
    for text in ("The answer is 12.", "naïve 🦊 \n"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    if style != "plain":
        assert Tokenization(loaded).stop_ids(True) == Tokenization(tokenizer).stop_ids(True)


# -- groups and datasets ---------------------------------------------------------------------------------------------

PAIRS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    {"prompt": "2 + 2 = " * 20, "chosen": "4", "rejected": "5"},
    {"prompt": "Count.", "chosen": " 1 2 3 4 5 6 7 8 9", "rejected": " 1 2 3 4 5 6 7 8 0"},
    {"prompt": "Same?", "chosen": " Yes", "rejected": " Yes"},
]


def test_groups():
    tokenization = tokenization_of("llama3")
    (demonstration,) = read_row(PAIRS[0], number=4)
    group, pair = tokenization.group(demonstration), tokenization.preference_group(demonstration)
    assert (group.row, group.prompt_ids) == (3, tokenization.prompt_ids("2 + 2 ="))
    assert [completion.role for completion in group.completions] == [Role.DEMONSTRATION]
    assert [completion.role for completion in pair.completions] == [Role.PREFERRED, Role.REJECTED]
    assert [tokenization.text(completion.token_ids) for completion in pair.completions] == [" 4", " 5"]
    assert pair.prompt_ids == group.prompt_ids


def test_no_pair_without_a_difference():
    tokenization = tokenization_of("llama3", max_completion_length=8)
    (cut_to_the_same,) = read_row(PAIRS[2], number=1)
    (same,) = read_row(PAIRS[3], number=1)
    assert tokenization.preference_group(cut_to_the_same) is None
    assert tokenization.preference_group(same) is None


def test_a_long_prompt_is_an_error_or_dropped_but_never_cut():
    (demonstration,) = read_row(PAIRS[1], number=2)
    length = len(tokenization_of("llama3").prompt_ids(demonstration.prompt))
    fits = tokenization_of("llama3", max_prompt_length=length).group(demonstration)
    assert len(fits.prompt_ids) == length
    message = f"^x, row 2: the prompt has {length} tokens, the limit is {length - 1}.*--on_long_prompt drop"
    with pytest.raises(UserError, match=message):
        tokenization_of("llama3", max_prompt_length=length - 1).group(demonstration, source="x")
    dropping = tokenization_of("llama3", max_prompt_length=length - 1, on_long_prompt="drop")
    assert dropping.group(demonstration) is None
    assert dropping.preference_group(demonstration) is None


def tokenized(rows, tokenization, *, streaming=False, **arguments):
    dataset = datasets.Dataset.from_list(rows)
    return tokenize_dataset(dataset.to_iterable_dataset() if streaming else dataset, tokenization, **arguments)


def test_rows_hold_the_groups_and_dropped_ones_are_counted():
    tokenization = tokenization_of("gemma3", max_prompt_length=20, max_completion_length=8, on_long_prompt="drop")
    summary = DataSummary()
    dataset = tokenized(PAIRS, tokenization, summary=summary)
    demonstrations = [read_row(row, number=number)[0] for number, row in enumerate(PAIRS, start=1) if number != 2]
    assert [group_from_row(row) for row in dataset] == [tokenization.group(each) for each in demonstrations]
    assert [preference_group_from_row(row) for row in dataset] == [
        tokenization.preference_group(each) for each in demonstrations
    ]
    assert summary == DataSummary(rows=4, demonstrations=3, pairs=1, truncated=1, long_prompts=1)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_streamed_data_gives_the_same_rows(turns):
    rows = [{"messages": [USER, ASSISTANT, MORE, ASSISTANT]}, {"messages": [USER, ASSISTANT]}] * 3
    tokenization = tokenization_of("qwen3")
    loaded, summary = list(tokenized(rows, tokenization, turns=turns)), DataSummary()
    streamed = tokenized(rows, tokenization, turns=turns, streaming=True, summary=summary)
    assert isinstance(streamed, datasets.IterableDataset)
    assert summary.rows == 0  # nothing is read before somebody iterates
    assert list(streamed) == loaded
    assert (summary.rows, summary.demonstrations) == (6, len(loaded))
    assert list(streamed) == loaded
    assert len({row["row"] for row in loaded}) == len(loaded) == (9 if turns == "all" else 6)


def test_streamed_rows_keep_their_ids_when_shuffled_from_shards():
    rows = [{"prompt": "a", "completion": str(i)} for i in range(40)]
    dataset = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)
    tokenization = tokenization_of("plain")
    plain = tokenize_dataset(dataset, tokenization)
    shuffled = plain.shuffle(seed=1, buffer_size=8)
    in_order, mixed = [{row["row"]: row for row in each} for each in (plain, shuffled)]
    assert list(mixed) != list(in_order)
    assert mixed == in_order


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_and_empty_results_are_errors(streaming):
    tokenization = tokenization_of("plain", max_prompt_length=5, on_long_prompt="drop")
    with pytest.raises(UserError, match=r"^train, row 2, field 'completion': is empty"):
        list(
            tokenized(
                [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}],
                tokenization,
                streaming=streaming,
                source="train",
            )
        )
    with pytest.raises(UserError, match=r"^train: no demonstration remains: prompt too long \(1\)"):
        list(tokenized([{"prompt": "a" * 20, "completion": "b"}], tokenization, streaming=streaming, source="train"))


def test_tokenizing_writes_no_files(tmp_path):
    tokenized(PAIRS, tokenization_of("plain"))
    assert not list(tmp_path.rglob("*"))
