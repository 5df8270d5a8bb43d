"""Configurations from YAML and the command line: values, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from colrow.train.configuration import MeshConfiguration, TrainConfiguration
from colrow.train.parse import ConfigurationError, from_dictionary, parse, to_yaml

GOOD = """
steps: 20
model: {config: LlamaConfig, fields: {hidden_size: 64}}
optimizer: {learning_rate: 1e-3, betas: [0.9, 0.99]}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(GOOD)
    return str(path)


def test_command_line_overrides_file(file: str) -> None:
    configuration = parse(
        [file, "--mesh.tp", "3", "--model.fields.num_hidden_layers", "2", "--data.text=[a, b]"]
    )
    assert configuration.mesh.tp == 3
    assert configuration.steps == 20
    assert configuration.model.fields == {"hidden_size": 64, "num_hidden_layers": 2}
    assert configuration.optimizer.learning_rate == 1e-3
    assert configuration.optimizer.betas == (0.9, 0.99)
    assert configuration.data.text == ["a", "b"]
    assert configuration.run_dir == "runs/small"


def test_later_files_override_earlier_ones(file: str, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("model: {fields: {hidden_size: 128}}\nseed: 7\n")
    configuration = parse([file, str(other)])
    assert configuration.seed == 7
    assert configuration.steps == 20
    assert configuration.model.config == "LlamaConfig"


@pytest.mark.parametrize(
    ("switch", "expected"),
    [([], False), (["--resume"], True), (["--resume", "true"], True), (["--resume", "false"], False)],
)
def test_switches(file: str, switch: list[str], expected: bool) -> None:
    assert parse([file, *switch, "--seed", "5"]).resume is expected
    assert parse([file, "--seed", "5", *switch]).resume is expected


def test_written_configuration_reads_back(file: str, tmp_path: Path) -> None:
    configuration = parse([file, "--optimizer.max_norm", "null", "--sample.prompt", "yes: it is"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(configuration))
    assert parse([str(again)]) == configuration
    assert configuration.optimizer.max_norm is None


def test_from_dictionary_rejects_unknown_fields() -> None:
    assert from_dictionary({"mesh": {"tp": 2}}) == TrainConfiguration(mesh=MeshConfiguration(tp=2))
    with pytest.raises(ConfigurationError, match=r"no field optimizer\.lr: did you mean optimizer\.learn"):
        from_dictionary({"optimizer": {"lr": 1.0}})


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("optimzer: {eps: 1}", "no field optimzer: did you mean optimizer?"),
        ("optimizer: {lerning_rate: 1}", "optimizer.lerning_rate: did you mean optimizer.learning_rate?"),
        ("optimizer: 3", "optimizer is a group of fields, not 3"),
        ("- 3", "must hold fields and values"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, yaml: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml)
    with pytest.raises(ConfigurationError) as error:
        parse([str(path)])
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mesh.tpp 3", "no option --mesh.tpp: did you mean mesh.tp?"),
        ("--lr 3", "no option --lr: did you mean optimizer.learning_rate?"),
        ("--data.vocabsize 3", "did you mean data.vocab_size?"),
        ("--qqqq 3", "colrow train --help"),
        ("-tp 3", "two dashes"),
        ("--mesh.tp", "--mesh.tp needs a value"),
        ("--mesh.tp x", "mesh.tp: expected int. Got value: x"),
        ("--precision fp16", "precision: expected one of 'fp32'"),
        ("--optimizer.betas [0.9]", "optimizer.betas: expected"),
        ("--mesh.tp 0", "mesh.tp=0 must be at least 1"),
        ("--mesh.dp 3", "batch_size=8 cannot be divided by mesh.dp=3"),
        ("--mesh.tp -1", "mesh.tp=-1 must be at least 1"),
        ("--batch_size 0", "batch_size=0 must be at least 1"),
        ("--micro_batch_size 9", "micro_batch_size=9 is more than batch_size=8"),
        ("--micro_batches 3", "batch_size=8 cannot be divided by micro_batches=3"),
        ("--micro_batches 2 --micro_batch_size 4", "either micro_batch_size or micro_batches; both"),
        ("--mesh.pp 2 --micro_batch_size 3", "the micro-batches of a pipeline are equally large"),
        ("--mesh.pp 0", "mesh.pp=0 must be at least 1"),
        ("--mesh.schedule 2b2f", "mesh.schedule: expected one of 'gpipe'"),
        ("--mesh.tp 3 --mesh.share [1,2]", "must be mesh.tp=3 positive numbers"),
        ("--steps 5", "warmup_steps=10 must be fewer than steps=5"),
        ("--steps 0", "steps=0 must be at least 1"),
        ("--steps null", "either steps or minutes as the length of the training; neither"),
        ("--minutes 2", "either steps or minutes as the length of the training; both"),
        ("--steps null --minutes 2 --optimizer.warmup_steps 3", "must be at least 10"),
        ("--steps null --minutes 0", "minutes=0"),
        ("--model.config null", "either model.config (a new model) or model.path"),
        ("--model.path x", "either model.config (a new model) or model.path"),
        ("--model.path x --model.config null", "model.fields belong to model.config"),
        ("--data.sequence_length 1", "data.sequence_length=1 must be at least 2"),
        ("--data.vocab_size 256", "data.vocab_size=256 must be at least 257"),
        ("--data.validation_fraction 0.9", "data.validation_fraction=0.9"),
        ("--optimizer.learning_rate 0", "optimizer.learning_rate=0"),
        ("--optimizer.betas [0.9,1]", "optimizer.betas"),
        ("--optimizer.max_norm 0", "optimizer.max_norm=0"),
        ("--optimizer.weight_decay -1", "optimizer.weight_decay=-1"),
        ("--optimizer.final_fraction 2", "optimizer.final_fraction=2"),
        ("--evaluate_every 0", "evaluate_every=0"),
        ("--checkpoint_every 0", "checkpoint_every=0"),
        ("--keep_checkpoints 0", "keep_checkpoints=0"),
        ("--timeout 0", "timeout=0"),
        ("--seed -1", "seed=-1"),
        ("--resume --overwrite", "resume and overwrite exclude each other"),
        ("--sample.temperature -1", "sample.temperature=-1"),
    ],
)
def test_mistakes_on_the_command_line(file: str, arguments: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse([file, *arguments.split()])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_suggests_its_neighbour(file: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"no configuration file .*smal\.yaml: did you mean .*small\.yaml"
    ):
        parse([file.replace("small", "smal")])


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    import colrow.train.parse as module

    for name, _ in module._fields(TrainConfiguration):
        assert f"--{name} " in text or f"--{name}\n" in text
    assert "rises linearly over so many steps. (type: int, default: 10)" in " ".join(text.split())
