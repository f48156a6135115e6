"""What the tests of several processes run in each of them; a launcher says which one this is.

    python together.py FOLDER SCENARIO [SCENARIO …]
    python together.py FOLDER command ARGUMENT [ARGUMENT …]

Without a launcher it is one process, whose batches have the rows of both. Weights and logs lie in FOLDER/SCENARIO.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1]))

from rft_runs import make  # noqa: E402
from training_runs import SGD, Training  # noqa: E402
from tutelage.cli import main  # noqa: E402
from tutelage.models.head import LMHead  # noqa: E402
from tutelage.models.loading import base_causal_lm  # noqa: E402
from tutelage.models.sharding import gathered, is_sharded  # noqa: E402

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
SHARDED = "TUTELAGE_TEST_SHARDED" in os.environ
ROWS = {"per_device_train_batch_size": 4 // PROCESSES, "gradient_accumulation_steps": 2}
STAGES = {"stages_per_epoch": 2, "num_samples": 3, "replay_stages": 1, "sampling_batch_size": 4}
DISTILLED = {
    **ROWS,
    "stages_per_epoch": 2,
    "num_samples": 2,
    "sampling_batch_size": 4,
    "average": "samples",
    "teacher": "average",
    "teacher_rate": 0.3,
    "save_strategy": "steps",
    "save_steps": 1,
}
FEATURES = {
    "reward": "features",
    "reward_negatives": "initial,out_of_fold",
    "reward_gate": "off",
    "truncated_samples": "score",
    "fold_epochs": 1,
    "validation_rows": 4,
    "keep_policy": "best",
    "stages_per_epoch": 2,
    "num_samples": 2,
}


def shard_on_a_cpu():
    """accelerate shards on accelerators alone; here it takes the same road on a CPU."""
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def adapter(training):
    return {"peft_config": training.lora()}


def vllm():
    """A server of the test's stands in for vLLM; its address is in the environment."""
    return {"sampler": "vllm", "vllm_url": os.environ["TUTELAGE_TEST_VLLM"], "max_completion_length": 4}


def kept(training):
    """An adapter whose best stage is kept, stages behind a checkpoint are removed, and another task is watched."""
    trainer = training.trainer(
        "irft",
        data=sums(training),
        options={"eval_dataset": training.rows(5), **adapter(training)},
        **{
            **ROWS,
            **STAGES,
            **SGD,
            "replay_stages": 0,
            "num_train_epochs": 2,
            "save_strategy": "steps",
            "save_steps": 1,
        },
        load_best_stage_at_end=True,
        keep_stages=1,
        save_total_limit=1,
    )
    trainer.watch_retention(training.rows(24).select(range(21, 24)))
    return trainer


def tied(training):
    """Embedding and head are one weight, layers are computed twice, each micro-batch gives its gradients away, the best stage is
    restored, another task is watched."""
    trainer = training.trainer(
        "irft",
        model=training.model(tie_word_embeddings=True),
        data=sums(training),
        options={"eval_dataset": training.rows(5)},
        gradient_checkpointing=True,
        load_best_stage_at_end=True,
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        **{**ROWS, **STAGES, **SGD, "num_train_epochs": 2, "learning_rate": 2.0},
    )
    trainer.watch_retention(training.rows(24).select(range(21, 24)))
    return trainer


def halved(training):
    """Computes in bfloat16; weights and the optimizer's state are in float32."""
    return training.trainer("irft", data=sums(training), bf16=True, reference="initial", **ROWS, **STAGES, **SGD)


def resumed(training):
    """A run whose optimizer has a state; it goes on from the newest checkpoint in its folder."""
    settings = {"learning_rate": 1e-2, "adam_epsilon": 1e-2, "save_strategy": "steps", "save_steps": 1}
    settings |= {"num_train_epochs": 2, "save_total_limit": 9}
    return training.trainer("irft", data=sums(training), **ROWS, **STAGES, **settings)


def sums(training):
    """So many that in the last step one process has no row of a micro-batch."""
    return training.rows(21)


SCENARIOS = {
    "sft": lambda t: t.trainer("sft", data=sums(t), **ROWS, **SGD, num_train_epochs=2),
    "sft-stream": lambda t: t.trainer(
        "sft", data=sums(t).to_iterable_dataset(), **ROWS, **SGD, max_steps=2, save_strategy="steps", save_steps=1
    ),
    "sft-adapter": lambda t: t.trainer(
        "sft", data=sums(t), options=adapter(t), save_strategy="steps", save_steps=1, **ROWS, **SGD
    ),
    "sft-sorted": lambda t: t.trainer("sft", data=sums(t), train_sampling_strategy="sequential", **ROWS, **SGD),
    "sft-asft": lambda t: t.trainer(
        "sft", data=sums(t), options=adapter(t), loss_kind="asft", **ROWS, **{**SGD, "learning_rate": 0.5}
    ),
    "sft-psft": lambda t: t.trainer("sft", data=sums(t), loss_kind="psft", old_policy_steps=2, **ROWS, **SGD),
    "sft-iw": lambda t: t.trainer("sft", data=sums(t), loss_kind="iw", **ROWS, **SGD),
    "spin": lambda t: t.trainer("spin", data=sums(t), **ROWS, **SGD),
    "irft": lambda t: t.trainer("irft", data=sums(t), reference="initial", sft_weight=0.1, **ROWS, **STAGES, **SGD),
    "irft-kept": kept,
    "irft-adapter": lambda t: t.trainer("irft", data=sums(t), options=adapter(t), **ROWS, **STAGES, **SGD),
    "sdft": lambda t: t.trainer("sdft", data=sums(t), **DISTILLED, **SGD),
    "sdft-adapter": lambda t: t.trainer(
        "sdft", data=sums(t), options=adapter(t), **{**DISTILLED, "teacher": "start"}, **SGD
    ),
    "rft-model": lambda t: make(t, data=sums(t), **{**ROWS, "gradient_accumulation_steps": 1}),
    "rft-features": lambda t: t.trainer("rft", data=sums(t), options=adapter(t), **ROWS, **FEATURES),
    "irft-vllm": lambda t: t.trainer(
        "irft", data=t.rows(9), options=adapter(t), **ROWS, **{**STAGES, "num_samples": 1}, **SGD, **vllm()
    ),
    "rft-vllm": lambda t: t.trainer(
        "rft",
        data=t.rows(11),
        options=adapter(t),
        **ROWS,
        **{**FEATURES, "keep_policy": "last", "validation_rows": 3, "stages_per_epoch": 1},
        **vllm(),
    ),
    "evaluated": lambda t: t.trainer(
        "sft", data=sums(t), options={"eval_dataset": t.rows(5)}, eval_strategy="epoch", **ROWS, **SGD
    ),
}

SHARDED_ALONE = {"irft-tied": tied, "irft-resumed": resumed, "irft-bf16": halved}
"""What is tried of sharded policies besides."""


def run(folder, name):
    training = Training(folder / name)
    training.folder.mkdir(parents=True, exist_ok=True)
    trainer = (SCENARIOS | SHARDED_ALONE)[name](training)
    trainer.train(resume_from_checkpoint=trainer.resume_point())
    assert is_sharded(trainer.policy) == SHARDED
    trainer.export(training.folder / "export")
    trainer.check_export(training.folder / "export")
    record = trainer.record(name=name)
    weights = list(trainer.policy.parameters())
    held = sum((p.to_local() if SHARDED else p).numel() for p in weights) / sum(p.numel() for p in weights)
    policy = gathered(dict(trainer.policy.named_parameters()))
    if RANK == 0:
        policy = {key: value.detach().clone() for key, value in policy.items()}
        save_file(policy, training.folder / "weights.safetensors")
        facts = {
            "history": trainer.state.log_history,
            "trained": record.trained_tokens,
            "sampled": record.sampled_tokens,
            "operations": record.flops,
            "best": record.best_stage,
            "held": held,
            "reads the head in blocks": LMHead.of(base_causal_lm(trainer.policy)).is_linear,
        }
        (training.folder / "facts.json").write_text(json.dumps(facts))


# --- what goes wrong in one process --------------------------------------------------------------------------------------


def dies(folder):
    """The second process fails in its third step."""
    training = Training(folder)
    trainer = training.trainer("sft", data=sums(training), **ROWS, num_train_epochs=50)
    if RANK == 1:
        step = trainer.training_step

        def fails(*args, **kwargs):
            if trainer.state.global_step == 2:
                raise RuntimeError("planted failure of one process")
            return step(*args, **kwargs)

        trainer.training_step = fails
    trainer.train()


def not_finite(folder):
    """The loss of the second process is NaN in the third step."""
    training = Training(folder)
    trainer = training.trainer("sft", data=sums(training), **ROWS, num_train_epochs=50)
    loss = trainer.objective.loss

    def planted(tokens, step):
        found = loss(tokens, step)
        return found * float("nan") if RANK == 1 and trainer.state.global_step == 2 else found

    trainer.objective.loss = planted
    try:
        trainer.train()
    except ValueError as error:
        (folder / f"error-{RANK}.txt").write_text(f"{trainer.state.global_step}: {error}")
        time.sleep(1)


def disk_is_full(folder):
    """The first process cannot write a checkpoint."""
    training = Training(folder)
    trainer = training.trainer("sft", data=sums(training), **ROWS, save_strategy="steps", save_steps=1)
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "run.json").mkdir(exist_ok=True)  # what is to be a file is a folder
    try:
        trainer.train()
    except ValueError as error:
        (folder / f"error-{RANK}.txt").write_text(str(error))
        time.sleep(1)


def refused(folder):
    """What does not work on a sharded policy."""
    training = Training(folder)
    attempts = {
        "rft": lambda: training.trainer("rft", data=sums(training), reward="features", **ROWS),
        "asft": lambda: training.trainer("sft", data=sums(training), loss_kind="asft", **ROWS),
        "sdft": lambda: training.trainer("sdft", data=sums(training), **ROWS),
        "optim": lambda: training.trainer("sft", data=sums(training), optim="adafactor", **ROWS),
        "load_best_model_at_end": lambda: training.trainer(
            "sft",
            data=sums(training),
            options={"eval_dataset": training.rows(5)},
            load_best_model_at_end=True,
            eval_strategy="epoch",
            save_strategy="epoch",
            **ROWS,
        ),
        "vllm": lambda: training.trainer(
            "irft",
            data=sums(training),
            options=adapter(training),
            sampler="vllm",
            vllm_url="http://127.0.0.1:9",
            **{**ROWS, **STAGES},
        ),
        "layer": lambda: unknown_layer(training),
        "twice": lambda: training.run("sft", data=sums(training), **ROWS).train(),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as error:
            (folder / f"{name}-{RANK}.txt").write_text(str(error))


def unknown_layer(training):
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "OtherLayer"
    try:
        training.trainer("sft", data=sums(training), **ROWS)
    finally:
        del os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"]


# --- who writes ----------------------------------------------------------------------------------------------------------


def watch_writes(folder):
    """Paths below the folder that this process makes, writes, renames or removes from now on, in a list that grows."""
    found = []
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}

    def look(event, values):
        if event == "open":
            path, mode, flags = values
            changed = [path] if "w" in str(mode or "") or (flags or 0) & (os.O_WRONLY | os.O_RDWR) else []
        else:
            changed = values[:2] if event in changes else []
        found.extend(
            os.path.relpath(path, folder) for path in changed if isinstance(path, str | os.PathLike) and is_below(path)
        )

    def is_below(path):
        return os.path.abspath(path).startswith(str(folder) + os.sep)

    sys.addaudithook(look)
    return found


FAULTS = {"dies": dies, "not_finite": not_finite, "disk_is_full": disk_is_full, "refused": refused}


if __name__ == "__main__":
    home, *names = sys.argv[1:]
    if SHARDED:
        shard_on_a_cpu()
    written = watch_writes(Path(home).absolute())
    if names[0] == "command":
        status = main(names[1:])
        Path(home, f"written-{RANK}.json").write_text(json.dumps(written))
        sys.exit(status)
    for name in names:
        if name in FAULTS:
            (Path(home) / name).mkdir(parents=True, exist_ok=True)
            FAULTS[name](Path(home) / name)
        else:
            run(Path(home), name)
    Path(home, f"written-{RANK}.json").write_text(json.dumps(written))
