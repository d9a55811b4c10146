"""fedhpc completion: scripts that the shells take, and what bash then completes."""

import shlex
import shutil
import subprocess

import pytest

CHECKS = {"bash": ["bash", "-n"], "zsh": ["zsh", "-n"], "fish": ["fish", "--no-execute"]}


@pytest.fixture
def script(fedhpc, tmp_path):
    def write(shell):
        status, out, err = fedhpc("completion", shell)
        assert (status, err) == (0, "")
        path = tmp_path / f"completion.{shell}"
        path.write_text(out)
        return path

    return write


@pytest.mark.parametrize("shell", CHECKS)
def test_a_script_is_valid(script, shell):
    path = script(shell)
    assert "fedhpc" in path.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} to try it")
    done = subprocess.run([*CHECKS[shell], path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["r"], ["report", "run"]),
        (["p"], ["partition", "plan", "predict", "prepare"]),
        (["run", "--re"], ["--resume"]),
        (["run", "--resume", "n"], ["never"]),
        (["run", "my"], ["my job.yaml"]),
        (["watch", "--o"], ["--once"]),
        (["prepare", "--source", "my"], ["my job.yaml"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
    ],
)
def test_bash_completes(script, tmp_path, words, completed):
    path = script("bash")
    (tmp_path / "my job.yaml").touch()
    typed = shlex.join(["fedhpc", *words])
    # As bash does on a TAB: it finds the function that is registered for the command.
    program = (
        f"source {shlex.quote(str(path))}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; "
        f"COMP_LINE={shlex.quote(typed)}; COMP_POINT=${{#COMP_LINE}}; "
        "function=$(complete -p fedhpc); function=${function##*-F }; ${function%% *} fedhpc; "
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20
    )
    assert sorted(done.stdout.splitlines()) == completed, done.stderr
