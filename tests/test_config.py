import pytest
import yaml

from fedhpc import yaml_files
from fedhpc.config.file import load_config
from fedhpc.errors import ConfigError
from fedhpc.server.notices import notices

MINIMAL = {"run_dir": "r", "model": {"name": "m"}, "data": {"path": "d"}}


@pytest.fixture
def write(tmp_path):
    def to_file(name="run.yaml", **values):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return to_file


def problems(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_resolved_configuration_reads_back_as_itself(write, tmp_path):
    config = load_config(write(**MINIMAL))
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "resolved.yaml") == config


def test_defaults_follow_the_method_and_variant(write):
    path = write(**MINIMAL)
    assert load_config(path).server.model_dump() == {
        "method": "fedpeptao",
        "variant": "drift_corrected",
        "learning_rate": 1.5,
        "momentum": 0.5,
        "control_variates": True,
        "weights": "examples",
        "max_rejected": 0.2,
    }
    released = load_config(path, ["server.variant=released"]).server
    assert (released.learning_rate, released.momentum) == (0.05, 0.9)
    plain = {"method": "fedavg", "weights": "examples", "max_rejected": 0.2}
    assert load_config(path, ["server.method=fedavg"]).server.model_dump() == plain
    assert load_config(path, ["server.variant=released", "server.momentum=0.3"]).server.momentum == 0.3


def test_a_section_left_empty_is_one_not_given(write):
    for section in ("privacy", "server", "tuning", "plugins"):
        assert load_config(write(**MINIMAL, **{section: None})) == load_config(write(**MINIMAL))
    assert "data: is required" in problems(write(**MINIMAL | {"data": None}))


def test_overrides_are_yaml_and_reach_any_depth(write):
    config = load_config(
        write(**MINIMAL),
        ["device.learning_rate=4e-2", "selection={strategy: explicit, layers: [2, 0]}", "trace=true"],
    )
    assert config.device.learning_rate == 0.04
    assert config.selection.layers == [2, 0]
    assert config.trace is True


def test_a_file_may_build_on_another(write):
    write("base.yaml", **MINIMAL, device={"epochs": 7, "batch_size": 3})
    config = load_config(write(base="base.yaml", data={"task": "rte"}, device={"epochs": 1}))
    assert (config.device.epochs, config.device.batch_size) == (1, 3)
    assert (config.data.path, config.data.task) == ("d", "rte")


def test_a_circle_of_bases_ends(write):
    write("a.yaml", base="b.yaml")
    assert "leads back to itself" in problems(write("b.yaml", base="a.yaml"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("device.epoch=1", ["device.epoch: unknown key", "device.epochs"]),
        ("learning_rate=1", ["learning_rate: unknown key", "device.learning_rate"]),
        ("device.epochs=two", ["device.epochs", "integer", "'two'"]),
        ("device.epochs=2.5", ["device.epochs", "integer"]),
        ("device.learning_rate=0", ["device.learning_rate", "greater than 0"]),
        ("device.learning_rate=.inf", ["device.learning_rate", "finite"]),
        ("federation.sample_rate=1.5", ["federation.sample_rate", "1"]),
        ("server.method=fedsgd", ["server.method", "fedavg", "fedpeptao", "'fedsgd'"]),
        ("model.dtype=int8", ["model.dtype", "bfloat16"]),
        ("exchange.timeout_s=1e-8", ["exchange.timeout_s", "greater than or equal to 1"]),
        ("selection.ratio=0", ["selection.ratio", "greater than 0"]),
        ("selection.layers=[1]", ["selection.layers", "explicit"]),
        ("selection={strategy: explicit, layers: [1, 1]}", ["selection.layers", "once"]),
        ("tuning={head: linear, loss: vocabulary}", ["tuning.loss", "tuning.head"]),
        ("model.attention=flash_attention_2", ["model.attention", "bfloat16"]),
        ("model.quantization=int4", ["model.quantization", "nf4", "int8", "'int4'"]),
        ("device.max_steps=0", ["device.max_steps", "greater than 0"]),
        ("device.warmup=100", ["device.warmup: 100 must be fewer than federation.rounds: 100"]),
        ("server.weights=steps", ["server.weights", "tokens", "'steps'"]),
        ("tuning={kind: lora, targets: []}", ["tuning.targets", "at least 1"]),
        ("checkpoint.keep=1", ["checkpoint.keep", "2"]),
        ("trace=maybe", ["trace", "bool"]),
        ("model=x", ["model", "'x'"]),
        ("seed.x=1", ["seed", "'x': 1"]),
        ("seed=9223372036854775808", ["seed", "less than"]),
        ("run_dir=''", ["run_dir", "at least 1 character"]),
        ("seed=2024-13-45", ["seed", "integer", "'2024-13-45'"]),
        ("seed=1:30", ["seed", "integer", "'1:30'"]),
        ("trace=yes", ["trace", "bool", "'yes'"]),
        ("selection.layers=[1] # two", ["--set selection.layers=[1] # two", "# begins a comment"]),
        ("device={epochs: 1, epochs: 2}", ["--set", "not valid YAML: key 'epochs' stands twice"]),
        ("nonsense", ["--set nonsense", "key.sub=value"]),
    ],
)
def test_one_line_says_key_finding_and_what_is_valid(write, override, words):
    message = problems(write(**MINIMAL), override)
    assert "1 problem(s)" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tuning.kind=late_prompt", "selection.strategy=first"], "late_prompt trains nothing in them"),
        (["tuning.kind=attempt"], "attempt needs tuning.sources"),
        (["tuning.kind=full", "device.pack=2"], "full changes the weights for one device at a time"),
        (["tuning.kind=bitfit", "model.gradient_checkpointing=true"], "bitfit needs false"),
        (
            ["tuning.kind=full", "model.quantization=int8"],
            "model.quantization: int8 holds the frozen weights in few bits",
        ),
        (["tuning.kind=bitfit", "model.quantization=nf4"], "bitfit, which changes them, needs null"),
        (["tuning.kind=bitfit", "model.prepack_weights=true"], "bitfit changes the weights; it needs model.prepack"),
        (["model.quantization=nf4", "model.prepack_weights=true"], "together with model.quantization: nf4"),
        (["model.device_map=auto", "model.prepack_weights=true"], "is for CPUs; it needs model.device_map: single"),
        (["tuning.kind=full", "model.device_map=auto"], "full needs model.device_map: single"),
        (
            ["selection.ratio=auto", "model.dtype=bfloat16", "model.attention=flash_attention_2"],
            "differentiates twice, which model.attention: flash_attention_2 cannot",
        ),
        (["selection.local_layers=frozen", "sparse.fraction=0.5"], "sparse.fraction below 1 needs trained"),
        (["server.method=mime"], "mime lends devices its momentum for SGD"),
        (["server.method=moms_adamd", "device.optimizer=sgd"], "moms_adamd is Adam on the devices"),
        (["server={variant: paper, control_variates: false}"], "needs server.variant: drift_corrected"),
        (["server.method=mime", "device.optimizer=sgd", "exchange.dtype=float16"], "mime needs float32"),
        (["server.method=scaffold", "exchange.mode=reduce"], "scaffold needs each upload by itself"),
    ],
)
def test_combinations_that_make_no_sense_with_another_key_are_refused_with_the_reason(write, overrides, words):
    assert words in problems(write(**MINIMAL), *overrides)


def test_a_tuning_without_layers_is_exchanged_whole(write):
    assert load_config(write(**MINIMAL), ["tuning.kind=prompt_tuning"]).selection.strategy == "all"


def test_keys_of_another_method_are_noticed(write):
    overrides = ["server.method=fedadam", "server.variant=released", "server.proximal=0.5", "server.tau=0.1"]
    assert notices(load_config(write(**MINIMAL), overrides)) == [
        "server.method: fedadam does not use server.proximal",
        "server.method: fedadam does not use server.variant",
    ]


def test_keys_of_another_tuning_are_noticed(write):
    (notice,) = notices(load_config(write(**MINIMAL), ["tuning.kind=lora", "tuning.num_tokens=5"]))
    assert notice == "tuning.kind: lora does not use tuning.num_tokens"


@pytest.mark.parametrize("key", ["distance=l1", "batch_size=3"])
def test_keys_of_another_strategy_are_noticed(write, key):
    (notice,) = notices(load_config(write(**MINIMAL), ["selection.strategy=first", f"selection.{key}"]))
    assert notice == f"selection.strategy: first does not use selection.{key.partition('=')[0]}"
    assert notices(load_config(write(**MINIMAL), [f"selection.{key}"])) == []


def test_an_empty_pattern_is_too_short(write):
    found = problems(write(**MINIMAL), "exchange.keep=['']")
    assert "exchange.keep: should have at least 1 character, found ''" in found


def test_keys_of_another_part_are_checked_and_left_out(write):
    assert "server.tau: should be greater than 0" in problems(write(**MINIMAL), "server.tau=-1")
    assert load_config(write(**MINIMAL), ["server.tau=0.1"]).identity() == load_config(write(**MINIMAL)).identity()
    assert "tau" not in load_config(write(**MINIMAL), ["server.tau=0.1"]).to_yaml()


@pytest.mark.parametrize(
    ("key", "with_effect", "reason"),
    [
        ("curriculum.start=0.5", "curriculum.order=fisher", "curriculum.order: random"),
        ("curriculum.end=0.5", "curriculum.order=fisher", "curriculum.order: random"),
        ("sparse.momentum=0.5", "sparse.fraction=0.5", "sparse.fraction: 1"),
        ("selection.auto_by=eigengap", "selection.ratio=auto", "selection.ratio: 0.5"),
        ("selection.warmup_rounds=3", "selection.ratio=auto", "selection.ratio: 0.5"),
    ],
)
def test_a_key_that_another_key_leaves_without_effect_is_noted(write, key, with_effect, reason):
    overrides = ["selection.strategy=first", key]
    name = key.split("=")[0]
    assert notices(load_config(write(**MINIMAL), overrides)) == [f"{name} has no effect with {reason}"]
    assert notices(load_config(write(**MINIMAL), [*overrides, with_effect])) == []


def test_what_nothing_is_left_for_is_noted(write):
    for key, value in (("sparse.fraction", 0.5), ("selection.local_layers", "frozen")):
        assert notices(load_config(write(**MINIMAL), [f"{key}={value}", "selection.ratio=1.0"])) == [
            f"{key} has no effect: with selection.ratio: 1 no layer stays on the devices"
        ]
    assert notices(load_config(write(**MINIMAL), ["device={optimizer: sgd, reset_moments: false}"])) == [
        "device.reset_moments has no effect with device.optimizer: sgd"
    ]


def test_a_ratio_that_nothing_asks_for_is_not_said_to_decide(write):
    automatic = ["selection.ratio=auto", "federation.rounds=5"]
    assert notices(load_config(write(**MINIMAL), [*automatic, "tuning.kind=prompt_tuning"])) == []
    (notice,) = notices(load_config(write(**MINIMAL), automatic))
    assert "decides after selection.warmup_rounds: 10" in notice


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=0042", "seed", 42),
        ("seed=1_000", "seed", 1000),
        ("run_dir=exp #2", "run_dir", "exp #2"),
        ("run_dir=#2", "run_dir", "#2"),
        ("run_dir='exp #2'", "run_dir", "exp #2"),
        ("run_dir=2026-01-02", "run_dir", "2026-01-02"),
        ("run_dir=no", "run_dir", "no"),
        ("run_dir=a\nb", "run_dir", "a\nb"),
    ],
)
def test_an_override_means_what_it_says_and_so_does_the_resolved_file(write, tmp_path, override, key, value):
    config = load_config(write(**MINIMAL), [override])
    assert getattr(config, key) == value
    (tmp_path / "resolved.yaml").write_text(config.to_yaml())
    assert getattr(load_config(tmp_path / "resolved.yaml"), key) == value


@pytest.mark.parametrize("text", ["1e3", "0042", "1:30", "yes", "~", "<<", "2026-01-02", ".5", "0x1F", "x: y", "# x"])
def test_a_text_is_written_so_that_yaml_of_either_version_reads_a_text(text):
    document = yaml_files.write({"key": text})
    assert yaml_files.read(document) == yaml.safe_load(document) == {"key": text}


def test_a_dotted_key_in_a_file_is_shown_where_it_belongs(write):
    assert "model.name: in a file this key stands in its section: model: {name: ...}" in problems(
        write(**MINIMAL, **{"model.name": "x"})
    )


def test_an_override_changes_one_section_where_an_alias_made_two_of_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "evaluate: &rare {every: 7}\ncheckpoint: *rare\n")
    config = load_config(path, ["evaluate.every=5"])
    assert (config.evaluate.every, config.checkpoint.every) == (5, 7)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed: &s [*s]", "an alias stands within what it names"),
        ("federation: &f {alpha: *f}", "an alias stands within what it names"),
        ("seed: !!timestamp abc", "is not valid YAML"),
        ("seed: !!bool abc", "is not valid YAML"),
        ("seed: !!float ''", "is not valid YAML"),
        ("seed: !!int [a]", "expected a scalar node"),
        ("seed: !!set [a]", "expected a mapping node"),
        ("tuning: !!map 5", "expected a mapping node"),
    ],
)
def test_odd_yaml_is_refused_in_words(tmp_path, line, words):
    path = tmp_path / "run.yaml"
    path.write_text(f"{yaml.safe_dump(MINIMAL)}{line}\n")
    assert words in problems(path)


def test_yaml_may_merge(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "device: {<<: {epochs: 3, batch_size: 4}, batch_size: 2}\n")
    device = load_config(path).device
    assert (device.epochs, device.batch_size) == (3, 2)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "device: {epochs: 1}\nseed: 1\ndevice: {batch_size: 2}\n")
    assert "key 'device' stands twice" in problems(path)


def test_an_empty_section_keeps_its_defaults_and_home_folders_are_found(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(write(**{**MINIMAL, "run_dir": "~/runs", "server": None}))
    assert config.server.momentum == 0.5
    assert config.run_dir == "/home/someone/runs"


def test_a_missing_section_is_named(write):
    message = problems(write(run_dir="r", model={}))
    assert "model.name: is required" in message
    assert "data: is required" in message


def test_the_identity_leaves_out_what_cannot_change_the_numbers(write):
    path = write(**MINIMAL)
    digest = load_config(path).sha256
    for harmless in ("run_dir=x", "trace=true", "checkpoint.every=3", "evaluate.every=3", "federation.rounds=7"):
        assert load_config(path, [harmless]).sha256 == digest
    for other in ("seed=1", "device.threads=2", "device.learning_rate=0.1", "selection.ratio=0.25"):
        assert load_config(path, [other]).sha256 != digest
    assert (
        load_config(path, ["device.warmup=3"]).sha256
        == load_config(path, ["device.warmup=3", "federation.rounds=7"]).sha256
    )
    for schedule in ("linear", "cosine"):
        one, other = (load_config(path, [f"device.schedule={schedule}", f"federation.rounds={n}"]) for n in (7, 8))
        assert one.sha256 != other.sha256


@pytest.mark.parametrize(
    ("num_devices", "rate", "sampled"), [(100, 0.1, 10), (100, 0.29, 29), (5, 0.1, 1), (7, 1.0, 7)]
)
def test_devices_per_round(write, num_devices, rate, sampled):
    config = load_config(write(**MINIMAL, federation={"num_devices": num_devices, "sample_rate": rate}))
    assert config.federation.devices_per_round == sampled
