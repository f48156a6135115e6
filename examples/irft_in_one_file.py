"""IRFT in one file: Algorithm 2 of Li et al., "Getting More Juice Out of the SFT Data" (NeurIPS 2024, arXiv 2405.17888).

Plain torch and transformers, nothing of this library: read it from top to bottom to learn the method. The library
computes the same numbers (tests/examples/test_example_irft.py compares them), only faster and in less memory.

    python examples/irft_in_one_file.py                                    # a tiny random model, under a minute, offline
    python examples/irft_in_one_file.py --model MODEL --data FILE.jsonl    # lines of {"prompt": ..., "completion": ...}

**The idea.** Demonstrations y show what a good answer to a prompt x looks like. SFT only raises their probability. IRFT
also learns what sets them apart from what the policy answers now. The KL-regularized policy of a reward r is
π(y|x) ∝ π_t(y|x) exp(r(x, y) / β), so a policy π implies the reward, up to a constant that depends on x alone:

    r(x, y) = β [log π(y|x) − log π_t(y|x)]

Training π so that this reward prefers demonstrations to the policy's own samples learns reward and policy at once.

**The algorithm.** The demonstrations are divided among T stages. In each stage t:

1. Freeze the policy as π_t. (We need only its log-probs of this stage's completions, so we compute them and keep no copy.)
2. For each prompt, draw samples ỹ ~ π_t(·|x), at temperature 1.
3. Take optimizer steps on the mean over pairs (y, ỹ) of −log σ(z), where the margin z is r(x, y) − r(x, ỹ):

       z = β [log π(y|x) − log π_t(y|x) − log π(ỹ|x) + log π_t(ỹ|x)]

T = 1 is SPIN (arXiv 2401.01335). With more stages the samples come from a more recent policy. A stage begins with
π = π_t, so its first margins are 0 and its first losses are log 2; the margins grow within the stage.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig


class Demonstration(NamedTuple):
    """Token ids of a prompt x and of its demonstrated completion y, which ends with the end-of-sequence token."""

    prompt: list[int]
    completion: list[int]


class Step(NamedTuple):
    """One optimizer step: its stage, and the means of loss and margin over its pairs, before the weights change."""

    stage: int
    loss: float
    margin: float


def encode(tokenizer: Any, prompt: str, completion: str) -> Demonstration:
    """Tokenize both together and take the completion as what follows the prompt's tokens."""
    prompt_ids, joint_ids = (list(tokenizer(text)["input_ids"]) for text in (prompt, prompt + completion))
    for ids in (prompt_ids, joint_ids):
        if ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text with it
            ids.pop()
    if joint_ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(f"the tokenizer merges the end of this prompt with its completion: {prompt!r}")
    return Demonstration(prompt_ids, [*joint_ids[len(prompt_ids) :], tokenizer.eos_token_id])


def logp(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """log π(y|x): the sum over the completion's tokens of their log-probs, in nats. The prompt's tokens do not count."""
    ids = torch.tensor([prompt + completion], device=model.device)
    logits = model(input_ids=ids).logits[0, :-1].float()  # the logits at position i predict token i + 1
    token_logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return token_logps[len(prompt) - 1 :].sum()


@torch.no_grad()
def sample(model: Any, prompt: list[int], *, num_samples: int, max_tokens: int, eos_id: int) -> list[list[int]]:
    """Draw completions ỹ ~ π(·|x) at temperature 1 from the whole vocabulary, up to and with the end-of-sequence token.

    Top-k, top-p or another temperature would draw from a distribution that is not π, and the theory wants π.
    """
    inputs, cache, drawn = torch.tensor([prompt] * num_samples, device=model.device), None, []
    finished = torch.zeros(num_samples, dtype=torch.bool, device=model.device)
    while len(drawn) < max_tokens and not finished.all():
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache, probabilities = output.past_key_values, output.logits[:, -1].float().softmax(-1)
        inputs = torch.multinomial(probabilities, 1)  # from here on only the new token is fed: the cache has the rest
        drawn.append(inputs)
        finished |= inputs[:, 0] == eos_id
    rows = torch.cat(drawn, 1).tolist()
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def irft(
    model: Any,
    demonstrations: list[Demonstration],
    optimizer: torch.optim.Optimizer,
    draw: Callable[[int, list[int]], list[list[int]]],
    *,
    stages: int,
    batch_size: int,
    beta: float,
    max_grad_norm: float = 1.0,
) -> Iterator[Step]:
    """Train ``model`` in one pass over the demonstrations, in their order; yields after each optimizer step.

    Args:
        draw: returns the samples for a stage and a prompt.
        stages: T. Stage t has the batches from ⌊tB/T⌋ up to ⌊(t+1)B/T⌋, where B ≥ T is the number of batches.
    """
    batches = [demonstrations[start : start + batch_size] for start in range(0, len(demonstrations), batch_size)]
    if stages > len(batches):
        raise ValueError(f"{stages} stages do not fit into {len(batches)} batches")
    for stage in range(stages):
        # Steps 1 and 2: while the policy is still π_t, draw this stage's samples and record π_t's log-probs.
        frozen = []
        model.eval()
        for batch in batches[stage * len(batches) // stages : (stage + 1) * len(batches) // stages]:
            pairs = []
            for prompt, demonstrated in batch:
                for sampled in draw(stage, prompt):
                    with torch.no_grad():
                        references = logp(model, prompt, demonstrated), logp(model, prompt, sampled)
                    pairs.append((prompt, demonstrated, sampled, *references))
            frozen.append(pairs)
        # Step 3: an optimizer step on the pairs of each batch.
        model.train()
        for pairs in frozen:
            margins = []
            for prompt, demonstrated, sampled, reference_demonstrated, reference_sampled in pairs:
                demonstrated_reward = beta * (logp(model, prompt, demonstrated) - reference_demonstrated)
                sampled_reward = beta * (logp(model, prompt, sampled) - reference_sampled)
                margins.append(demonstrated_reward - sampled_reward)
            margin = torch.stack(margins)
            loss = -F.logsigmoid(margin).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            yield Step(stage, loss.item(), margin.mean().item())


def tiny_random_model() -> tuple[Any, Any]:
    """A random Llama of about 0.1M parameters over bytes, and its tokenizer; nothing is downloaded."""
    tokenizer = ByT5Tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **shape)), tokenizer


def main(arguments: list[str] | None = None) -> list[Step]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of a causal language model; by default a tiny random one")
    parser.add_argument("--data", type=Path, help="JSON lines with prompt and completion; by default sums")
    parser.add_argument("--output", help="folder for the trained model")
    parser.add_argument("--stages", type=int, default=4, help="T")
    parser.add_argument("--samples", type=int, default=1, help="per prompt")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--learning_rate", type=float, help="5e-7, or 1e-3 for the tiny model")
    parser.add_argument("--batch_size", type=int, default=4, help="prompts per optimizer step")
    parser.add_argument("--max_tokens", type=int, default=16, help="of a sample")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        model, tokenizer = tiny_random_model()
    sums: Any = [{"prompt": f"What is {i} + {i}?", "completion": f" {2 * i}"} for i in range(48)]
    rows = [json.loads(line) for line in options.data.read_text("utf-8").splitlines()] if options.data else sums
    random.Random(options.seed).shuffle(rows)
    demonstrations = [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    rate = options.learning_rate or (5e-7 if options.model else 1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    limits = {"num_samples": options.samples, "max_tokens": options.max_tokens, "eos_id": tokenizer.eos_token_id}

    def draw(stage: int, prompt: list[int]) -> list[list[int]]:
        return sample(model, prompt, **limits)

    settings = {"stages": options.stages, "batch_size": options.batch_size, "beta": options.beta}
    steps = list(irft(model, demonstrations, optimizer, draw, **settings))
    for stage in range(options.stages):
        losses, margins = zip(*((step.loss, step.margin) for step in steps if step.stage == stage), strict=True)
        print(f"stage {stage}: loss {losses[0]:.4f} to {losses[-1]:.4f}, margin {margins[0]:.4f} to {margins[-1]:.4f}")
    if options.output:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
    return steps


if __name__ == "__main__":
    main()
