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
    write_models(tmp_path, PLAN_OF_KINDS, max_position_embeddings=1024)
    assert cli.main(["export", "--model", f"{tmp_path}/hybrid", "--out", f"{tmp_path}/hf"]) == 0
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
    command = [LM_EVAL, "--model", "hf", "--device", "cpu", "--output_path", "out"]
    command += ["--model_args", "pretrained=hf,trust_remote_code=True"]
    command += ["--tasks", "hydra_needles", "--include_path", EXAMPLE]
    command += ["--gen_kwargs", f"max_gen_toks={NEW_TOKENS}"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": f"{tmp_path}/home"}
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**own, **offline}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["hydra_needles"]["found,none"]
    assert found == 0.25  # half of the answers of half of the samples
