"""Folders that commands write into: tried before the work, never what a command reads, and nothing is lost that it did not write."""

import json
import os
import shutil

import pytest
from test_cli import SUMS, save_model, training, write_rows

from tutelage.cli import main
from tutelage.cli.output import OutputFolder, try_folder
from tutelage.errors import UserError
from tutelage.training.made import add_made, made_files


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """A run with checkpoints and stages; nothing may write into it."""
    folder = tmp_path_factory.mktemp("finished")
    data = write_rows(folder / "sums.jsonl", SUMS)
    run = training("irft", model, data, folder / "run", stages_per_epoch=2, save_strategy="steps", save_steps=1)
    assert main([str(arg) for arg in run]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished / "run", tmp_path / "run")


@pytest.fixture
def refused(capsys):
    def refuse(*args):
        capsys.readouterr()
        assert main([str(arg) for arg in args]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return refuse


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- what is read ------------------------------------------------------------------------------------------------------


def test_the_output_folder_is_the_model_s(refused, model, finished, tmp_path):
    """By its name, through a link, and with a link for the output."""
    copy = tmp_path / "base"
    shutil.copytree(model, copy)
    (tmp_path / "link").symlink_to(copy)
    before = content(copy)
    for name, out in ((copy, copy), (tmp_path / "link", copy), (copy, tmp_path / "link"), (copy, f"{copy}/../base")):
        for flag in ("--overwrite_output_dir", "--resume"):
            error = refused(*training("sft", name, finished / "sums.jsonl", out), flag)
            assert "is the output folder" in error
            assert "model_name_or_path" in error
    assert content(copy) == before


@pytest.mark.parametrize(
    ("field", "inside"),
    [
        ("model_name_or_path", "checkpoint-1"),
        ("model_name_or_path", "link"),
        ("dataset_name", "stages/stage-0000/samples.jsonl"),
        ("eval_dataset_name", "stages/stage-0001/samples.jsonl"),
        ("retention_dataset", "stages/stage-0001/samples.jsonl"),
        ("config", "results.json"),
    ],
)
def test_what_is_read_is_not_replaced(refused, model, run, finished, field, inside):
    (run / "link").symlink_to(run / "checkpoint-1")
    before = content(run)
    options = {field: run / inside}
    error = refused(*training("sft", model, finished / "sums.jsonl", run, **options), "--overwrite_output_dir")
    assert "lies in what would be replaced" in error
    assert field in error
    assert content(run) == before


def test_the_base_of_an_adapter_is_read_too(refused, run, finished, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    base = {"base_model_name_or_path": str(run / "checkpoint-1"), "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(base), encoding="utf-8")
    before = content(run)
    error = refused(*training("sft", adapter, finished / "sums.jsonl", run), "--overwrite_output_dir")
    assert "lies in what would be replaced" in error
    assert content(run) == before


def test_a_run_may_start_from_a_checkpoint_elsewhere(run, tmp_path):
    before = content(run)
    for folder, start in ((tmp_path / "new", run / "checkpoint-1"), (run / "sub", run)):
        made = OutputFolder(str(folder), overwrite=True, reads={"model_name_or_path": str(start)})
        assert made.folder == folder
    assert content(run) == before


# --- what is replaced --------------------------------------------------------------------------------------------------


def test_only_what_a_run_made_is_taken_away(run):
    mine = {run / name for name in ("notes.txt", "stages/notes.txt", "checkpoint-1/notes.txt", "plots/a.png")}
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    with OutputFolder(str(run), overwrite=True, outputs=()) as output:
        output.clear()
        assert {path for path in run.rglob("*") if path.is_file()} == mine | {run / "lock.json"}
    assert {path for path in run.rglob("*") if path.is_file()} == mine


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md", "checkpoint-7/model.safetensors"])
def test_a_file_that_no_run_made_is_not_replaced(refused, model, finished, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    error = refused(*training("sft", model, finished / "sums.jsonl", tmp_path / "out"), "--overwrite_output_dir")
    assert "no run of tutelage wrote this file" in error
    assert name in error
    assert path.read_text(encoding="utf-8") == "mine"


def test_every_file_of_a_run_is_known_as_its_own(run):
    made = set(made_files(run))
    assert {path for path in run.rglob("*") if path.is_file()} == made


def test_a_list_that_names_others_files_reaches_none(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "out" / "other.txt").write_text("x", encoding="utf-8")
    add_made(tmp_path / "out", ["../mine.txt", str(tmp_path / "mine.txt"), "other.txt"])
    assert tmp_path / "out" / "other.txt" in made_files(tmp_path / "out")
    with OutputFolder(str(tmp_path / "out"), overwrite=True, outputs=()) as output:
        output.clear()
    assert (tmp_path / "mine.txt").exists()
    assert not (tmp_path / "out" / "other.txt").exists()


# --- tried before the work ---------------------------------------------------------------------------------------------


def commands(model, data, out):
    """Every command that writes, and what would be its long work."""
    lm = ("--model_name_or_path", model)
    return {
        "sft": (*training("sft", model, data, out),),
        "rft": (*training("rft", model, data, out),),
        "evaluate": ("evaluate", *lm, "--dataset_name", data, "--output_dir", out),
        "sample": ("sample", *lm, "--dataset_name", data, "--output", out / "samples.jsonl"),
        "score": (
            "score",
            "--policy",
            model,
            "--reference",
            model,
            "--dataset_name",
            data,
            "--output",
            out / "s.jsonl",
        ),
        "clean": ("clean", data, *lm, "--output_dir", out, "--drop", 0.5),
        "extrapolate": ("extrapolate", "--start", model, "--aligned", model, "--alpha", 1, "--output_dir", out),
        "lab": ("lab", "run", "smoke", "--output_dir", out),
        "quickstart": ("quickstart", *lm, "--output_dir", out),
    }


IMPOSSIBLE = {"a file for a parent": "file/out", "a place where nothing can be made": "/proc/tutelage/out"}


@pytest.mark.parametrize("place", IMPOSSIBLE)
@pytest.mark.parametrize(
    "command", ["sft", "rft", "evaluate", "sample", "score", "clean", "extrapolate", "lab", "quickstart"]
)
def test_an_impossible_output_is_one_error_before_the_work(
    refused, model, finished, tmp_path, monkeypatch, command, place
):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    out = tmp_path / IMPOSSIBLE[place]  # an absolute path stays itself

    def work(*args, **options):
        raise AssertionError("the work began")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", work)
    error = refused(*commands(model, finished / "sums.jsonl", out)[command])
    assert "cannot be written" in error
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        try_folder(tmp_path)
    tmp_path.chmod(0o700)


def test_trying_leaves_nothing(tmp_path):
    try_folder(tmp_path / "a" / "b")
    (tmp_path / "c").mkdir()
    try_folder(tmp_path / "c")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "c"]


# --- evaluate ----------------------------------------------------------------------------------------------------------


def test_evaluate_goes_again_over_its_own_half_written_folder(refused, model, finished, tmp_path, monkeypatch):
    args = [str(a) for a in commands(model, finished / "sums.jsonl", tmp_path / "out")["evaluate"]]
    args += ["--max_completion_length", "4", "--rows", "2"]

    def dying(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("tutelage.cli.evaluate.show_runs", dying)
    assert main(args) == 130
    monkeypatch.undo()
    assert list((tmp_path / "out").glob("*/results.json"))
    mine = tmp_path / "out" / "notes.txt"
    mine.write_text("mine", encoding="utf-8")
    assert "not empty" in refused(*args), "not over what others put there"
    mine.unlink()
    assert main(args) == 0
    assert (tmp_path / "out" / "report.html").exists()
    assert "not empty" in refused(*args), "a finished one is kept"


# --- resuming by the command -------------------------------------------------------------------------------------------


def test_a_resumed_run_computes_as_it_was_begun(model, finished, tmp_path, monkeypatch, capsys):
    """Where nobody says in what, it is measured, and a second measurement may come out otherwise."""
    args = [str(a) for a in training("sft", model, finished / "sums.jsonl", tmp_path / "out", save_strategy="epoch")]
    args = [a for place, a in enumerate(args) if "--bf16" not in (a, args[place - 1])]
    args = [a for place, a in enumerate(args) if "--dtype" not in (a, args[place - 1])]
    assert main(args) == 0
    measured = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["settings"]["bf16"]

    def otherwise(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr("tutelage.cli.arguments.choose_precision", otherwise)
    assert main([*args, "--resume"]) == 0
    assert main([*args, "--resume", f"--bf16={not measured}"]) == 2
    assert "field 'bf16'" in capsys.readouterr().err


def test_a_resume_that_is_refused_leaves_everything_as_it_is(refused, model, run, finished):
    options = {"stages_per_epoch": 2, "save_strategy": "steps", "save_steps": 1}
    other = write_rows(run.parent / "other.jsonl", SUMS[:7])
    before = content(run)
    error = refused(*training("irft", model, other, run, **options), "--resume")
    assert "8 rows" in error
    assert "7 rows" in error
    error = refused(
        *training("irft", model, finished / "sums.jsonl", run, **options), "--resume", "--learning_rate", 1
    )
    assert "field 'learning_rate'" in error
    assert content(run) == before


# --- what is not the command's own -------------------------------------------------------------------------------------


def test_a_run_inside_another_ones_folder_is_not_replaced_with_it(tmp_path):
    out, inner, control = tmp_path / "out", tmp_path / "out" / "second", tmp_path / "out" / "controls" / "gentle"
    for folder in (out, inner, control):
        folder.mkdir(parents=True)
        add_made(folder, ["model.safetensors"])
        (folder / "model.safetensors").write_text("weights")
    made = made_files(out)
    assert out / "model.safetensors" in made
    assert control / "model.safetensors" in made
    assert not any(inner in path.parents for path in made)
    add_made(out, [], folders=["second"])
    assert inner / "model.safetensors" in made_files(out)


def test_nothing_is_a_commands_own_where_none_left_a_record(tmp_path):
    for name in ("run.json", "stages/samples.jsonl", "folds/x.tmp", "lock.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert made_files(tmp_path) == []
    for name in ("run.json", "stages/samples.jsonl"):
        with pytest.raises(UserError, match="no run of tutelage wrote this file"):
            OutputFolder(str(tmp_path), overwrite=True)
        (tmp_path / name).unlink()
    OutputFolder(str(tmp_path), overwrite=True)


def test_resume_needs_a_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no run of tutelage wrote this file"):
        OutputFolder(str(tmp_path), overwrite=False, resume=True)
    add_made(tmp_path, ["config.json"])
    OutputFolder(str(tmp_path), overwrite=False, resume=True)


@pytest.mark.parametrize("record", ['{"files": null}', '{"files": [5, "../x", "/x"]}', "[]", "{"])
def test_a_record_names_nothing_outside_its_folder(tmp_path, record):
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "x").write_text("x")
    (out / "checkpoint-1" / "manifest.json").write_text('{"files": {"../../x": {}}}')
    (out / "made.json").write_text(record)
    assert not {path.resolve() for path in made_files(out)} & {tmp_path / "x"}


def test_a_folder_is_tried_with_a_file_that_a_kill_does_not_leave(tmp_path, monkeypatch):
    """While it is written it has no name any more; and what one left that was killed before that, the next one takes away."""
    names = []
    monkeypatch.setattr("tutelage.cli.output.os.fsync", lambda number: names.append(list(tmp_path.iterdir())))
    (tmp_path / ".tutelage-probe").write_bytes(b"of a killed one")
    try_folder(tmp_path)
    assert names == [[]]
    assert list(tmp_path.iterdir()) == []
