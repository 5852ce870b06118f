"""Configuration: defaults < file < flags, and one clear sentence for every mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pydantic
import pytest

from kleash.base.config import Config, RunId, describe_config, load_config, save_config
from kleash.base.errors import ConfigError

pytestmark = pytest.mark.unit


class Optimizer(Config):
    """A nested section."""

    learning_rate: float = pydantic.Field(default=1e-5, gt=0)
    """Step size, per step."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""


class Job(Config):
    """One field of each kind."""

    model: Path
    """Model folder."""
    name: str = "job"
    """A name."""
    steps: int = 10
    """Number of steps."""
    is_fast: bool = False
    """Whether to hurry."""
    mode: Literal["sync", "async"] = "sync"
    """How."""
    addresses: tuple[str, ...] = ()
    """Where."""
    seed: int | None = None
    """Null draws one."""
    note: str | None = None
    """Free text."""
    optimizer: Optimizer = Optimizer()
    """The optimizer."""

    @pydantic.model_validator(mode="after")
    def _fast_is_short(self) -> Job:
        if self.is_fast and self.steps > 100:
            raise ValueError(f"is_fast takes at most 100 steps and steps is {self.steps}; lower it")
        return self


def sentence(*arguments: str) -> str:
    """The error that ``arguments`` give."""
    with pytest.raises(ConfigError) as caught:
        load_config(Job, arguments)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """A file that sets a few keys."""
    path = tmp_path / "job.toml"
    path.write_text('model = "m"\nsteps = 20\n[optimizer]\nlearning_rate = 0.5\n', encoding="utf-8")
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(toml: Path) -> None:
    config = load_config(Job, [str(toml), "--steps=30", "--optimizer.betas", "[0.5, 0.6]"])
    assert (config.model, config.steps, config.name) == (Path("m"), 30, "job")
    assert config.optimizer == Optimizer(learning_rate=0.5, betas=(0.5, 0.6))


def test_flags_may_come_before_the_file_and_use_dashes(toml: Path) -> None:
    config = load_config(Job, ["--optimizer.learning-rate", "1e-3", "--is-fast", str(toml)])
    assert config.optimizer.learning_rate == 1e-3
    assert config.is_fast
    assert config.steps == 20


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--is_fast"], True),
        (["--is_fast", "false"], False),
        (["--is_fast=true"], True),
        (["--is_fast", "--steps=3"], True),
    ],
)
def test_a_bool_flag_needs_no_value(arguments: list[str], expected: bool) -> None:
    assert load_config(Job, ["--model=m", *arguments]).is_fast is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [('["a:1", "b:2"]', ("a:1", "b:2")), ("a:1,b:2", ("a:1", "b:2")), ("a:1", ("a:1",))],
)
def test_a_list_is_a_literal_or_commas(text: str, expected: tuple[str, ...]) -> None:
    assert load_config(Job, ["--model=m", f"--addresses={text}"]).addresses == expected


def test_a_string_stays_a_string_and_null_is_none() -> None:
    config = load_config(Job, ["--model=3", "--name=1e5", "--note=null", "--seed=null"])
    assert (config.model, config.name, config.note, config.seed) == (Path("3"), "1e5", None, None)
    assert load_config(Job, ["--model=m", "--name=null", "--note=true"]).name == "null"


def test_a_negative_number_is_a_value() -> None:
    assert load_config(Job, ["--model=m", "--seed", "-5"]).seed == -5


def test_an_unknown_key_names_the_nearest() -> None:
    assert sentence("--model=m", "--step=3") == "unknown key 'step'; did you mean 'steps'?"
    assert "did you mean 'optimizer.learning_rate'?" in sentence(
        "--model=m", "--optimizer.learning_rat=1"
    )
    assert "--help lists the keys" in sentence("--model=m", "--zzzzzzzz=1")


def test_an_unknown_section_names_the_nearest(toml: Path) -> None:
    toml.write_text('model = "m"\n[optimiser]\nlearning_rate = 1\n', encoding="utf-8")
    message = sentence(str(toml))
    assert message == f"{toml}: unknown key 'optimiser'; did you mean 'optimizer'?"


def test_a_missing_required_key_says_how_to_set_it() -> None:
    assert sentence() == "'model' is required; set it in the file or with --model=VALUE."


def test_a_bad_literal_shows_the_choices_and_the_value() -> None:
    message = sentence("--model=m", "--mode=fast")
    assert "'mode'" in message
    assert "'sync' or 'async'" in message
    assert "got 'fast'" in message


def test_every_problem_is_told_at_once() -> None:
    message = sentence("--steps=x", "--mod=y")
    for part in ("'model' is required", "'steps'", "got 'x'", "unknown key 'mod'"):
        assert part in message


def test_a_rule_across_fields_speaks_for_itself() -> None:
    message = sentence("--model=m", "--is_fast", "--steps=101")
    assert message == ("configuration: is_fast takes at most 100 steps and steps is 101; lower it.")


@pytest.mark.parametrize("value", ["nan", "inf", "NaN", "Infinity", "0", "-1"])
def test_numbers_must_be_finite_and_in_range(value: str) -> None:
    assert "'optimizer.learning_rate'" in sentence(
        "--model=m", f"--optimizer.learning_rate={value}"
    )


def test_two_files_are_refused(toml: Path) -> None:
    assert sentence(str(toml), "other.toml").startswith(
        f"two configuration files, {toml} and other.toml: give one"
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert sentence(str(missing)) == (
        f"cannot read the configuration file {missing}: No such file or directory."
    )
    assert "Is a directory" in sentence(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.toml", b"steps = \n", "is not valid TOML: Invalid value (at line 1, column 9)"),
        ("a.json", b"{", "is not valid JSON"),
        ("a.toml", b"name = '\xff'", "is not valid TOML: 'utf-8' codec"),
        ("a.json", b"[1]", "must hold a JSON object, not list"),
    ],
)
def test_a_malformed_file_is_one_sentence(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = sentence(str(path), "--steps=1")
    assert message.startswith(str(path))
    assert expected in message


def test_a_section_is_not_a_value() -> None:
    assert "'optimizer'" in sentence("--model=m", "--optimizer=3")


def test_json_round_trip(tmp_path: Path) -> None:
    config = load_config(
        Job, ["--model=m", "--addresses=a,b", "--seed=0", "--optimizer.betas=[0.1,0.2]"]
    )
    path = tmp_path / "config.json"
    save_config(config, path)
    assert load_config(Job, [str(path)]) == config
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_configuration_does_not_change() -> None:
    config = load_config(Job, ["--model=m"])
    with pytest.raises(pydantic.ValidationError):
        config.steps = 3  # type: ignore[misc]


def test_the_description_has_every_leaf_with_its_documentation() -> None:
    rows = {key: rest for key, *rest in describe_config(Job)}
    assert rows["model"] == ["Path", "required", "Model folder."]
    assert rows["mode"] == ["sync|async", '"sync"', "How."]
    assert rows["seed"] == ["int or null", "null", "Null draws one."]
    assert rows["optimizer.learning_rate"] == ["float", "1e-05", "Step size, per step."]
    assert json.loads(rows["optimizer.betas"][1]) == [0.9, 0.95]
    assert "optimizer" not in rows


class Stage(Config):
    """A stage of a run."""

    run_id: RunId = None
    """Its run."""


@pytest.mark.parametrize("run_id", ["a", "0", "nightly-7", "Team_A.2026-11-25", "x" * 63])
def test_the_id_of_a_run_is_a_label_of_kubernetes(run_id: str) -> None:
    assert load_config(Stage, [f"--run_id={run_id}"]).run_id == run_id
    assert load_config(Stage, ["--run_id=null"]).run_id is None


@pytest.mark.parametrize("run_id", ["", "-a", "a-", "a b", "a/b", "ü", "x" * 64, "a\n"])
def test_what_is_no_label_is_no_id_of_a_run(run_id: str) -> None:
    with pytest.raises(ConfigError, match="'run_id': must be at most 63 letters, digits, '-'"):
        load_config(Stage, [f"--run_id={run_id}"])
