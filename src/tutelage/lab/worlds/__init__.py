"""Planted worlds: a task, its demonstrator, and a judge that never reaches training."""

from tutelage.lab.worlds.task import Task, Words, generator
from tutelage.lab.worlds.world import CORRUPTIONS, WORLDS, Phase, Row, World, WorldOptions, split_of

__all__ = ["CORRUPTIONS", "WORLDS", "Phase", "Row", "Task", "Words", "World", "WorldOptions", "generator", "split_of"]
