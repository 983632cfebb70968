"""The exported folder: loads by transformers' own means where this package is not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

import transformers  # noqa: E402
from hydra_tools import cli  # noqa: E402
from kit.exported import megatron_logits  # noqa: E402
from kit.offline import NEWEST, run_offline  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402
from kit.tiny_qwen3 import write_tiny_teacher  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from megatron_hydra.evaluation.generation import (  # noqa: E402
    Answered,
    GeneratedResult,
    Generation,
)
from megatron_hydra.export.code import code_hash  # noqa: E402
from megatron_hydra.head_plan import HeadPlan  # noqa: E402
from megatron_hydra.parallel import initialize_model_parallel  # noqa: E402
from megatron_hydra.teachers.checkpoint import load_checkpoint  # noqa: E402
from megatron_hydra.teachers.families import FAMILIES  # noqa: E402

TOKENS = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(1))
STRANGER = """
import json, sys
for name in ("megatron_hydra", "hydra_kernels", "hydra_tools", "megatron", "nemo"):
    sys.modules[name] = None  # importing one raises
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder, tokens, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
torch.save(model(torch.load(tokens)).logits.detach(), out)
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=True)
generate = pipeline("text-generation", folder, trust_remote_code=True)
options = dict(max_new_tokens=12, do_sample=False, return_full_text=False)
texts = ["Once upon a time", "a"]
alone = [generate(text, **options)[0]["generated_text"] for text in texts]
tokenizer.pad_token = tokenizer.eos_token
batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
ids = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch.input_ids.shape[1]:]
together = tokenizer.batch_decode(ids, skip_special_tokens=True)
said = {"alone": alone, "together": together, "class": type(model).__module__}
print(json.dumps({**said, "transformers": transformers.__version__}))
"""

SPREAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

folder, tokens, out, device_map = sys.argv[1:]
device_map = json.loads(device_map)
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, device_map=device_map, offload_folder=out + ".offloaded"
)
tokens = torch.load(tokens)
logits = model(tokens).logits.detach()
rows = model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
torch.save((logits, rows), out)
spread = getattr(model, "hf_device_map", {})  # none where all lie on one device
print(json.dumps({name: str(device) for name, device in spread.items()}))
"""

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
sources = pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *((name, {}) for name in FAMILIES),
        ("qwen3", {"tie_word_embeddings": False}),
        *(
            (name, {"rope_scaling": LLAMA3, "tie_word_embeddings": False})
            for name, family in FAMILIES.items()
            if "llama3" in family.rope_types
        ),
    ],
)
"""Teachers of every family; without and with an output layer of their own; with scaled RoPE."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Checkpoints `teacher` and `hybrid`; `hf` and, in many files, `sharded`, exported of it."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, PLAN_OF_KINDS)
    export = ["export", "--model", f"{folder}/hybrid", "--out"]
    assert cli.main([*export, f"{folder}/hf"]) == 0
    assert cli.main([*export, f"{folder}/sharded", "--max-shard-gb", "3e-5"]) == 0
    return folder


def _expected(folder: Path) -> torch.Tensor:
    initialize_model_parallel()
    return megatron_logits(load_checkpoint(folder).model.eval(), TOKENS)


def _load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.mark.parametrize(
    ("python", "name"),
    [
        (sys.executable, "hf"),
        (NEWEST, "hf"),
        pytest.param(sys.executable, "sharded", marks=pytest.mark.exhaustive),
    ],
)
def test_a_stranger_loads_it_and_generates(models, tmp_path, python, name):
    if not Path(python).is_file():
        pytest.skip("no environment of the newest transformers: make test makes it")
    torch.save(TOKENS, tmp_path / "tokens.pt")
    arguments = [models / name, tmp_path / "tokens.pt", tmp_path / "logits.pt"]
    printed = run_offline(tmp_path, python, "-I", "-c", STRANGER, *arguments)
    logits, expected = torch.load(tmp_path / "logits.pt"), _expected(models / "hybrid")
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    said = json.loads(printed.splitlines()[-1])
    assert said["class"].startswith("transformers_modules")
    assert said["transformers"].startswith("5." if python == NEWEST else "4.")
    assert said["alone"] == said["together"] and all(said["alone"])


@pytest.mark.parametrize(
    "device_map",
    [
        pytest.param("auto", id="auto", marks=pytest.mark.exhaustive),
        pytest.param(
            {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
             "model.norm": "cpu", "lm_head": "cpu"},
            id="a layer on the disk",
        ),
    ],
)  # fmt: skip
def test_accelerate_spreads_its_layers(models, tmp_path, device_map):
    if not Path(NEWEST).is_file():
        pytest.skip("no environment of the newest transformers: make test makes it")
    torch.save(TOKENS, tmp_path / "tokens.pt")
    arguments = [models / "hf", tmp_path / "tokens.pt", tmp_path / "out.pt", json.dumps(device_map)]
    printed = run_offline(tmp_path, NEWEST, "-I", "-c", SPREAD, *arguments)
    devices = json.loads(printed.splitlines()[-1])
    assert set(devices.values()) == (set() if device_map == "auto" else {"cpu", "disk"})
    logits, rows = torch.load(tmp_path / "out.pt")
    model = _load(models / "hf")
    torch.testing.assert_close(logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    whole = model.generate(TOKENS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(rows, whole)


def test_shards_hold_the_same_tensors(models):
    whole = load_file(models / "hf/model.safetensors")
    parts = [load_file(path) for path in sorted((models / "sharded").glob("*.safetensors"))]
    assert len(parts) > 3
    assert max(sum(t.nbytes for t in part.values()) for part in parts[1:]) <= 30_000
    together = {name: tensor for part in parts for name, tensor in part.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in whole.items())
    index = json.loads((models / "sharded/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())


def test_in_bfloat16_the_few_float32_parameters_stay(models, tmp_path):
    arguments = ["--model", f"{models}/hybrid", "--out", f"{tmp_path}/hf", "--dtype", "bfloat16"]
    assert cli.main(["export", *arguments]) == 0
    model = _load(tmp_path / "hf", dtype="auto")
    full = _load(models / "hf")
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    words = {name.rpartition(".")[2] for name in wide}
    assert words == {"A_log", "dt_bias", "head_scale", "sink"}
    for name, parameter in full.named_parameters():
        expected = parameter if name in wide else parameter.bfloat16()
        assert torch.equal(model.get_parameter(name), expected), name
    for name, parameter in _load(models / "hf", dtype=torch.bfloat16).named_parameters():
        assert parameter.dtype == model.get_parameter(name).dtype, name
    agreement = (model(TOKENS).logits.argmax(-1) == full(TOKENS).logits.argmax(-1)).float().mean()
    assert agreement > 0.9


def test_transformers_saves_what_it_has_loaded(models, tmp_path):
    # By a name that this process has not loaded: transformers saves no code of classes that it has
    # made a second time, as after a test that changes a folder's code.
    model = _load(shutil.copytree(models / "hf", tmp_path / "loaded_once"))
    model.save_pretrained(tmp_path / "again")
    again = _load(tmp_path / "again")
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)


def test_the_card_tells_the_plans_figures(models):
    card = (models / "hf/README.md").read_text("utf-8")
    assert "| heads with full attention | 2 of 8 |" in card
    assert "| query groups whose keys and values are stored | 2 of 4 |" in card
    # Two groups of key and value, 16 channels each in float32; the teacher has four.
    assert "| cache per token, float32 | 256 bytes (teacher: 512) |" in card
    assert "sliding_window` | 1 |" in card and f"transformers {transformers.__version__}" in card
    assert code_hash() in card and "2606.20097" in card


def test_the_card_has_the_results_that_are_named(models, tmp_path, capsys):
    cell = Answered.count(("vt", 512), [5, 3, 0, 5], [5, 5, 5, 5])
    row = GeneratedResult("a|b", "b", 2, 8, 64, 0, (cell,))
    Generation((row,), "Not RULER.", "bf16", "0", {}).save(tmp_path / "results.json")
    export = ["export", "--model", f"{models}/hybrid", "--out", f"{tmp_path}/hf", "--results"]
    assert cli.main([*export, f"{tmp_path}/results.json"]) == 0
    card = (tmp_path / "hf/README.md").read_text("utf-8")
    assert "## By generation\nNot RULER." in card and "| task | tokens | a\\|b |" in card
    assert "| vt | 512 | 50 [15, 85] |" in card
    assert "By generation" not in (models / "hf/README.md").read_text("utf-8")
    assert cli.main([*export, f"{models}/plan.json", "--overwrite"]) == 2
    assert "a file of kind 'generation' is needed" in capsys.readouterr().err


@sources
def test_a_teacher_goes_back_as_it_came(tmp_path, model_type, fields):
    source = write_tiny_teacher(tmp_path / "source", model_type, **fields)
    convert = ["convert", "--teacher", str(source), "--out", f"{tmp_path}/checkpoint"]
    assert cli.main(convert) == 0
    export = ["export", "--model", f"{tmp_path}/checkpoint", "--out", f"{tmp_path}/hf"]
    assert cli.main(export) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "hf"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "hf")]
    assert type(models[0]) is type(models[1])
    assert torch.equal(models[0](TOKENS).logits, models[1](TOKENS).logits)


@sources
def test_hybrids_of_every_family(tmp_path, model_type, fields):
    source = write_tiny_teacher(tmp_path / "source", model_type, **fields)
    PLAN_OF_KINDS.save(tmp_path / "plan.json")
    convert = ["convert", "--teacher", str(source), "--plan", f"{tmp_path}/plan.json"]
    convert += ["--out", f"{tmp_path}/hybrid", "--calibration-tokens", "256", "model.fusion=gate"]
    convert += ["model.fa_rope=true"]
    assert cli.main(convert) == 0
    assert cli.main(["export", "--model", f"{tmp_path}/hybrid", "--out", f"{tmp_path}/hf"]) == 0
    logits = _load(tmp_path / "hf")(TOKENS).logits
    torch.testing.assert_close(logits, _expected(tmp_path / "hybrid"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "{}/qwen3", "--out", "{}/new"], "is a Hugging Face folder already"),
        (["--model", "{}/hybrid", "--out", "{}/hf"], "exists: name another, or pass --overwrite"),
        (
            ["--model", "{}/hybrid", "--out", "{}/teacher", "--overwrite"],
            "holds something else: it has no config.json",
        ),
        (["--model", "{}/hybrid", "--out", "{}/hybrid/new"], "lies in the input"),
        (["--model", "{}/hybrid", "--out", "{}/new", "--max-shard-gb", "0"], "must be 1 or more"),
        (["--model", "{}/hybrid", "--out", "{}/new", "--max-shard-gb", "nan"], "a finite number"),
        (["--model", "{}/gone", "--out", "{}/new"], "gone does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(models, capsys, arguments, sentence):
    before = sorted(models.rglob("*"))
    assert cli.main(["export", *(text.format(models) for text in arguments)]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert sorted(models.rglob("*")) == before


def test_a_failure_on_the_way_leaves_nothing(models, capsys):
    """Of a checkpoint whose weights are another plan's."""
    plan = models / "hybrid/plan.json"
    whole = plan.read_text("utf-8")
    plan.unlink()
    HeadPlan.from_fa_heads({0: [0], 1: [0]}, 2, 4, 2).save(plan)
    try:
        code = cli.main(["export", "--model", f"{models}/hybrid", "--out", f"{models}/new"])
    finally:
        plan.write_text(whole, "utf-8")
    assert code == 2 and len(capsys.readouterr().err.strip().splitlines()[-1]) > 20
    assert not [path for path in models.iterdir() if "new" in path.name]


@pytest.mark.parametrize("damage", ["another kind", "another size", "a tensor less"])
def test_weights_of_another_plan_are_not_drawn_at_random(models, tmp_path, capsys, damage):
    """Transformers alone would warn, and go on."""
    folder = shutil.copytree(models / "hf", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tensors, kinds = load_file(folder / "model.safetensors"), config["head_kinds"]
    if damage == "a tensor less":
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    else:
        old, new = ("kda", "sliding_window") if damage == "another kind" else ("fa", "kda")
        (layer, head), *_ = [
            (i, j) for i, layer in enumerate(kinds) for j, kind in enumerate(layer) if kind == old
        ]
        kinds[layer][head] = new
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match=r"the weights are not of this configuration: \d+ of its"):
        _load(folder)
    evaluate = ["evaluate", "--hf", f"h={folder}", "--out", f"{tmp_path}/evaluation.json"]
    evaluate += ["--tasks", "niah_single_1", "--lengths", "700", "--num-samples", "5"]
    assert cli.main(evaluate) == 2
    assert "the weights are not of this configuration" in capsys.readouterr().err.splitlines()[-1]
