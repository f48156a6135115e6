"""What RFT logs besides what every algorithm does, and what a model card says of it."""

from __future__ import annotations

from tutelage.results import Curve, RunRecord

__all__ = ["RFT_CURVES", "rft_card"]


def _group(group: str, *curves: Curve) -> tuple[Curve, ...]:
    return tuple(Curve(c.key, c.title, c.unit, group, c.faint, c.over) for c in curves)


def _by_stage(key: str, title: str, unit: str = "", faint: str | None = None) -> Curve:
    return Curve(key, title, unit, faint=faint, over="stage")


RFT_CURVES = (
    *_group(
        "Learned reward",
        _by_stage(
            "validation/accuracy",
            "Accuracy: demonstration over sample",
            "share of validation pairs; faint: training, before their step",
            faint="reward/accuracy",
        ),
        _by_stage(
            "validation/accuracy_logp",
            "What costs nothing: accuracy of own log-prob",
            "share of validation pairs; faint: of length",
            faint="validation/accuracy_length",
        ),
        _by_stage("preference/accuracy", "Accuracy on preference pairs", "share of pairs"),
        _by_stage("reward/gap", "Reward gap", "demonstration minus sample, training rows"),
        _by_stage(
            "reward/demonstrations",
            "Reward of demonstrations",
            "training rows; faint: of samples",
            faint="reward/samples",
        ),
        _by_stage("validation/verifier_gap", "Reward gap of right and wrong samples", "right minus wrong"),
        _by_stage(
            "reward/logp_correlation",
            "Correlation of reward and own log-prob",
            "−1 to 1, near −1: improbable is good; faint: with length",
            faint="reward/length_correlation",
        ),
        _by_stage("samples/copies", "Samples that equal the demonstration", "share, demonstrated prompts"),
        _by_stage("reward/refused", "Prompts on which the ensemble disagrees", "share"),
        _by_stage("reward/loss", "Reward loss", "of training pairs"),
        _by_stage("reward/steps", "Length of the reward phase", "optimizer steps"),
        _by_stage("reward/saturated", "Reward phase stopped early", "1: accuracy saturated, 0: no"),
    ),
    *_group(
        "Policy",
        _by_stage("validation/reward", "Reward of validation samples", "by the reward of the stage"),
        _by_stage("validation/verifier_score", "Verifier score of validation samples", "mean"),
        _by_stage("validation/kl", "KL to the start, validation prompts", "nats per sequence"),
        Curve("policy/reward", "Reward of training samples", "by the reward of the stage"),
        Curve("policy/advantage", "Size of the advantage", "mean distance to the prompt's other samples"),
        Curve("policy/kl", "KL to the start, training prompts", "nats per sequence"),
        _by_stage("policy/entropy", "Entropy", "nats per token"),
        Curve("policy/clip_fraction", "Beyond the clip range", "share of samples"),
        _by_stage("policy/phase", "Policy phase", "1: ran, 0: skipped"),
    ),
)


def rft_card(record: RunRecord) -> str:
    """What the stages did, and which of their policies the weights are."""
    history, settings = record.history, record.settings
    ranked = any("preference/accuracy" in row for row in history)
    normalized = settings.get("advantages") == "group_normalized"
    estimator = "REINFORCE with group-normalized advantages" if normalized else "leave-one-out REINFORCE"
    stages = sum("reward/loss" in row for row in history)
    ran = sum(row.get("policy/phase") == 1 for row in history)
    text = (
        f"The data are {'demonstrations and preference pairs' if ranked else 'demonstrations alone'}. {stages} stages: at "
        f"the start of each, {settings.get('num_samples')} completion(s) per prompt were sampled from the policy as it "
        f"stood, and a reward learned to rank the demonstrations above them; in {ran} of the stages the policy was then "
        f"improved with that reward by {estimator} under a KL penalty to the start (Li et al. 2024, arXiv 2405.17888, "
        "Algorithm 1)."
    )
    kept = next((candidate for candidate in record.selection if candidate.chosen), None)
    if kept is None:
        return text
    if kept.stage == 0:
        return f"{text} No stage beat the start: these are its weights."
    return f"{text} These are the weights after {kept.stage} of them, chosen on validation rows."
