"""`fedhpc init`: a task, a run and a SLURM job for a user's own data, after a look at them."""

import shlex
from collections.abc import Sequence

from fedhpc.commands.init import classes, generation
from fedhpc.commands.init.columns import check_columns
from fedhpc.commands.init.files import find_files, new_files, read_records, write_files
from fedhpc.commands.init.layout import find_layout
from fedhpc.data.recipe import Recipe


def init(
    name: str, data: Sequence[str], model: str, texts: Sequence[str], label: str | None, answer: str | None
) -> str:
    """Look at the data, write NAME.task.yaml, NAME.yaml and NAME.slurm here; what was found, and what to do next.

    Args:
        name: of the task, and so of the files.
        data: a folder, or the files of the training and the validation examples; the one of all, where texts are to be
            generated.
        model: folder or hub name of the backbone.
        texts: the columns of text; found out unless given.
        label: the column of labels; found out unless given.
        answer: the column of texts to be generated; found out unless given.

    Raises:
        UserError: a file is there already, or something is wrong with what was given.
    """
    targets = new_files(name)
    source = find_files(data)
    records = read_records(source.train)
    check_columns(source.train, records, {"--label": [label], "--response": [answer], "--text": texts})
    recipe = Recipe(task=str(targets[0]), source=str(source.folder), model=model, out=f"prepared/{name}")
    layout = None if label else find_layout(source.train, records, texts, answer)
    if layout is None:
        found = classes.look(name, source, records, texts, label, recipe)
    else:
        found = generation.look(name, source, records, layout, recipe)
    ranks = write_files(name, targets, found)
    prepare = ["fedhpc", "prepare", "--task", recipe.task, "--source", recipe.source, "--model", recipe.model]
    return "\n".join(
        [
            f"{name}: {found.examples} in {source.folder} ({found.files})",
            *found.lines,
            f"wrote {', '.join(map(str, targets))}; read them, then:",
            f"  {shlex.join([*prepare, *found.options, '--out', recipe.out])}",
            f"  mpirun -np {ranks} fedhpc run {targets[1]}",
            *found.after,
        ]
    )
