"""Requests to vLLM servers: what they say, what becomes of faults, and that weights are checked. Against a stand-in."""

import copy
import json
import threading
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.sampling import RemoteSampler, SamplingParams
from tutelage.sampling.base import stream_seed
from tutelage.sampling.dispatch import Patience
from tutelage.sampling.freshness import compare
from tutelage.sampling.vllm import VLLMSampler, check_adapter
from tutelage.sampling.vllm_command import serve_command
from tutelage.sampling.vllm_server import VLLMServer, completion_request, parse_urls
from tutelage.scoring.logps import cached_token_logps, completion_logps
from tutelage.testing.models import tiny_model
from vllm_stand_in import serving

PARAMS = SamplingParams(max_completion_length=6, stop_ids=frozenset(range(40, 60)), seed=3)
PROMPTS = [(1, 5 + i, 9, 30 + i) for i in range(10)]
QUICK = Patience(tries=3, first=0.01, longest=0.02)


@pytest.fixture
def base():
    return tiny_model("llama", initializer_range=0.2).eval()


def adapted(base, r=4, scale=0.3, seed=0):
    """A model with an adapter that changes it."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))
    shift(model, scale)
    return model.eval()


def shift(model, scale):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += scale * torch.randn_like(weight)


def make(servers, folder, **options):
    options = {"patience": QUICK, "concurrency": 4, **options}
    return VLLMSampler([VLLMServer(server.url, timeout=0.7) for server in servers], folder / "vllm", **options)


def tokens(samples):
    return [[sample.token_ids for sample in drawn] for drawn in samples]


def scorer(model):
    return lambda groups: cached_token_logps(model, groups, layout="padded", batch_size=8, pad_token_id=0)


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_are_of_the_model_that_was_handed_over(base, tmp_path):
    model = adapted(base)
    with serving(base) as servers:
        sampler = make(servers, tmp_path)
        assert isinstance(sampler, RemoteSampler)
        sampler.take_weights(model)
        drawn = sampler.sample(PROMPTS, PARAMS, num_samples=3)
    assert [len(samples) for samples in drawn] == [3] * len(PROMPTS)
    assert {s.finished for samples in drawn for s in samples} == {True, False}
    for sample in (s for samples in drawn for s in samples):
        assert sample.finished == (sample.token_ids[-1] in PARAMS.stop_ids)
        assert sample.finished or len(sample.token_ids) == PARAMS.max_completion_length
    groups = [Group(p, tuple(s.completion for s in samples)) for p, samples in zip(PROMPTS, drawn, strict=True)]
    reported = torch.tensor([sum(s.token_logps) for samples in drawn for s in samples])
    torch.testing.assert_close(reported, completion_logps(model, groups), atol=1e-3, rtol=1e-4)
    assert (reported - completion_logps(base, groups)).abs().mean() > 0.1


def test_a_sample_hangs_on_seed_stage_row_and_draw_alone(base, tmp_path):
    with serving(base, base) as servers:
        two = make(servers, tmp_path)
        whole = two.sample(PROMPTS, PARAMS, num_samples=2, rows=range(100, 110), stage=1)
        one = make(servers[:1], tmp_path, concurrency=1)
        part = one.sample(PROMPTS[4:6], PARAMS, num_samples=2, rows=[104, 105], stage=1)
        other = one.sample(PROMPTS[4:6], PARAMS, num_samples=2, rows=[104, 105], stage=2)
    assert tokens(part) == tokens(whole)[4:6]
    assert tokens(other) != tokens(part)
    seeds = {stream_seed(3, stage, row, draw) for stage in range(4) for row in range(50) for draw in range(4)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_request_leaves_nothing_to_the_servers_defaults():
    """Every sampling setting of the OpenAI and vLLM interface that changes what is drawn, at the value that does nothing."""
    body = completion_request("name", (1, 2), PARAMS, seed=9)
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": True}
    neutral |= {"bad_words": [], "stop": [], "echo": False, "stream": False, "add_special_tokens": False}
    assert {name: body[name] for name in neutral} == neutral
    assert body["stop_token_ids"] == sorted(PARAMS.stop_ids)
    assert body["seed"] == 9
    assert body["max_tokens"] == 6
    given = completion_request("name", (1,), SamplingParams(temperature=0.5, top_k=7, top_p=0.9), seed=0)
    assert (given["temperature"], given["top_k"], given["top_p"]) == (0.5, 7, 0.9)


@pytest.mark.parametrize("leak", ["end_at", "cap"])
def test_a_default_of_the_server_that_ends_completions_is_refused(base, tmp_path, leak):
    with serving(base) as servers:
        sampler = make(servers, tmp_path)
        samples = sampler.sample(PROMPTS, PARAMS)
        ends = [s.token_ids[0] for (s,) in samples if s.token_ids[0] not in PARAMS.stop_ids]
        setattr(servers[0], leak, {"end_at": ends[0], "cap": 2}[leak])
        with pytest.raises(UserError, match="ended a completion in its own way"):
            sampler.sample(PROMPTS, PARAMS)


def test_prompts_longer_than_the_server_takes_are_refused(base, tmp_path):
    with serving(base) as servers:
        servers[0].longest = 9
        with pytest.raises(UserError, match=r"takes 9 tokens \(--max-model-len\).* have 10"):
            make(servers, tmp_path).sample(PROMPTS, PARAMS)


# --- servers and their faults ----------------------------------------------------------------------------------------


def test_requests_overlap_up_to_the_bound_and_servers_share_them(base, tmp_path):
    with serving(base, base) as servers:
        for server in servers:
            server.delay = 0.01
        make(servers, tmp_path, concurrency=3).sample(PROMPTS, PARAMS, num_samples=4)
        assert [server.busiest for server in servers] == [3, 3]
        assert sum(len(server.requests) for server in servers) == 40
        assert min(len(server.requests) for server in servers) > 5


@pytest.mark.parametrize("fault", [503, 500, "drop", "sleep"])
def test_work_of_a_server_that_fails_moves_to_the_others(base, tmp_path, fault, caplog):
    with serving(base, base) as servers:
        expected = make(servers[:1], tmp_path).sample(PROMPTS, PARAMS, num_samples=2)
        servers[0].fault = lambda path, body: fault if path == "/v1/completions" else None
        found = make(servers, tmp_path).sample(PROMPTS, PARAMS, num_samples=2)
    assert tokens(found) == tokens(expected)
    assert f"vLLM server {servers[0].url}" in caplog.text


@pytest.mark.parametrize("fault", [503, "drop"])
def test_a_server_that_recovers_is_used_again(base, tmp_path, fault):
    with serving(base) as servers:
        expected = make(servers, tmp_path).sample(PROMPTS, PARAMS)
        seen = []

        def once(path, body):
            seen.append(path)
            return fault if path == "/v1/completions" and seen.count(path) in (3, 9) else None

        servers[0].fault = once
        assert tokens(make(servers, tmp_path).sample(PROMPTS, PARAMS)) == tokens(expected)


def test_an_idle_connection_that_the_server_closed_is_no_fault(base, tmp_path, caplog):
    with serving(base) as (server,):
        client = VLLMServer(server.url, timeout=5)
        client.models()
        client._own.connection.sock.shutdown(2)
        assert client.version() == "stand-in"
        assert caplog.text == ""


def test_no_server_left_is_one_error_that_names_each(base, tmp_path):
    with serving(base, base) as servers:
        servers[0].fault = lambda path, body: 503
        servers[1].fault = lambda path, body: "drop"
        with pytest.raises(UserError) as error:
            make(servers, tmp_path).sample(PROMPTS, PARAMS)
    text = str(error.value)
    assert "no vLLM server is left after 3 attempts" in text
    assert "out of cache" in text
    assert all(server.url in text for server in servers)
    assert "--resume" in text


def test_a_server_that_is_not_there(tmp_path):
    sampler = VLLMSampler([VLLMServer("http://127.0.0.1:9")], tmp_path, patience=QUICK)
    with pytest.raises(UserError, match="cannot be reached"):
        sampler.sample(PROMPTS, PARAMS)


def test_a_request_that_always_fails_ends_the_run_and_others_are_kept(base, tmp_path):
    with serving(base) as servers:
        servers[0].fault = lambda path, body: 500 if body and body.get("prompt") == list(PROMPTS[7]) else None
        finished = []
        with pytest.raises(UserError, match="out of cache"):
            make(servers, tmp_path, patience=Patience(9, 0.01, 0.02)).sample(
                PROMPTS, PARAMS, on_finished=lambda place, drawn: finished.append(place)
            )
    assert set(finished) >= set(range(4))


def test_an_answer_that_no_attempt_would_better_is_told_at_once(base, tmp_path):
    with serving(base) as servers:
        servers[0].fault = lambda path, body: 400 if path == "/v1/completions" else None
        with pytest.raises(UserError, match="answered 400: out of cache"):
            make(servers, tmp_path).sample(PROMPTS, PARAMS)
        assert len(servers[0].requests) == 0


def test_asked_to_stop_while_a_server_is_slow(base, tmp_path):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with serving(base) as servers:
        servers[0].delay = 0.5
        stream = make(servers, tmp_path).stream(PROMPTS * 20, PARAMS, on_wait=stop)
        before = threading.active_count()
        with pytest.raises(Stop):
            next(stream)
        deadline = time.monotonic() + 10
        while threading.active_count() > before + 8 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(servers[0].requests) < 40, "nothing more is asked"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no server"),
        ("localhost:8000", "is not the address"),
        ("ftp://a", "is not the address"),
        ("http://a:port", "is not the address"),
        ("http://user:secret@a", "is not the address"),
        ("http://a/v1", "ends with /v1"),
        ("http://a,http://a/", "twice"),
    ],
)
def test_addresses_that_are_none(text, problem):
    with pytest.raises(UserError, match=problem):
        parse_urls(text)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_each_stage_has_a_new_name_and_the_old_adapter_is_gone(base, tmp_path):
    model = adapted(base)
    with serving(base) as (server,):
        sampler = make([server], tmp_path)
        for stage in range(3):
            sampler.take_weights(model)
            sampler.take_weights(model)
            sampler.sample(PROMPTS[:2], PARAMS, stage=stage)
            assert len(server.adapters) == 1
            assert len(list((tmp_path / "vllm").iterdir())) == 1
            shift(model, 0.1)
        assert len(set(server.loaded)) == 3
        sampler.release()
        assert server.adapters == {}
        assert not (tmp_path / "vllm").exists()


def test_what_a_killed_run_left_is_unloaded_and_of_others_is_not(base, tmp_path):
    with serving(base) as (server,):
        for folder, scale in ((tmp_path / "a", 0.1), (tmp_path / "b", 0.2), (tmp_path / "a", 0.3)):
            sampler = make([server], folder)
            sampler.take_weights(adapted(base, scale=scale))
            sampler.sample(PROMPTS[:1], PARAMS)
        assert len(server.loaded) == 3
        assert list(server.adapters) == server.loaded[1:]


@pytest.mark.parametrize("changed", [True, False])
def test_a_server_left_on_the_last_stages_adapter_is_caught(base, tmp_path, changed):
    """Though its log-probs differ by less than the tolerance. The adapter that it should have is in no doubt."""
    model = adapted(base)
    with serving(base) as (server,):
        sampler = make([server], tmp_path, tolerance=10.0)
        for stage in range(2):
            sampler.take_weights(model)
            sampler.verify([Group(p) for p in PROMPTS], PARAMS, scorer(model))
            sampler.sample(PROMPTS, PARAMS, stage=stage)
            shift(model, 0.05)
        server.stale = changed
        sampler.take_weights(model)
        sampler.verify([Group(p) for p in PROMPTS], PARAMS, scorer(model))
        if not changed:
            sampler.sample(PROMPTS, PARAMS)
            assert sampler.gap < 1e-3
            return
        with pytest.raises(UserError, match="holds other weights than the trainer: its log-probs are nearer"):
            sampler.sample(PROMPTS, PARAMS)


def test_an_adapter_that_the_server_leaves_out_is_caught(base, tmp_path):
    """At the first hand-over, beside the base alone."""
    model = adapted(base, scale=0.02)
    with serving(base) as (server,):
        server.load = lambda name, path: server.adapters.update({name: server.model})
        sampler = make([server], tmp_path, tolerance=10.0)
        sampler.take_weights(model)
        sampler.verify([Group(p) for p in PROMPTS], PARAMS, scorer(model))
        with pytest.raises(UserError, match="holds other weights"):
            sampler.sample(PROMPTS, PARAMS)


@pytest.mark.parametrize("wrong", ["rank", "base"])
def test_other_weights_are_caught(base, tmp_path, wrong):
    model = adapted(base, scale=0.1)
    other = tiny_model("llama", initializer_range=0.2, seed=5) if wrong == "base" else base
    with serving(other.eval()) as (server,):
        if wrong == "rank":
            adapted(base, r=8, scale=0.1, seed=1).save_pretrained(tmp_path / "other")
            load = server.load
            server.load = lambda name, path: load(name, str(tmp_path / "other"))
        sampler = make([server], tmp_path)
        sampler.take_weights(model)
        sampler.verify([Group(p) for p in PROMPTS], PARAMS, scorer(model))
        with pytest.raises(UserError, match="differ from the trainer's by"):
            sampler.sample(PROMPTS, PARAMS)


def test_a_server_that_was_started_anew_is_handed_the_adapter_again(base, tmp_path):
    model = adapted(base)
    with serving(base) as (server,):
        sampler = make([server], tmp_path)
        sampler.take_weights(model)
        expected = sampler.sample(PROMPTS, PARAMS)
        server.adapters.clear()
        assert tokens(sampler.sample(PROMPTS, PARAMS)) == tokens(expected)
        assert len(server.loaded) == 2


def test_an_adapter_that_the_server_does_not_take_is_told(base, tmp_path):
    with serving(base) as (server,):
        server.fault = lambda path, body: 404 if path == "/v1/load_lora_adapter" else None
        sampler = make([server], tmp_path)
        sampler.take_weights(adapted(base))
        with pytest.raises(UserError, match="did not take the adapter"):
            sampler.sample(PROMPTS, PARAMS)


@pytest.mark.parametrize("reloads", [True, False])
def test_all_parameters_need_a_reload(base, tmp_path, reloads):
    model = copy.deepcopy(base)
    with serving(base) as (server,):
        server.reloads = reloads
        sampler = make([server], tmp_path)
        for stage in range(2):
            sampler.take_weights(model)
            sampler.verify([Group(p) for p in PROMPTS], PARAMS, scorer(model))
            if stage and not reloads:
                with pytest.raises(UserError, match=r"asked to reload them, it answered 404.*VLLM_SERVER_DEV_MODE=1"):
                    sampler.sample(PROMPTS, PARAMS)
                server.reload(str(next((tmp_path / "vllm").iterdir())))  # what the error says: start it anew with that
            sampler.sample(PROMPTS, PARAMS)
            assert sampler.gap < 1e-3
            with torch.no_grad():
                for weight in model.parameters():
                    weight += 0.05 * torch.randn_like(weight)


def test_an_adapter_of_another_name_is_handed_over(base, tmp_path):
    model = adapted(base)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.set_adapter("other")
    shift(model, 0.3)
    with serving(base) as (server,):
        sampler = make([server], tmp_path)
        sampler.take_weights(model)
        sampler.verify([Group(p) for p in PROMPTS], PARAMS, scorer(model))
        sampler.sample(PROMPTS, PARAMS)
        assert sampler.gap < 1e-3
        assert [path.name for path in (tmp_path / "vllm").iterdir()] == [sampler._path.name]


def test_another_server_with_the_same_name_does_not_pass(base, tmp_path):
    """All parameters have no name of their own at a server: one that was started anew between draws is compared again."""
    model = copy.deepcopy(base)
    with serving(base) as (server,):
        server.reloads = True
        sampler = make([server], tmp_path)
        sampler.take_weights(model)
        sampler.verify([Group(p) for p in PROMPTS], PARAMS, scorer(model))
        sampler.sample(PROMPTS, PARAMS)
        server.change = -0.5
        with pytest.raises(UserError, match="holds other weights"):
            sampler.sample(PROMPTS, PARAMS)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"init_lora_weights": "pissa"}, "a change of its base"),
    ],
)
def test_adapters_that_vllm_does_not_serve_are_refused_at_the_start(base, config, problem):
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **config))
    with pytest.raises(UserError, match=problem):
        check_adapter(model)


def test_no_noise_makes_a_fresh_sampler_an_old_one():
    """However small the change is beside the roundings of both; one as large as they are is seen."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale=0.03):
        return scale * torch.randn(2000, generator=generator, dtype=torch.float64).numpy()

    for scale in (0.0, 0.003, 0.01, 0.03, 0.1):
        for _ in range(50):
            old = noise(1.0)
            new = old + noise(scale)
            earlier, trainer = old + noise(), new + noise()
            fresh, stale = (compare(held + noise(), trainer, earlier) for held in (new, old))
            assert not fresh.is_old
            assert not stale.is_new
            assert (fresh.is_new and stale.is_old) or scale < 0.03


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_serves_the_base_of_an_adapter(base, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "my base", "r": 48}))
    told = serve_command(str(tmp_path), longest=100, lora_r=8)
    assert "--model 'my base'" in told
    assert "--max-lora-rank 64" in told
    assert "--max-model-len 101" in told
    full = serve_command("model", longest=100, lora_r=None, tensor_parallel_size=2)
    assert full.startswith("VLLM_SERVER_DEV_MODE=1 python -m vllm.")
    assert "--tensor-parallel-size 2" in full
    assert "lora" not in full
    with pytest.raises(UserError, match="512 at most"):
        serve_command("model", longest=100, lora_r=513)
