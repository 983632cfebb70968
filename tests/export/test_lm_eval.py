"""EleutherAI's harness, by its own command line, on an exported folder and the example's task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.offline import LM_EVAL, ask_by_lm_eval  # noqa: E402
from kit.tiny_models import PLAN_OF_KINDS, write_models  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from megatron_hydra.tasks.text import stand_in_text  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples/lm_eval"
NEW_TOKENS = 8
GENERATED = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")
GENERATED += ("ruler_vt", "ruler_cwe", "ruler_fwe")
"""Its RULER tasks whose data is generated; the others download theirs."""


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
    ask_by_lm_eval(tmp_path, "hydra_needles", *options)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["hydra_needles"]["found,none"]
    assert found == 0.25  # half of the answers of half of the samples


@pytest.mark.exhaustive
def test_its_own_ruler_tasks_ask_the_exported_model(tmp_path):
    """Those whose data is generated; what is counted is what greedy decoding gives, by hand."""
    if not LM_EVAL.is_file():
        pytest.skip("no environment of lm-eval: make test-slow makes it")
    _export(tmp_path, 8192, vocab_size=4096)
    metadata = json.dumps({"max_seq_lengths": [4096]})
    options = ["--limit", "1", "--log_samples", "--metadata", metadata]
    options += ["--gen_kwargs", f"max_gen_toks={NEW_TOKENS}"]
    ask_by_lm_eval(tmp_path, ",".join(GENERATED), *options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for task in GENERATED:
        (file,) = (tmp_path / "out").rglob(f"samples_{task}_2*.jsonl")
        (sample,) = map(json.loads, file.read_text("utf-8").splitlines())
        prompt = sample["arguments"]["gen_args_0"]["arg_0"]
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert sample["resps"] == [[text]]
        assert all(answer in prompt for answer in sample["doc"]["outputs"]), task
        right = sum(a.lower() in text.lower() for a in sample["doc"]["outputs"])
        assert sample["4096"] == right / len(sample["doc"]["outputs"])


def _export(folder: Path, length: int, vocab_size: int | None = None) -> None:
    """A hybrid's `hf`; with a tokenizer of parts of words if it is to have a larger vocabulary."""
    fields = {} if vocab_size is None else {"vocab_size": vocab_size}
    write_models(folder, PLAN_OF_KINDS, max_position_embeddings=length, **fields)
    if vocab_size is not None:
        _write_tokenizer(folder / "hybrid/tokenizer", vocab_size)
    assert cli.main(["export", "--model", f"{folder}/hybrid", "--out", f"{folder}/hf"]) == 0


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """The harness's tracking and counting tasks ask for more than 4,096 bytes have room for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    numbers = " ".join(f"{number}." for number in range(1000))
    tokenizer.train_from_iterator([stand_in_text("--text"), numbers], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.save_pretrained(folder)
