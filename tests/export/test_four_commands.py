"""What a user does with a hybrid of the quickstart's teacher: exports it, and what comes then.

`make test` runs it with the transformers of training and with the newest.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from megatron_hydra.cpu import install_if_needed

install_if_needed()

from hydra_tools import cli  # noqa: E402
from kit.offline import IS_NEWEST, LM_EVAL, ask_by_lm_eval, run_offline  # noqa: E402

from megatron_hydra.head_plan import HeadPlan  # noqa: E402

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "examples/quickstart/teacher"
TEACHERS_OWN = ["fa_rope=true", "fa_query_scale=none", "fa_output_gate=false", "fusion=none"]
"""So that nearly all heads as they were find needles untrained."""

TEMPLATE = """\
{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint `hybrid`, exported `hf`, whose tokenizer knows how a chat is written."""
    folder = tmp_path_factory.mktemp("hands")
    teacher = shutil.copytree(TEACHER, folder / "teacher")
    (teacher / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    config = json.loads((teacher / "config.json").read_text("utf-8"))
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    fa_heads = {layer: list(range(heads)) for layer in range(layers)}
    fa_heads[layers - 1] = fa_heads[layers - 1][1:]
    plan = HeadPlan.from_fa_heads(fa_heads, layers, heads, config["num_key_value_heads"])
    plan.save(folder / "plan.json")
    convert = ["convert", "--teacher", str(teacher), "--plan", f"{folder}/plan.json"]
    convert += ["--out", f"{folder}/hybrid", *(f"model.{option}" for option in TEACHERS_OWN)]
    assert cli.main(convert) == 0
    assert cli.main(["export", "--model", f"{folder}/hybrid", "--out", f"{folder}/hf"]) == 0
    return folder


def test_a_pipeline_goes_on_with_a_text(folder: Path) -> None:
    program = (
        "from transformers import pipeline; "
        "print(pipeline('text-generation', 'hf', trust_remote_code=True)("
        "'Once', max_new_tokens=8, do_sample=False))"
    )
    said = run_offline(folder, sys.executable, "-I", "-c", program)
    assert "[{'generated_text': 'Once" in said


CHAT = """
import json
from transformers import pipeline
pipe = pipeline("text-generation", "hf", trust_remote_code=True)
chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Once upon"}]
options = dict(max_new_tokens=12, do_sample=False)
said = pipe(chat, **options)[0]["generated_text"]
inputs = pipe.tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
by_hand = pipe.tokenizer("<system>Be brief.<user>Once upon<assistant>", return_tensors="pt")
for each in (inputs, by_hand):
    new = pipe.model.generate(**each, **options)[0, each["input_ids"].shape[1]:]
    said.append(pipe.tokenizer.decode(new, skip_special_tokens=True))
print(json.dumps(said))
"""


def test_a_pipeline_answers_in_a_chat(folder: Path) -> None:
    """With what the model says to the chat as the template writes it."""
    said = json.loads(run_offline(folder, sys.executable, "-I", "-c", CHAT).splitlines()[-1])
    roles = [message["role"] for message in said[:3]]
    assert roles == ["system", "user", "assistant"]
    answer = said[2]["content"]
    assert len(answer) > 5 and said[3:] == [answer, answer]


def test_the_way_back_is_bit_equal(folder: Path) -> None:
    assert cli.main(["convert", "--hybrid", f"{folder}/hf", "--out", f"{folder}/back"]) == 0
    assert cli.main(["export", "--model", f"{folder}/back", "--out", f"{folder}/again"]) == 0
    first, second = (load_file(folder / name / "model.safetensors") for name in ("hf", "again"))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.exhaustive  # a launch of the harness takes a minute
def test_the_harness_asks_what_evaluate_asks(folder: Path) -> None:
    """And counts as many answers."""
    if not LM_EVAL.is_file():
        pytest.skip("no environment of lm-eval: make test-slow makes it")
    ask = ["evaluate", "--hf", f"h={folder}/hf", "--tasks", "niah_single_2", "--lengths", "256"]
    ask += ["--num-samples", "4", "--wording", "short", "--dump", f"{folder}/prompts.jsonl"]
    assert cli.main([*ask, "--out", f"{folder}/found.json"]) == 0
    (model,) = json.loads((folder / "found.json").read_text("utf-8"))["models"]
    # The harness has an environment of its own, with the transformers of training.
    packages = str(Path(transformers.__file__).parents[1])
    newest = {"PYTHONPATH": packages} if IS_NEWEST else {}
    options = ["--include_path", ROOT / "examples/lm_eval"]
    ask_by_lm_eval(folder, "hydra_needles", *options, **newest)
    (results,) = (folder / "out").rglob("results_*.json")
    said = json.loads(results.read_text("utf-8"))
    assert said["transformers_version"] == transformers.__version__
    (found,) = (task["accuracy"] for task in model["tasks"])
    assert said["results"]["hydra_needles"]["found,none"] == found > 0.5
