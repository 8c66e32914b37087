"""Tasks: named data sets as train, validation and test examples that share no text."""

from tangora.training.data.encoding import Encoding, collator, encode
from tangora.training.data.examples import Example
from tangora.training.data.sources import is_hub_data
from tangora.training.data.task import Task, load_task

__all__ = ["Encoding", "Example", "Task", "collator", "encode", "is_hub_data", "load_task"]
