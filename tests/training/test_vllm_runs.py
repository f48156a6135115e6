"""Runs that sample on vLLM servers, against a stand-in: hand-over in every phase, resuming, and what the run says."""

import json

import pytest
import torch
from datasets import Dataset
from transformers.trainer_utils import get_last_checkpoint

from training_runs import SGD, assert_same_weights, history
from tutelage.errors import UserError
from tutelage.sampling.dispatch import Patience
from tutelage.testing.models import tiny_model
from vllm_stand_in import serving

SETTINGS = {
    **SGD,
    "sampler": "vllm",
    "stages_per_epoch": 2,
    "per_device_train_batch_size": 4,
    "sampling_batch_size": 2,
    "learning_rate": 0.5,
    "vllm_concurrency": 2,
    "vllm_timeout": 20.0,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("tutelage.sampling.dispatch.Patience.__init__.__defaults__", (3, 0.01, 0.02))


def make(training, servers, algorithm="irft", *, peft=True, options=None, **settings):
    url = ",".join(server.url for server in servers)
    options = {**({"peft_config": training.lora()} if peft else {}), **(options or {})}
    return training.trainer(algorithm, options=options, **{**SETTINGS, "vllm_url": url, **settings})


def samples(folder):
    return {
        path.relative_to(folder): [
            (line["row"], [(c["token_ids"], c["finished"]) for c in line["completions"] if c["role"] == "sample"])
            for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        ]
        for path in sorted(folder.glob("stages/**/samples.jsonl"))
    }


@pytest.mark.parametrize("algorithm", ["irft", "spin", "sdft"])
def test_a_run_samples_from_the_policy_of_each_stage(training, algorithm):
    with serving(training.model()) as (server,):
        more = {"samplings_per_stage": 1} if algorithm == "sdft" else {}
        trainer = make(training, [server], algorithm, stages_per_epoch=1 if algorithm == "spin" else 2, **more)
        trainer.train()
        stages = 1 if algorithm == "spin" else 2
        assert len(server.loaded) == len(set(server.loaded)) == stages
        assert server.adapters == {}, "nothing is left at the end"
        assert not (training.folder / "run" / "vllm").exists()
        # In float32 on both sides the gap is rounding, so the server's log-probs serve.
        for name in ("sampler/logp_gap", "samples/logp_gap"):
            assert len(history(trainer, name)) == stages
            assert max(history(trainer, name)) < 1e-3
    manifest = json.loads((training.folder / "run" / "stages" / "stage-0000" / "manifest.json").read_text())
    assert manifest["sampler/logp_gap"] == history(trainer, "sampler/logp_gap")[0]
    assert manifest["settings"]["sampler"] == "vllm"


def test_a_run_of_rft_samples_everything_there(training):
    """Validation rows, negatives of the initial model and of folds, prompts without demonstrations, samples of stages."""
    prompts = Dataset.from_list([{"prompt": f"What is {i} + {i + 1}?"} for i in range(6)])
    with serving(training.model()) as (server,):
        trainer = make(
            training,
            [server],
            "rft",
            num_samples=2,
            validation_rows=4,
            fold_epochs=4,
            reward_gate="off",
            reward_negatives="own,initial,out_of_fold",
            options={"prompt_dataset": prompts},
        )
        trainer.stages.rollout.sampler.tolerance = 0.01
        trainer.train()
        asked = {tuple(body["prompt"]) for body in server.requests}
        known = {tuple(row["prompt_ids"]) for row in trainer.train_dataset}
        assert known <= asked
        # The start, the two folds and the policies of the stages; the fresh adapter is the policy's own at the start.
        assert len(server.loaded) >= 4
        assert server.adapters == {}
    assert trainer.stages.phase.selection


@pytest.mark.parametrize("killed_by", ["server", "answer"])
def test_a_run_whose_servers_die_goes_on_behind_its_samples(training, killed_by):
    with serving(training.model()) as (server,):
        make(training, [server], name="whole").train()
        asked = []

        def dying(path, body):
            asked.append(path)
            stage_0 = 16 // 2 + 16  # its samples, and the probe drawn and scored
            if path == "/v1/completions" and asked.count(path) > stage_0 + 5 * (killed_by == "server"):
                return "drop" if killed_by == "server" else 400
            return None

        server.fault = dying
        with pytest.raises(UserError, match="--resume"):
            make(training, [server], save_strategy="steps", save_steps=1).train()
        kept = sum(
            len(path.read_text().splitlines()) for path in (training.folder / "run").glob("stages/**/samples.jsonl*")
        )
        assert kept > 0
        server.fault = lambda path, body: None
        before = len(server.requests)
        resumed = make(training, [server], save_strategy="steps", save_steps=1)
        resumed.train(resume_from_checkpoint=get_last_checkpoint(str(training.folder / "run")))
        sampled = [body for body in server.requests[before:] if body["max_tokens"] == 8 and body["seed"]]
        assert len(sampled) < 16 + 16, "not all is sampled again"
    found, expected = (samples(training.folder / name) for name in ("run", "whole"))
    assert {path: sorted(rows) for path, rows in found.items()} == {p: sorted(rows) for p, rows in expected.items()}


def test_a_stage_that_is_all_on_disk_asks_no_server(training):
    with serving(training.model()) as (server,):
        whole = make(training, [server], max_steps=2)
        whole.train()
        asked = len(server.requests)
        again = make(training, [server], max_steps=2)
        again.train()
        assert len(server.requests) == asked
    assert_same_weights(again.policy, whole.policy, 1e-5)


def test_a_server_with_another_base_stops_the_run_before_any_sample(training):
    other = tiny_model("llama", vocab_size=len(training.tokenizer), num_hidden_layers=2, seed=7, initializer_range=0.3)
    with serving(other) as (server,), pytest.raises(UserError, match="holds other weights than the trainer"):
        make(training, [server]).train()
    assert samples(training.folder / "run") == {}


def test_all_parameters_without_a_reload_stop_where_the_weights_are_new(training):
    with serving(training.model()) as (server,):
        trainer = make(training, [server], peft=False)
        with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
            trainer.train()
        assert trainer.state.global_step == 2
        server.reloads = True
        make(training, [server], peft=False, name="reloading").train()


def test_log_probs_of_samples_from_other_weights_stop_the_run(training):
    """Also where the probe is right: a server may decode otherwise than it scores."""
    with serving(training.model()) as (server,):
        trainer = make(training, [server])
        trainer.stages.rollout.sampler.tolerance = 0.01
        complete = trainer.stages.rollout.sampler.servers[0].complete

        def decoding(body):
            found = complete(body)
            if "prompt_logprobs" not in body:
                found["logprobs"]["token_logprobs"] = [logp - 0.5 for logp in found["logprobs"]["token_logprobs"]]
            return found

        trainer.stages.rollout.sampler.servers[0].complete = decoding
        with pytest.raises(UserError, match=r"log-probs of samples from vLLM differ from the trainer's by 0\.5"):
            trainer.train()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"vllm_url": None}, "vllm_url"),
        ({"vllm_url": "localhost:8000"}, "vllm_url"),
        ({"sampler": "transformers"}, "vllm_url"),
        ({"sampler": "sglang"}, "sampler"),
        ({"vllm_concurrency": 0}, "vllm_concurrency"),
        ({"vllm_timeout": 0.0}, "vllm_timeout"),
    ],
)
def test_settings_that_cannot_be_meant(training, settings, field):
    with pytest.raises(UserError) as error:
        training.trainer("irft", **{**SETTINGS, "vllm_url": "http://127.0.0.1:9", **settings})
    assert error.value.field == field


def test_the_sampler_is_what_the_run_is_and_its_address_is_not(training):
    with serving(training.model(), training.model()) as servers:
        make(training, servers[:1], save_strategy="steps", save_steps=1, max_steps=3).train()
        other = make(training, servers[1:], save_strategy="steps", save_steps=1, max_steps=3)
        assert other.resume_point() is not None
        with pytest.raises(UserError, match="sampler"):
            training.trainer(
                "irft",
                options={"peft_config": training.lora()},
                **{
                    **SETTINGS,
                    "sampler": "transformers",
                    "save_strategy": "steps",
                    "save_steps": 1,
                    "max_steps": 3,
                },
            ).resume_point()
    assert torch.isfinite(next(other.policy.parameters())).all()
    assert Patience().tries == 3
