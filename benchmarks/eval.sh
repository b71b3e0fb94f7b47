#!/usr/bin/env bash
# The quickstart's model evaluated: its heads on held-out code, the packaged functions, and 50 MBPP tasks where they are.
set -euo pipefail
cd "$(dirname "$0")/.."
model=runs/quickstart/rho1/export
mbpp=${WMTP_DATA:-../shared/data}/mbpp
started=$SECONDS

if [ ! -d $model ]; then
  echo "== the quickstart's model is not there yet: make quickstart"
  bash benchmarks/quickstart.sh
fi

echo "== 1/3  the heads, one by one, beside the teacher-forced baseline; decoding speed"
tune run --nproc_per_node 2 recipes/eval_heads.py --config configs/smollm2_135m/eval_heads.yaml \
  checkpoint=$model output_dir=runs/quickstart/eval_heads overwrite=true tracking.run_name=quickstart-heads

echo "== 2/3  36 packaged functions, greedy"
tune run --nproc_per_node 2 recipes/eval_mbpp.py --config configs/smollm2_135m/eval_packaged.yaml \
  checkpoint=$model output_dir=runs/quickstart/eval_packaged overwrite=true tracking.run_name=quickstart-packaged

if [ -d "$mbpp" ]; then
  echo "== 3/3  50 MBPP test tasks, 3-shot, greedy"
  # The published prompt shows tasks 2, 3, 4; a folder without them shows three of the training split instead.
  examples=()
  [ -e "$mbpp/prompt.json" ] || examples=(protocol.examples_split=train "protocol.example_ids=[601,602,603]")
  tune run --nproc_per_node 2 recipes/eval_mbpp.py --config configs/smollm2_135m/eval_mbpp.yaml \
    checkpoint=$model tasks.source="$mbpp" tasks.limit=50 "${examples[@]}" \
    output_dir=runs/quickstart/eval_mbpp overwrite=true tracking.run_name=quickstart-mbpp50
else
  echo "== 3/3  left out: there is no folder $mbpp with MBPP (set WMTP_DATA to the folder that holds mbpp/)"
fi

cat <<EOF

Done in $((SECONDS - started)) s. What to do next:
  read the reports    runs/quickstart/eval_packaged/report.md (every sample with its verdict: samples.jsonl)
  judge other samples .venv/bin/tune run --nproc_per_node 2 recipes/eval_mbpp.py \\
                        --config configs/smollm2_135m/eval_packaged.yaml samples=FILE output_dir=runs/judged
  sample more         num_samples=20 temperatures=[0.2,0.8] fixed_temperature=0.2 pass_at=[1,10]
EOF
