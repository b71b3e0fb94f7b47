#!/usr/bin/env bash
# What only a GPU can show, in one call of under 8 minutes: the tests that need one, the recipes' own tests on CUDA, then
# loss and training step beside their alternatives, and the planner beside runs.
#
#   bash benchmarks/gpu.sh [FOLDER]        default: runs/gpu; figures.jsonl, table.md, and a log of each part go there
#
# On a card of 75 GB and more also decoding at 7B, on one of 130 GB a step of full fine-tuning at 7B. It ends with
# status 1 where a part failed, and names it. Liger's and Apple's losses take part where they are installed: pip install
# liger-kernel cut-cross-entropy.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
mkdir -p "$out"
: > "$out/figures.jsonl"
failed=()

part() { # NAME COMMAND...: its figures are added to those of all
  local name=$1 started=$SECONDS
  shift
  "$@" > "$out/$name.log" 2>&1 || failed+=("$name")
  grep '^{' "$out/$name.log" >> "$out/figures.jsonl"
  echo "$name: $((SECONDS - started)) s; $(tail -n 1 "$out/$name.log" | cut -c 1-160)"
}

python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' || exit 1
part tests pytest -q tests/test_cuda.py tests/test_cross_entropy.py tests/test_loss.py \
  tests/weighting/test_weight_controls.py tests/generation/test_generate.py
part recipes env WMTP_TEST_DEVICE=cuda pytest -q -m "not slow" -n 8 tests/recipes/test_full_finetune.py \
  tests/recipes/test_lora_wmtp.py tests/recipes/test_weighted_runs.py tests/recipes/test_score_reference.py \
  tests/recipes/test_critic_stage1.py tests/recipes/test_profiler.py
for size in "32000 4096" "49152 576" "128256 4096" "262144 2304"; do
  read -r vocab dim <<< "$size"
  part "loss_$vocab" python benchmarks/fused_loss.py --device cuda --dtype bfloat16 --tokens 8192 \
    --vocab "$vocab" --dim "$dim" --repeats 10
done
step=(python benchmarks/step.py --device cuda --dtype bfloat16)
part step "${step[@]}" --rows 16 --seq 2048 --heads 1,2,4,8
part step_fp32 python benchmarks/step.py --device cuda --rows 16 --seq 1024 --heads 1,4 --only wmtp
part step_compiled "${step[@]}" --rows 16 --seq 2048 --heads 1 --only wmtp --compile
for attention in sdpa flex; do
  part "step_packed_$attention" "${step[@]}" --rows 16 --seq 2048 --heads 1 --only wmtp --documents 8 --attention $attention
done
part planner python benchmarks/planning.py --cases full,large
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
if [ "$memory" -ge 75000 ]; then
  part decode_7b python benchmarks/decoding.py
fi
if [ "$memory" -ge 130000 ]; then
  seven=("${step[@]}" --model meta_mtp_7b --rows 4 --seq 2048 --heads 4 --only wmtp --recompute --rounds 3)
  part step_7b "${seven[@]}"
  part step_7b_compiled "${seven[@]}" --attention flex --documents 8 --compile
fi
python benchmarks/figures.py "$out/figures.jsonl" > "$out/table.md"
echo "in $SECONDS s: $out/table.md"
if [ ${#failed[@]} -gt 0 ]; then
  echo "error: failed: ${failed[*]}; see $out/NAME.log" >&2
  exit 1
fi
