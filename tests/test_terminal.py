"""Whatever a run, a folder or a row is called: the terminal shows it and obeys nothing of it."""

import ast
import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tutelage.cli import main
from tutelage.errors import UserError
from tutelage.terminal import SafeConsole, label, say
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer
from tutelage.visible import visible

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tutelage"

HOSTILE = "a[/red][bold]b[\x1b[31m\x9b2J\rc\u202ed:smile:\x07e"
"""Markup that closes nothing, control bytes of both kinds, a line that starts over, text that turns round."""

FORBIDDEN = [char for char in map(chr, range(0x110000)) if not char.isprintable() and char not in "\n\t"]


def assert_harmless(text):
    found = [char for char in FORBIDDEN if char in text]
    assert not found, found


def test_one_module_alone_writes_to_consoles():
    """What is printed elsewhere would have to think of markup and of control bytes each time."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                direct = called == "print" and path.name != "visible.py"
                direct |= called.endswith(".print") and path.name != "terminal.py"
                direct |= called in ("Console", "rich.print", "sys.stdout.write", "sys.stderr.write") and bool(
                    path.name != "summary.py"  # which measures a table and prints nothing
                )
                found += [f"{path.name}:{node.lineno}"] if direct else []
    assert found == []


def test_visible_spells_out_what_a_terminal_would_obey():
    everything = "".join(map(chr, range(0x3000))) + "\ud800\U000e0001"
    assert_harmless(visible(everything))
    assert "\n" not in visible(everything, lines=False)
    assert visible("Ünïcode 漢字 👍 \n\t[/x]") == "Ünïcode 漢字 👍 \n\t[/x]"


def printed(make, **options):
    file = io.StringIO()
    make(SafeConsole(file=file, width=200, **options))
    return file.getvalue()


def test_a_safe_console_is_safe_from_those_who_forget():
    def careless(console):
        console.print(f"[bold]{HOSTILE}[/bold]")
        table = Table(title=HOSTILE, caption=HOSTILE)
        table.add_column(HOSTILE)
        table.add_row(HOSTILE)
        console.print(table)
        console.rule(HOSTILE)

    found = printed(careless)
    assert_harmless(found)
    assert "[/red][bold]b[\\x1b[31m\\x9b2Jc\\u202ed:smile:e" in found  # rich itself leaves two of them out


def test_a_colored_console_has_its_own_codes_and_no_others():
    found = printed(lambda console: say(console, (HOSTILE, "bold"), HOSTILE), force_terminal=True)
    assert found.count("\x1b[1m") == 1
    assert "\x1b[31m" not in found
    assert "\x9b" not in found


def test_a_plain_console_of_rich_gets_the_same_lines():
    file = io.StringIO()
    console = Console(file=file, width=200)
    say(console, HOSTILE, (HOSTILE, "bold"))
    table = Table(title=label(HOSTILE))
    table.add_row(label(HOSTILE))
    console.print(table)
    assert_harmless(file.getvalue())
    assert file.getvalue().count("a[/red][bold]b[") == 4


def test_an_error_names_files_harmlessly():
    error = UserError("is wrong.", file="a\nb\x1b", field="x", row=1)
    assert str(error) == "a\\nb\\x1b, row 1, field 'x': is wrong."
    assert error.file == "a\nb\x1b"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model and data under names that nobody should choose."""
    folder = tmp_path_factory.mktemp("home") / HOSTILE
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer("zephyr")
    tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1).save_pretrained(folder / f"model {HOSTILE}")
    tokenizer.save_pretrained(folder / f"model {HOSTILE}")
    rows = [{"prompt": f"{HOSTILE} {i}?", "completion": f" {HOSTILE} {i}"} for i in range(8)]
    data = folder / f"data {HOSTILE}.jsonl".replace("/", "-")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder, folder / f"model {HOSTILE}", data


def test_no_command_obeys_a_name(home, capsys):
    folder, model, data = home
    handlers = list(logging.getLogger().handlers)
    run, other = folder / f"run {HOSTILE}", folder / "other"
    lengths = ["--max_completion_length", "8"]
    commands = [
        ["sft", "--model_name_or_path", model, "--dataset_name", data, "--eval_dataset_name", data, "--output_dir", run,
         "--run_name", HOSTILE, "--max_steps", "2", "--bf16", "False", "--report_to", "none", "--use_peft", *lengths],
        ["sft", "--model_name_or_path", run, "--dataset_name", data, "--output_dir", other, "--run_name", "other",
         "--max_steps", "1", "--bf16", "False", "--report_to", "none", *lengths],
        ["sample", "--model_name_or_path", run, "--dataset_name", data, "--output", folder / f"s {HOSTILE}.jsonl", *lengths],
        ["score", "--policy", run, "--dataset_name", data, "--output", folder / f"t {HOSTILE}.jsonl"],
        ["evaluate", "--model_name_or_path", run, "--dataset_name", data, "--output_dir", folder / f"e {HOSTILE}", *lengths],
        ["report", run, other, "--output", folder / f"r {HOSTILE}.html"],
        ["data", data, "--model_name_or_path", model, *lengths],
        # and the errors
        ["sample", "--model_name_or_path", folder / f"gone {HOSTILE}", "--dataset_name", data, "--output", folder / "x"],
        ["data", folder / f"gone {HOSTILE}.jsonl", "--model_name_or_path", model],
        ["report", folder / f"gone {HOSTILE}"],
        ["sft", f"--{HOSTILE}", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", folder / "y"],
        ["sft", "--config", folder / f"gone {HOSTILE}.yaml"],
        ["sample", f"--num_samples={HOSTILE}", "--model_name_or_path", model, "--dataset_name", data, "--output", "x"],
        [HOSTILE],
    ]  # fmt: skip
    for command in commands:
        code = main([str(part) for part in command])
        said = capsys.readouterr()
        assert_harmless(said.out + said.err)
        fails = commands.index(command) >= 7
        assert (code == 2) == fails, said.err
    assert logging.getLogger().handlers[: len(handlers)] == handlers
    card = (run / "README.md").read_text(encoding="utf-8")
    assert_harmless(card)
