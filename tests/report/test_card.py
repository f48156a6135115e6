"""The model card shows what users named as it is: read by a Markdown parser, nothing of it becomes markup."""

import re
from html import unescape

import pytest
import yaml
from markdown_it import MarkdownIt

from tutelage.card import markdown, model_card
from tutelage.results import EvaluationRecord, Interval, RunRecord
from tutelage.visible import visible

HOSTILE = {
    "script": "</script><script>alert(1)</script>",
    "image": "![x](https://x/y.png)",
    "tag": "<img src=x onerror=alert(2)>",
    "table": "a | b | c",
    "code": "`a` ``b``",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~ f_g_h",
    "new lines": "a\n\n# heading\n- item\r\nb",
    "front matter": "---\nlicense: mit\n---",
    "heading": "# a",
    "setext": "===",
    "list": "- a",
    "numbered": "1. a",
    "quote": "> a",
    "entity": "&lt;b&gt; &#60;",
    "link": "[a](javascript:alert(1)) [b]: x https://evil www.evil.example a@b.c <https://x>",
    "backslash": "a\\*b\\",
    "separators": "a\u2028b\u0085c",
    "escape": "\x1b[31mred",
    "html comment": "<!-- a",
    "math": "$x$ {{7*7}}",
    "tabs": "\ta\tb",
    "path": "runs/sft-qwen3_4b/checkpoint-10",
}

ALLOWED = {"h1", "h2", "p", "strong", "code", "table", "thead", "tbody", "tr", "th", "td"}


def card_of(text):
    found = Interval(0.5, 0.25, 0.75, 3)
    evaluation = EvaluationRecord(text, text, [1], {text: found}, notes=[text])
    return model_card(
        RunRecord(
            text, "sft", model=text, dataset=text, seed=0, settings={"note": text, text: 1}, evaluation=evaluation
        )
    )


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_nothing_becomes_markup(text):
    front, _, body = card_of(text).removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["tutelage", "sft"]}
    plain = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body)
    harmless = (
        MarkdownIt("commonmark", {"html": True})
        .enable(["table", "strikethrough"])
        .render(card_of("name").partition("\n---\n")[2])
    )
    tags = re.findall(r"<(/?\w+)", plain)
    assert {tag.strip("/") for tag in tags} <= ALLOWED
    assert tags == re.findall(r"<(/?\w+)", harmless)  # the same structure as of a name without a special character
    assert not re.search(r"<[^>]*\s(on\w+|href|src)=", plain)
    shown = " ".join(visible(text, lines=False).replace("\t", " ").split())
    seen = " ".join(unescape(re.sub(r"<[^>]*>", "", plain)).split())
    assert seen.count(shown) >= 7


def test_an_algorithm_of_another_file_is_no_yaml():
    front = model_card(RunRecord("x", "a]\nlicense: mit", "m", "d", 0)).split("---")[1]
    assert yaml.safe_load(front)["tags"] == ["tutelage", "a]\nlicense: mit"]


def test_plain_names_stay_readable():
    assert markdown("Qwen/Qwen2.5-0.5B learning_rate data.jsonl") == "Qwen/Qwen2.5-0.5B learning_rate data.jsonl"
