"""What a user can get wrong: one sentence with the place and the remedy, a status, no output."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from kleash.cli.main import main
from kleash.lm.tiny import Kind

pytestmark = pytest.mark.e2e

MESSAGES = [
    {"role": "user", "content": "What is 3 plus 4?"},
    {"role": "assistant", "content": "7."},
]
TEXT = {"prompt": "What is 3 plus 4?", "completion": " 7."}


def _write(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def _edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _fails(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, *parts: str
) -> None:
    """The command ends with ``status`` and one line on standard error that holds every part."""
    capsys.readouterr()
    assert main(arguments) == status
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"prompt": "a", "completion": ', ("data.jsonl:2", "JSON")),
        ({"prompt": "a"}, ("data.jsonl:2", "completion")),
        ({"prompt": "a", "completion": 7}, ("data.jsonl:2", "completion")),
        ({"messages": [{"role": "user", "content": "hi"}]}, ("data.jsonl:2", "messages")),
        ({"prompt": "a", "completion": " b " * 400}, ("data.jsonl:2", "tokens")),
    ],
    ids=["malformed", "missing field", "wrong type", "no response", "longer than the context"],
)
def test_a_bad_line_is_named(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: Any,
    parts: tuple[str, ...],
) -> None:
    data, out = _write(tmp_path / "data.jsonl", TEXT, line), tmp_path / "out"
    _fails(capsys, ["sft", f"--model={tiny_folder}", f"--data={data}", f"--out={out}"], 2, *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_skip_bad_counts_what_it_skips(tiny_folder: Path, tmp_path: Path) -> None:
    data, out = _write(tmp_path / "data.jsonl", TEXT, "{", {"prompt": "a"}), tmp_path / "out"
    assert (
        main(["sft", f"--model={tiny_folder}", f"--data={data}", f"--out={out}", "--skip_bad"]) == 0
    )
    assert json.loads((out / "report.json").read_text())["samples_skipped"] == 2


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_tokenizer_without_chat_template_or_pad_token(
    tiny_folders: dict[Kind, Path], kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folders[kind], tmp_path / "model"))
    for path in folder.glob("chat_template*"):
        path.unlink()
    _edit_json(folder / "tokenizer_config.json", chat_template=None)
    data, out = _write(tmp_path / "data.jsonl", {"messages": MESSAGES}), tmp_path / "out"
    arguments = ["sft", f"--model={folder}", f"--data={data}", f"--out={out}"]
    _fails(capsys, arguments, 2, "chat template", "--chat_template=")
    assert not out.exists()
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert main([*arguments, f"--chat_template={template}"]) == 0

    if kind == "qwen2":
        return  # the class of Qwen2 tokenizers brings a pad token of its own
    _edit_json(folder / "tokenizer_config.json", pad_token=None)
    data = _write(tmp_path / "text.jsonl", TEXT)
    arguments = ["sft", f"--model={folder}", f"--data={data}", f"--out={tmp_path / 'second'}"]
    _fails(capsys, arguments, 2, "pad token", "--pad_token=")
    assert main([*arguments, "--pad_token=<|padding|>"]) == 0


def test_a_model_folder_without_weights(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    data, out = _write(tmp_path / "data.jsonl", TEXT), tmp_path / "out"
    _fails(
        capsys,
        ["sft", f"--model={folder}", f"--data={data}", f"--out={out}"],
        2,
        str(folder),
        "safetensors",
    )
    _fails(capsys, ["serve", "reward", f"--model={folder}"], 2, str(folder), "safetensors")
    _fails(
        capsys,
        ["sft", "--model=nowhere", f"--data={data}", f"--out={out}"],
        2,
        "nowhere does not exist",
    )
    assert not out.exists()


def test_an_output_folder_that_exists(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = _write(tmp_path / "data.jsonl", TEXT), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    _fails(
        capsys,
        ["sft", f"--model={tiny_folder}", f"--data={data}", f"--out={out}"],
        2,
        str(out),
        "exists",
    )
    assert (out / "precious").read_text() == "kept"


def test_a_port_in_use(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _fails(
            capsys,
            ["serve", "reference", f"--model={tiny_folder}", f"--server.port={port}"],
            2,
            f"port {port}",
            "in use",
            "--server.port",
        )


def test_services_that_are_down(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = _write(tmp_path / "prompts.jsonl", {"prompt": "hello"}), tmp_path / "run"
    arguments = [
        "ppo",
        f"--model={tiny_folder}",
        f"--reward_model={tiny_reward_folder}",
        f"--prompts={prompts}",
        f"--out={out}",
        "--services.policy=127.0.0.1:1",
        "--services.wait_s=0.5",
    ]
    _fails(capsys, arguments, 3, "policy service at 127.0.0.1:1", "kleash serve policy")
    assert not out.exists()


def test_a_prompt_longer_than_the_context(
    tiny_folder: Path, tiny_reward_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = _write(tmp_path / "prompts.jsonl", {"prompt": "short"}, {"prompt": "long " * 300})
    arguments = [
        "candidates",
        f"--model={tiny_folder}",
        f"--data={prompts}",
        f"--out={tmp_path / 'candidates.jsonl'}",
    ]
    _fails(capsys, arguments, 2, "prompts.jsonl:2", "tokens")
    out = tmp_path / "run"
    arguments = [
        "up",
        f"--ppo.model={tiny_folder}",
        f"--ppo.reward_model={tiny_reward_folder}",
        "--in_process",
        f"--ppo.prompts={prompts}",
        f"--ppo.out={out}",
        "--ppo.sampling.max_new_tokens=8",
        "--ppo.max_prompt_tokens=64",
        "--ppo.total_steps=1",
        "--ppo.batch_size=2",
    ]
    _fails(capsys, arguments, 2, "prompts.jsonl:2", "tokens")
    assert not (out / "metrics.jsonl").exists()
    assert main([*arguments, "--ppo.skip_bad"]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
