"""`fedhpc prepare`: the examples of a source, tokenised for one model."""

from collections.abc import Callable

from fedhpc.data.generation import GenerationTask
from fedhpc.data.prepared import check_writable
from fedhpc.data.preparing_classes import prepare_classes
from fedhpc.data.preparing_generation import prepare_generation
from fedhpc.data.recipe import Recipe, load_target_model
from fedhpc.data.task_files import load_task


def prepare(recipe: Recipe, show: Callable[[str], None] = lambda text: None, *, colours: bool = False) -> str:
    """Do all of it; returns the closing summary.

    Args:
        show: is given examples of texts to be generated, before anything is written.
        colours: whether what is trained has a colour in them.

    Raises:
        UserError: what cannot be prepared so.
    """
    check_writable(recipe.out)
    task, model = load_task(recipe.task), load_target_model(recipe.model)
    if isinstance(task, GenerationTask):
        return prepare_generation(recipe, task, model, show, colours=colours)
    return prepare_classes(recipe, task, model)
