"""EleutherAI's harness, by its own command line, on an exported folder and the example's task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

LM_EVAL = Path(sys.prefix) / "lm-eval/bin/lm_eval"
EXAMPLE = Path(__file__).parents[2] / "examples/lm_eval"
NEW_TOKENS = 8


@pytest.mark.exhaustive
def test_the_harness_finds_what_the_model_generates(tmp_path):
    """Every second answer is made what the model goes on with; the harness must find half of it."""
    if not LM_EVAL.is_file():
        pytest.skip("no environment of lm-eval: make test-slow makes it")
    _export(tmp_path, 1024)
    prompts = tmp_path / "prompts.jsonl"
    ask = ["--tasks", "vt", "--lengths", "600", "--num-samples", "4", "--dump", str(prompts)]
    assert cli.main(["evaluate", "--hf", f"{tmp_path}/hf", *ask]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    lines = []
    for index, line in enumerate(prompts.read_text("utf-8").splitlines()):
        sample = json.loads(line)
        tokens = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        with torch.no_grad():
            first = int(model(tokens).logits[0, -1].argmax())
        wanted = tokenizer.decode([first]) if index % 2 else "\x00 nowhere"
        lines.append(json.dumps({**sample, "answers": [wanted, "nowhere else"]}))
    prompts.write_text("\n".join(lines) + "\n", "utf-8")
    options = ["--include_path", EXAMPLE, "--gen_kwargs", f"max_gen_toks={NEW_TOKENS}"]
    _run(tmp_path, "hydra_needles", *options)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["hydra_needles"]["found,none"]
    assert found == 0.25  # half of the answers of half of the samples


@pytest.mark.exhaustive
def test_its_own_ruler_tasks_ask_the_exported_model(tmp_path):
    """Those whose data is generated; what is counted is what greedy decoding gives, by hand."""
    if not LM_EVAL.is_file():
        pytest.skip("no environment of lm-eval: make test-slow makes it")
    _export(tmp_path, 8192)
    metadata = json.dumps({"max_seq_lengths": [4096]})
    options = ["--limit", "1", "--log_samples", "--metadata", metadata]
    options += ["--gen_kwargs", f"max_gen_toks={NEW_TOKENS}"]
    _run(tmp_path, "niah_single_1,niah_multikey_2", *options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    files = sorted((tmp_path / "out").rglob("samples_niah_*.jsonl"))
    assert len(files) == 2
    for file in files:
        (sample,) = map(json.loads, file.read_text("utf-8").splitlines())
        prompt = sample["arguments"]["gen_args_0"]["arg_0"]
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["resps"] == [[text]]
        assert all(answer in prompt for answer in sample["doc"]["outputs"])
        right = sum(a.lower() in text.lower() for a in sample["doc"]["outputs"])
        assert sample["4096"] == right / len(sample["doc"]["outputs"])


def _export(folder: Path, length: int) -> None:
    write_models(folder, PLAN_OF_KINDS, max_position_embeddings=length)
    assert cli.main(["export", "--model", f"{folder}/hybrid", "--out", f"{folder}/hf"]) == 0


def _run(folder: Path, tasks: str, *options: object) -> None:
    """The harness, on the folder's `hf`, into its `out`."""
    command = [LM_EVAL, "--model", "hf", "--device", "cpu", "--output_path", "out"]
    command += ["--model_args", "pretrained=hf,trust_remote_code=True", "--tasks", tasks, *options]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": f"{folder}/home"}
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env={**own, **offline}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
