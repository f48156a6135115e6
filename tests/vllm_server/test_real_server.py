"""Against real vLLM: whole runs, the whole distribution, and weights that are not the trainer's."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from conftest import started
from training_runs import SETTINGS, history
from tutelage.algorithms.registry import find
from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.models.loading import load_model
from tutelage.sampling import SamplingParams
from tutelage.sampling.dispatch import Patience
from tutelage.sampling.vllm import VLLMSampler
from tutelage.sampling.vllm_server import ServerFault, VLLMServer
from tutelage.scoring.logps import cached_token_logps, completion_logps

pytestmark = pytest.mark.timeout(1500)

ROUNDING = 1e-3  # nats per token in float32
PARAMS = SamplingParams(max_completion_length=8, stop_ids=frozenset({7, 11}), seed=5)
PROMPTS = [(1, 5 + i, 30 + 2 * i, 100 + i) for i in range(16)]
TWO_STAGES = {"sampler": "vllm", "stages_per_epoch": 2, "max_prompt_length": 120, "learning_rate": 5e-3}
RFT = {"num_samples": 2, "validation_rows": 4, "fold_epochs": 2, "reward_gate": "off"}


def run(model, server, folder, algorithm="irft", *, peft=True, train=True, **settings):
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f" The answer is {2 * i}"} for i in range(20)]
    found = find(algorithm)
    options = {"prompt_dataset": Dataset.from_list([{"prompt": f"What is {i} + 1?"} for i in range(4)])}
    settings = {**SETTINGS, **TWO_STAGES, **(RFT if algorithm == "rft" else {}), "vllm_url": server.url, **settings}
    trainer = found.trainer(
        load_model(
            str(model), dtype=None, whole=not peft, computing=torch.bfloat16 if settings["bf16"] else torch.float32
        ),
        found.config(output_dir=str(folder), **settings),
        Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None,
        **(options if algorithm == "rft" else {}),
    )
    if train:
        trainer.train()
    return trainer


def adapted(base, *, r=8, scale=0.05, seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))
    move(model, scale)
    return model.eval()


def move(model, scale):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += scale * torch.randn_like(weight)


def score(model):
    return lambda groups: cached_token_logps(model, groups, layout="padded", batch_size=8, pad_token_id=0)


def draw(sampler, model, stage=0, num_samples=1):
    """Samples of a policy that is handed over and verified."""
    sampler.take_weights(model)
    sampler.verify([Group(prompt) for prompt in PROMPTS], PARAMS, score(model))
    return sampler.sample(PROMPTS, PARAMS, num_samples=num_samples, stage=stage)


def make(server, folder, **options):
    return VLLMSampler([VLLMServer(server.url, timeout=120)], folder / "handed", concurrency=16, **options)


def names(server):
    return [model.name for model in VLLMServer(server.url).models() if model.parent is not None]


@pytest.fixture
def base(small):
    return AutoModelForCausalLM.from_pretrained(small).eval()


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["irft", "spin", "rft"])
def test_two_stages(small, served, tmp_path, algorithm):
    stages = 1 if algorithm == "spin" else 2
    trainer = run(small, served, tmp_path / "run", algorithm, stages_per_epoch=stages)
    for name in ("sampler/logp_gap", "samples/logp_gap"):
        assert len(history(trainer, name)) == stages
        assert max(history(trainer, name)) < ROUNDING
    stop_ids = trainer.tokenization.stop_ids(trainer.conversational)
    lines = [line for path in (tmp_path / "run").glob("stages/**/samples.jsonl") for line in path.open()]
    for line in map(json.loads, lines):
        for completion in line["completions"]:
            if completion["role"] == "sample":
                ids = completion["token_ids"]
                assert completion["finished"] == (ids[-1] in stop_ids)
                assert completion["finished"] or len(ids) == 8
                assert stop_ids.isdisjoint(ids[:-1])
    assert names(served) == [], "nothing is left at the server"


@pytest.mark.parametrize("algorithm", ["irft", "rft"])
def test_two_stages_of_gemma_in_bfloat16(gemma, tmp_path, algorithm, gemma_server):
    trainer = run(gemma, gemma_server, tmp_path / "run", algorithm, bf16=True, learning_rate=2e-4)
    for name in ("sampler/logp_gap", "samples/logp_gap"):
        assert len(history(trainer, name)) == 2
        assert max(history(trainer, name)) < 0.1


@pytest.fixture(scope="module")
def gemma_server(gemma, tmp_path_factory):
    with started(gemma, tmp_path_factory.mktemp("log") / "gemma.log", dtype="bfloat16") as server:
        yield server


def test_all_parameters_by_reload(small, tmp_path):
    with started(small, tmp_path / "full.log", full=True) as server:
        trainer = run(small, server, tmp_path / "run", peft=False, learning_rate=1e-3)
        assert len(history(trainer, "sampler/logp_gap")) == 2
        assert max(history(trainer, "sampler/logp_gap")) < ROUNDING
        assert trainer.state.global_step == 5


def test_all_parameters_without_a_reload_are_refused(small, served, tmp_path):
    with pytest.raises(UserError, match=r"answered 404.*VLLM_SERVER_DEV_MODE=1"):
        run(small, served, tmp_path / "run", peft=False, learning_rate=1e-3)


def test_a_server_that_dies_within_a_stage(small, tmp_path, monkeypatch):
    monkeypatch.setattr("tutelage.sampling.dispatch.Patience.__init__.__defaults__", (3, 0.1, 0.5))
    with started(small, tmp_path / "dying.log") as server:
        settings = {"save_strategy": "steps", "save_steps": 1, "vllm_concurrency": 1, "sampling_batch_size": 1}
        trainer = run(small, server, tmp_path / "run", train=False, **settings)
        sampler, seen = trainer.stages.rollout.sampler, []
        complete = sampler.servers[0].complete

        def dying(body):
            if trainer.stage == 1 and body["max_tokens"] == 8:  # a sample
                seen.append(body)
            if len(seen) == 6:
                server.kill()
            return complete(body)

        sampler.servers[0].complete = dying
        with pytest.raises(UserError, match=r"no vLLM server is left after 3 attempts.*--resume"):
            trainer.train()
        kept = len((tmp_path / "run" / "stages" / "stage-0001" / "samples.jsonl.part").read_text().splitlines())
        assert kept > 0
        server.start()
        resumed = run(small, server, tmp_path / "run", train=False, **settings)
        asked = []
        sampler = resumed.stages.rollout.sampler
        stream = sampler.stream
        sampler.stream = lambda prompts, *args, **options: (
            asked.append(len(prompts)) or stream(prompts, *args, **options)
        )
        resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "run")))
        assert resumed.state.global_step == 5
        stage_rows = len((tmp_path / "run" / "stages" / "stage-0001" / "samples.jsonl").read_text().splitlines())
        assert asked[-1] == stage_rows - kept, "what was finished is not drawn again"


# --- samples ---------------------------------------------------------------------------------------------------------


def test_no_default_of_a_server_reaches_a_sample(base, leaking, tmp_path):
    """The log-prob of a token plus the entropy where it was drawn is zero on average, in the whole distribution alone."""
    with pytest.raises(UserError, match="ended a completion in its own way"):
        make(leaking, tmp_path).sample(PROMPTS, PARAMS)  # of max_new_tokens it cannot be talked out, which is told
    params = SamplingParams(max_completion_length=3, stop_ids=frozenset({7, 11}), seed=5)
    drawn = make(leaking, tmp_path).sample(PROMPTS, params, num_samples=60)
    excess = []
    for prompt, samples in zip(PROMPTS, drawn, strict=True):
        for sample in samples:
            ids = torch.tensor([prompt + sample.token_ids])
            with torch.no_grad():
                logps = torch.log_softmax(base(ids).logits[0, len(prompt) - 1 : -1].double(), -1)
            own = logps.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(own, torch.tensor(sample.token_logps, dtype=own.dtype), atol=1e-3, rtol=0)
            excess += (own + -(logps.exp() * logps).sum(-1)).tolist()
    excess = torch.tensor(excess)
    assert abs(excess.mean()) < 5 * excess.std() / len(excess) ** 0.5
    firsts = {sample.token_ids[0] for sample in drawn[0]}
    assert len(firsts) > 20, "top-k of 1 would give one"


def test_samples_are_those_of_their_row_and_draw(base, served, tmp_path):
    model = adapted(base)
    whole = draw(make(served, tmp_path / "a"), model, num_samples=2)
    sampler = make(served, tmp_path / "b")
    sampler.take_weights(model)
    part = sampler.sample(PROMPTS[8:], PARAMS, num_samples=1, rows=range(8, 16))
    same = sum(a[0].token_ids == b[0].token_ids for a, b in zip(part, whole[8:], strict=True))
    assert same >= 7, "one may fall on the edge between two tokens, where batches round differently"
    assert len({sample.token_ids for samples in whole for sample in samples}) > 28


def test_samples_and_log_probs_are_the_adapters(base, served, tmp_path):
    model = adapted(base, scale=0.2)
    drawn = draw(make(served, tmp_path), model, num_samples=2)
    groups = [Group(p, tuple(s.completion for s in samples)) for p, samples in zip(PROMPTS, drawn, strict=True)]
    reported = torch.tensor([sum(s.token_logps) for samples in drawn for s in samples])
    torch.testing.assert_close(reported, completion_logps(model, groups), atol=1e-2, rtol=1e-3)
    assert (reported - completion_logps(base, groups)).abs().mean() > 0.1


# --- weights ---------------------------------------------------------------------------------------------------------


class Stale(VLLMServer):
    """Loads what it loaded first, whatever it is told."""

    first = None

    def load_adapter(self, name, path):
        if self.first is None:
            self.first = str(Path(path).parents[1] / "kept")
            shutil.copytree(path, self.first)
        super().load_adapter(name, self.first)


def test_a_server_left_on_the_last_stages_adapter(base, served, tmp_path):
    model = adapted(base)
    sampler = make(served, tmp_path, tolerance=10.0)  # the gap alone would pass
    sampler.servers[0].__class__ = Stale
    draw(sampler, model)
    move(model, 0.003)
    with pytest.raises(UserError, match="holds other weights than the trainer: its log-probs are nearer"):
        draw(sampler, model, stage=1)


def test_the_same_small_change_that_the_server_made_passes(base, served, tmp_path):
    model = adapted(base)
    sampler = make(served, tmp_path)
    for stage in range(3):
        draw(sampler, model, stage=stage)
        assert sampler.gap < ROUNDING
        assert len([name for name in names(served) if name.startswith(sampler._mark)]) == 1
        move(model, 0.003)
    sampler.release()


@pytest.mark.parametrize("wrong", ["adapter of another rank", "base", "quantized base"])
def test_other_weights(base, served, tmp_path, wrong):
    model = adapted(base, scale=0.05)
    sampler = make(served, tmp_path)
    if wrong == "adapter of another rank":
        adapted(base, r=16, seed=1, scale=0.05).save_pretrained(tmp_path / "other")
        load = sampler.servers[0].load_adapter
        sampler.servers[0].load_adapter = lambda name, path: load(name, str(tmp_path / "other"))
    else:
        with torch.no_grad():
            for name, weight in base.named_parameters():
                if weight.dim() == 2 and wrong == "base":
                    weight += 0.02 * torch.randn_like(weight)
                elif weight.dim() == 2 and "embed" not in name:  # to 4 bits, 32 at a time
                    blocks = weight.view(-1, 32)
                    step = blocks.abs().amax(-1, keepdim=True) / 7
                    blocks.copy_((blocks / step).round() * step)
        model = adapted(base, scale=0.05)  # the trainer's is the other one; which of the two it is makes no difference
    with pytest.raises(UserError, match="differ from the trainer's by"):
        draw(sampler, model)


def test_a_rank_that_the_server_has_no_room_for(base, served, tmp_path):
    with pytest.raises(UserError, match="did not take the adapter") as error:
        draw(make(served, tmp_path), adapted(base, r=32))
    assert "rank" in str(error.value)


def test_a_prompt_that_is_too_long_for_the_server(base, served, tmp_path):
    with pytest.raises(UserError, match="takes 201 tokens"):
        make(served, tmp_path).sample([(1,) * 195], PARAMS)


def test_a_token_that_the_model_does_not_know_is_told_at_once(served, tmp_path):
    sampler = make(served, tmp_path, patience=Patience(3, 0.01, 0.1))
    with pytest.raises(UserError, match=r"answered 400.*out of vocabulary"):
        sampler.sample([(1, 10**6)], PARAMS)
    with pytest.raises(ServerFault):
        VLLMServer(served.url).unload_adapter("unknown")
