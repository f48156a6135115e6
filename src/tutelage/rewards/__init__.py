"""Rewards: one interface, implicit in a policy or learned beside it."""

from tutelage.rewards.base import Reward
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.implicit import ImplicitReward

__all__ = ["ExplicitReward", "ImplicitReward", "Reward"]
