"""Rewards: one interface, implicit in a policy or learned beside it."""

from tutelage.rewards.base import Reward
from tutelage.rewards.comparisons import Comparisons
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.feature_reward import FeatureReward
from tutelage.rewards.implicit import ImplicitReward

__all__ = ["Comparisons", "ExplicitReward", "FeatureReward", "ImplicitReward", "Reward"]
