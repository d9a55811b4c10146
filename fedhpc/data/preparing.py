"""`fedhpc prepare`: the examples of a source, tokenised for one model."""

from collections.abc import Callable
from typing import Any

from fedhpc.data import preparing_classes, preparing_generation
from fedhpc.data.generation import GenerationTask
from fedhpc.data.prepared import check_writable
from fedhpc.data.recipe import Recipe, TargetModel, load_target_model
from fedhpc.data.task_files import load_task
from fedhpc.data.tasks import Task
from fedhpc.errors import ConfigError


def prepare(recipe: Recipe, show: Callable[[str], None] = lambda text: None, *, colours: bool = False) -> str:
    """Do all of it; returns the closing summary.

    Args:
        show: is given examples of texts to be generated, before anything is written.
        colours: whether what is trained has a colour in them.

    Raises:
        UserError: what cannot be prepared so.
    """
    check_writable(recipe.out)
    task = load_task(recipe.task)
    check_options(recipe, task)
    model = load_target_model(recipe.model)
    if isinstance(task, GenerationTask):
        return preparing_generation.prepare_generation(recipe, task, model, show, colours=colours)
    return preparing_classes.prepare_classes(recipe, task, model)


def check_options(recipe: Recipe, task: Task | GenerationTask) -> None:
    """ConfigError for an option that is none of this kind of task."""
    if isinstance(task, GenerationTask) and recipe.head is not None:
        raise ConfigError(f"head {recipe.head} does not apply: task {task.name} is of texts to be generated")
    if isinstance(task, Task) and recipe.overlong is not None:
        raise ConfigError(f"overlong {recipe.overlong} does not apply: task {task.name} is a classification")


def description_of(recipe: Recipe, task: Task | GenerationTask, model: TargetModel) -> dict[str, Any]:
    """What the prepared data's description says that does not follow from the source.

    Raises:
        UserError: the task cannot be put to this model.
    """
    check_options(recipe, task)
    if isinstance(task, GenerationTask):
        return preparing_generation.describe(recipe, task, model)
    return preparing_classes.describe(recipe, task, model)
