"""What the tests of RFT share: short runs, planted rewards, scripted samples."""

from training_runs import history
from tutelage.groups import Role
from tutelage.sampling.base import Sample
from tutelage.training.reward_config import NEURAL_SETTINGS

# Two stages of two steps on 16 rows, 4 kept. Random policies do not end by themselves, so that a reward finds soon
# enough what demonstrations have and samples have not.
NEURAL = {
    "reward": "model",
    "reward_negatives": "own",
    "reward_gate": "chance",
    "reward_scaling": "down_only",
    "reward_replay_stages": 0,
    "samplings_per_stage": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
}
QUICK = {
    **NEURAL,
    "stages_per_epoch": 2,
    "num_samples": 2,
    "validation_rows": 4,
    "reward_warmup_stages": 0,
    "reward_learning_rate": 1e-2,
    "reward_batch_size": 4,
    "reward_epochs": 1,
    "early_stopping": "never",
    "truncated_samples": "score",
    "beta": 0.01,
}


def readable(settings):
    """The settings without those that the reward they name does not read."""
    neural = settings["reward"] == "model"
    return {name: value for name, value in settings.items() if neural or name not in NEURAL_SETTINGS}


def make(training, *, adapter=False, data=None, options=None, **settings):
    options = {"peft_config": training.lora() if adapter else None, **(options or {})}
    data = training.rows(20) if data is None else data
    quick = {name: QUICK[name] for name in readable({**QUICK, **settings}) if name in QUICK}
    return training.trainer("rft", data=data, options=options, **{**quick, **settings})


def run(training, **arguments):
    trainer = make(training, **arguments)
    trainer.train()
    return trainer


def phases(trainer):
    return history(trainer, "policy/phase")


def saved(training, name="base", model=None):
    """Folder of a model with the tokenizer, which an adapter can name."""
    (model or training.model()).save_pretrained(training.folder / name)
    training.tokenizer.save_pretrained(training.folder / name)
    return str(training.folder / name)


def spread(completion):
    """A reward in [0, 1) that is as good as random, but always the same."""
    return sum((place + 1) * token for place, token in enumerate(completion.token_ids)) % 97 / 97


def plant(trainer, of):
    """Give the reward's answers: ``of(completion)``. The fit goes on behind it."""
    trainer.reward.scores = lambda groups: [tuple(of(c) for c in group.completions) for group in groups]
    return trainer


def over_samples(completion):
    """Demonstrations are over samples, which differ."""
    return 2.0 if completion.role == Role.DEMONSTRATION else spread(completion)


class Scripted:
    """A sampler whose answers are given: (tokens, whether it finished) of each sample of a row."""

    def __init__(self, answers):
        self.answers = answers

    def take_weights(self, policy):
        pass

    def sample(self, prompts, params, *, num_samples=1, rows=None, stage=0, on_finished=None):
        return [[Sample(ids, (0.0,) * len(ids), finished) for ids, finished in self.answers(row)] for row in rows]


def trained_on(trainer):
    """What the policy phase and the reward phase see, as they see it: two lists of groups."""
    policy, reward = [], []
    loss, rewards = trainer.objective.loss, trainer.stages.phase.learner.fitter._rewards
    trainer.objective.loss = lambda tokens, step: policy.extend(tokens.groups) or loss(tokens, step)
    trainer.stages.phase.learner.fitter._rewards = lambda groups: reward.extend(groups) or rewards(groups)
    return policy, reward


WORDS = [" the", " is", " and", " that"]
QUESTIONS = [f"{i}?" for i in range(10, 42)]
