#!/bin/bash
# The main job: score, plan, convert, train in three stages, evaluate, report; and the control, the
# same with as many heads chosen at random. Every line is a public command. A step whose output
# exists is skipped and a training that was cut off resumes: after a failure, run this again.
set -euo pipefail
cd "$(dirname "$0")/../.."

out=runs/quickstart
teacher=examples/quickstart/teacher
started=$SECONDS

# step WHAT OUTPUT COMMAND...: run the command unless its output is there.
step() {
    local what=$1 output=$2
    shift 2
    if [ -e "$output" ]; then
        echo "== $what: have $output"
    else
        printf '== %s (%d:%02d)\n  ' "$what" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60))
        printf ' %q' "$@" # quoted, so that the line can be pasted
        printf '\n'
        "$@"
    fi
}

ranks=(env OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m)
train() {
    step "$1" "$2/hybrid" "${ranks[@]}" hydra_tools.train "${@:3}"
}

documents=(megatron-hydra preprocess --tokenizer $teacher --retrieval-fraction 0.5)
step "data, 256 tokens per document" $out/data/train.idx \
    "${documents[@]}" --out $out/data/train --seq-length 256 --num-documents 4000
step "data, 1024 tokens per document" $out/data/long.idx \
    "${documents[@]}" --out $out/data/long --seq-length 1024 --num-documents 500 --seed 1

step "score the teacher's heads" $out/scores.json \
    "${ranks[@]}" hydra_tools.score --config examples/quickstart/score.yaml
serve=(--serve-dtype fp32) # trained in float32, and so are the figures that are shown
plan=(megatron-hydra plan --scores $out/scores.json --fa-ratio 1/4 --min-fa-per-layer 1 "${serve[@]}")
step "plan: the heads that score best" $out/plan.json "${plan[@]}" --out $out/plan.json
step "plans at other budgets" $out/pareto.json megatron-hydra pareto --scores $out/scores.json \
    --budgets 1/16,1/8,1/4,1/2,3/4 --context 1024 "${serve[@]}" --out $out/pareto.json
step "inspect the plan" $out/pictures megatron-hydra inspect $out/plan.json \
    --scores $out/scores.json --pareto $out/pareto.json --pictures $out/pictures --overwrite
step "plan: heads at random" $out/random_plan.json "${plan[@]}" --random-seed 0 --out $out/random_plan.json

convert=(megatron-hydra convert --teacher $teacher --calibration-length 256)
step "convert the teacher" $out/teacher "${convert[@]}" --out $out/teacher
step "convert to the hybrid" $out/converted "${convert[@]}" --plan $out/plan.json --out $out/converted
step "convert to the control" $out/random/converted \
    "${convert[@]}" --plan $out/random_plan.json --out $out/random/converted

previous=converted
for stage in stage1_align stage2_distill stage3_long_context; do
    config=examples/quickstart/$stage.yaml
    train "$stage" $out/$stage --config $config
    train "$stage, control" $out/random/$stage --config $config \
        transfer.init_from=$out/random/$previous log.folder=$out/random/$stage
    previous=$stage/hybrid
done

step "export the hybrid for transformers" $out/hydra-hf \
    megatron-hydra export --model $out/stage3_long_context/hybrid --out $out/hydra-hf
# All by the text that they generate: folders by transformers, checkpoints under Megatron. On one
# thread, as two lose much time to each other where the machine has other work.
step "evaluate" $out/generation.json env OMP_NUM_THREADS=1 \
    megatron-hydra evaluate --generate --wording short --tasks niah_single_2,niah_multikey_1 \
    --lengths 256,512,1024 --num-samples 60 --perplexity-tokens 16384 "${serve[@]}" \
    --hf "teacher=$teacher" \
    --hf "hybrid, trained=$out/hydra-hf" \
    --model "hybrid, untrained=$out/converted" \
    --model "random heads, trained=$out/random/stage3_long_context/hybrid" \
    --out $out/generation.json
rm -f $out/report.html
step "report" $out/report.html megatron-hydra report --out $out/report.html \
    --scores $out/scores.json --plan $out/plan.json --pareto $out/pareto.json --teacher $teacher \
    --generation $out/generation.json \
    --run stage1=$out/stage1_align --run stage2=$out/stage2_distill --run stage3=$out/stage3_long_context
printf '== done in %d:%02d: %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$PWD/$out/report.html"
