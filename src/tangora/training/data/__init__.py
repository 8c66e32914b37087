"""Tasks: named data sets as train, validation and test examples that share no text."""

from tangora.training.data.encoding import EncodedDataset, collator, encode
from tangora.training.data.examples import Example
from tangora.training.data.task import Task, load_task

__all__ = ["EncodedDataset", "Example", "Task", "collator", "encode", "load_task"]
