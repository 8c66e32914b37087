"""Tasks: named data sets as train, validation and test examples that share no text."""

from tangora.training.data.columns import Example
from tangora.training.data.task import Task, load_task
from tangora.training.data.text import EncodedDataset, collator, encode

__all__ = ["EncodedDataset", "Example", "Task", "collator", "encode", "load_task"]
