"""What cannot work, said before the work: options without effect, layers that are not there, ranks too large."""

from collections.abc import Sequence

from peft import PeftModel

from tangora._checks import InputError
from tangora.curvature.adapted import chosen
from tangora.experiments.run.loading import fitted, prepared_twin
from tangora.experiments.run.trajectory import target_layers
from tangora.experiments.settings import RunSettings
from tangora.training.data import Task
from tangora.training.models import LoadedModel


def check_options(settings: RunSettings, task: Task) -> None:
    """Check the settings against the data, before a model is loaded."""
    if task.kind == "classification":
        for key, what in (("exact_match", "generated answers"), ("forgetting", "the loss on unrelated text")):
            if getattr(settings, key):
                raise InputError(f"{key} is about {what} of causal models; {task.name} is for classification")
    elif settings.head_learning_rate is not None:
        raise InputError(
            f"head_learning_rate is for classifiers, which get a new head; {task.name} is for a causal model; "
            f"got {settings.head_learning_rate:g}"
        )
    for key in ("start_examples", "curvature_examples", "measure_gradient"):
        wanted, usual = getattr(settings, key), RunSettings.model_fields[key].default
        if wanted is not None and wanted != usual and wanted > len(task.train):
            raise InputError(
                f"{key} must be at most {len(task.train)}, the number of training examples; got {wanted}"
            )


def checked(runs: Sequence[RunSettings], task: Task, loaded: LoadedModel) -> Task:
    """Check that the recipes of some runs can be prepared on a model, and that it can read their data."""
    for settings in {run.recipe: run for run in runs}.values():
        adapted = prepared_twin(settings.recipe, settings, task, loaded)
        if settings.rank_plan and len(runs) == 1 and not isinstance(adapted, PeftModel):
            raise InputError(f"rank_plan needs an adapter, and recipe {settings.recipe} has none")
        if settings.curvature_layers is not None:
            try:
                chosen(target_layers(loaded, task, settings), settings.curvature_layers)
            except InputError as problem:
                raise InputError(f"curvature_{problem}") from None
    return fitted(task, loaded, max_length=runs[0].max_length, chat_template=runs[0].chat_template)
