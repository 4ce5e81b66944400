"""Trained models with their data: the bundled ones, and those that a user's own function returns."""

from analysis.tasks.bundled import BUNDLED as BUNDLED
from analysis.tasks.load import load_task as load_task
from analysis.tasks.task import Task as Task

__all__ = ["BUNDLED", "Task", "load_task"]
