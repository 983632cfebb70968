"""The teacher's licence goes from its folder through the checkpoint into the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from huggingface_hub import ModelCard  # noqa: E402
from hydra_tools import cli  # noqa: E402
from kit.tiny_models import PLAN  # noqa: E402
from kit.tiny_qwen3 import write_tiny_qwen3  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from megatron_hydra.errors import UserError  # noqa: E402
from megatron_hydra.teachers.checkpoint import read_metadata  # noqa: E402
from megatron_hydra.teachers.license import License, read_license  # noqa: E402

NONE = License((), "", "", "", "")
APACHE = "\n                                 Apache License\n               Version 2.0\n"
OTHER = 'license: other\nlicense_name: "a: \\"b\\""\nlicense_link: https://example.org/it'


def _write(folder: Path, front_matter: str | None = None, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    if front_matter is not None:
        (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# license: not this\n")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("front_matter", "files", "expected"),
    [
        (None, {}, NONE),
        ("tags: [a]", {}, NONE),
        ("license: mit", {}, License(("mit",), "", "", "", "")),
        ("license: [mit, apache-2.0]", {}, License(("mit", "apache-2.0"), "", "", "", "")),
        (OTHER, {}, License(("other",), 'a: "b"', "https://example.org/it", "", "")),
        (None, {"LICENSE": APACHE}, License((), "", "", "LICENSE", "Apache License")),
        ("license: mit", {"Licence.txt": "x"}, License(("mit",), "", "", "Licence.txt", "x")),
        (None, {"COPYING": "\n", "LICENSE": "y"}, License((), "", "", "LICENSE", "y")),
        (None, {"LICENSE-MIT.md": "x"}, License((), "", "", "LICENSE-MIT.md", "x")),
        (None, {"license_plates.py": "x", "licenses.txt": "y"}, NONE),
        (None, {"README.md": "# Model\nlicense: mit\n"}, NONE),
        (None, {"README.md": "text\n---\nlicense: mit\n---\n"}, NONE),
        ("- a list", {}, NONE),
    ],
)
def test_what_a_folder_says(tmp_path, front_matter, files, expected):
    assert read_license(_write(tmp_path / "teacher", front_matter, **files)) == expected


def test_front_matter_that_is_no_yaml_is_said_and_passed_over(tmp_path, caplog):
    folder = _write(tmp_path / "teacher", "license: [mit", LICENSE="MIT License")
    assert read_license(folder) == License((), "", "", "LICENSE", "MIT License")
    assert "is no YAML" in caplog.text
    (folder / "LICENSE").unlink()
    assert read_license(folder) is None, "it may name one"
    # What PyYAML takes and this package's own configurations may not have.
    twice = _write(tmp_path / "twice", "a: 1:30\na: 010\nlicense: mit\ndate: 2024-01-31")
    assert read_license(twice) == License(("mit",), "", "", "", "")
    wrong = _write(tmp_path / "wrong", "license: mit\ndate: 2024-13-41")
    assert read_license(wrong) is None


def _convert_and_export(teacher: Path, folder: Path) -> ModelCard:
    PLAN.save(folder / "plan.json")
    convert = ["convert", "--teacher", str(teacher), "--plan", f"{folder}/plan.json"]
    convert += ["--calibration-tokens", "256", "--out", f"{folder}/hybrid"]
    assert cli.main(convert) == 0
    assert cli.main(["export", "--model", f"{folder}/hybrid", "--out", f"{folder}/hf"]) == 0
    return ModelCard.load(folder / "hf/README.md")


def test_from_the_folder_to_the_card_and_back(tmp_path):
    """The card is read by the hub's own package."""
    teacher = _write(write_tiny_qwen3(tmp_path / "qwen3"), OTHER, LICENSE=APACHE)
    card = _convert_and_export(teacher, tmp_path)
    assert card.data.license == "other" and card.data.license_name == 'a: "b"'
    assert card.data.license_link == "https://example.org/it"
    assert card.data.library_name == "transformers"
    assert 'README.md says `other` (a: "b", https://example.org/it)' in card.text
    assert 'LICENSE begins "Apache License"' in card.text
    assert cli.main(["convert", "--hybrid", f"{tmp_path}/hf", "--out", f"{tmp_path}/back"]) == 0
    metas = [read_metadata(tmp_path / name) for name in ("hybrid", "back")]
    assert metas[0]["teacher_license"] == metas[1]["teacher_license"] != NONE


def test_a_teachers_card_has_its_licence_too(tmp_path):
    """And what a later `convert` of the exported folder reads there."""
    teacher = _write(write_tiny_qwen3(tmp_path / "qwen3"), "license: mit")
    assert cli.main(["convert", "--teacher", str(teacher), "--out", f"{tmp_path}/teacher"]) == 0
    assert cli.main(["export", "--model", f"{tmp_path}/teacher", "--out", f"{tmp_path}/hf"]) == 0
    card = ModelCard.load(tmp_path / "hf/README.md")
    assert card.data.license == "mit" and card.data.tags == ["teacher"]
    assert "trust_remote_code" not in card.text and "model code" not in card.text
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    heads = config.num_hidden_layers * config.num_attention_heads
    assert f"| heads with full attention | {heads} |" in card.text
    cache = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert f"| cache per token, float32 | {cache:,} bytes |" in card.text
    found = read_license(tmp_path / "hf")
    assert found is not None and found.ids == ("mit",)


def test_a_folder_that_states_none_and_a_checkpoint_that_does_not_know(tmp_path, capsys):
    card = _convert_and_export(write_tiny_qwen3(tmp_path / "qwen3"), tmp_path)
    assert card.data.license is None
    assert "The teacher's folder states no licence." in card.text
    path = tmp_path / "hybrid/model.json"
    meta = json.loads(path.read_text())
    del meta["teacher_license"]  # as earlier releases wrote it
    path.write_text(json.dumps(meta))
    export = ["export", "--model", f"{tmp_path}/hybrid", "--out", f"{tmp_path}/hf", "--overwrite"]
    assert cli.main(export) == 0
    card = ModelCard.load(tmp_path / "hf/README.md")
    assert card.data.license is None and "states no licence" not in card.text
    assert "Which that is, the checkpoint does not say." in card.text
    back = ["convert", "--hybrid", f"{tmp_path}/hf", "--out", f"{tmp_path}/back"]
    assert cli.main(back) == 0
    assert read_metadata(tmp_path / "back")["teacher_license"] is None
    for change, sentence in (
        ({"ids": "mit"}, r"model\.json.*ids is 'mit'; a list is needed"),
        ({"idz": []}, "unknown key"),
    ):
        path.write_text(json.dumps({**meta, "teacher_license": {**vars(NONE), **change}}))
        with pytest.raises(UserError, match=sentence):
            read_metadata(path.parent)
    kept = tmp_path / "hf/checkpoint.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "teacher_license": 1}))
    assert cli.main([*back, "--overwrite"]) == 2
    assert "teacher_license in checkpoint.json" in capsys.readouterr().err.splitlines()[-1]
