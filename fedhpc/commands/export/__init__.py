"""`fedhpc export`: what a run has tuned, as a folder that Hugging Face PEFT loads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.numpy import save

from fedhpc.commands.export.forms import peft_files, peft_form
from fedhpc.commands.export.generation_readme import generation_readme
from fedhpc.commands.export.readme import readme
from fedhpc.commands.trained import Trained, load_trained
from fedhpc.errors import ConfigError
from fedhpc.files import check_folder, write_whole
from fedhpc.tuning.peft_form import PeftForm


def export_peft(run_dir: str, out: str, *, device: int | None = None) -> str:
    """Write the adapter, a trained head beside it, and a README.md that shows how to use them; what was done, in words.

    Args:
        device: whose personal parameters; None: the global ones.

    Raises:
        UserError: the run cannot be read, PEFT has no form for it, or the folder is not new or empty.
    """
    folder = Path(out)
    with _refusing(out):
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError(f"--out: {folder} is there already; give a new or empty folder")
        check_folder(folder)
    trained = load_trained(run_dir, device)
    with _refusing(out):
        form, names = write_adapter(trained, folder)
    whose = "global parameters" if device is None else f"parameters of device {device}"
    return f"{whose} after round {trained.rounds} as {form.config['peft_type']} in {out}: {', '.join(names)}"


@contextmanager
def _refusing(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from None


def write_adapter(trained: Trained, folder: Path) -> tuple[PeftForm, list[str]]:
    """Write an adapter's files; its form and their names."""
    form = peft_form(trained)
    if trained.job.data.description.generation:
        text = generation_readme(trained, form)
    else:
        text = readme(trained, form, trained.text_encoder())
    files = {**peft_files(form), "README.md": text.encode(errors="backslashreplace")}
    if trained.job.config.tuning.head == "linear":
        head = {name: trained.tensors[f"head.{name}"] for name in ("weight", "bias")}
        files["head.safetensors"] = save(head, {"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)
    return form, sorted(files)
