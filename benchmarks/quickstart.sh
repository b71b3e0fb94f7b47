#!/usr/bin/env bash
# The main job on real input: SmolLM2-135M gets three more heads and learns real Python functions with Rho-1 weights.
# The reference is the same model after a short next-token fine-tune on functions of other modules.
set -euo pipefail
cd "$(dirname "$0")/.."
recipe=recipes/full_finetune_distributed_wmtp.py
started=$SECONDS

echo "== 1/2  the reference: SmolLM2-135M, next-token, on the reference split"
tune run --nproc_per_node 2 $recipe --config configs/smollm2_135m/reference.yaml \
  output_dir=runs/quickstart/reference overwrite=true tracking.run_name=quickstart-reference

echo "== 2/2  the policy: SmolLM2-135M with 4 heads, Rho-1 weights, on the training split"
tune run --nproc_per_node 2 $recipe --config configs/smollm2_135m/rho1.yaml \
  output_dir=runs/quickstart/rho1 overwrite=true tracking.run_name=quickstart-rho1 \
  reference_checkpoint=runs/quickstart/reference/export

echo
for run in reference rho1; do python -m wmtp.report runs/quickstart/$run; done  # of other data: not to be compared
cat <<EOF

Done in $((SECONDS - started)) s. What to do next:
  see the curves      .venv/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db     then open http://127.0.0.1:5000
  use the model       .venv/bin/python recipes/generate.py --config configs/smollm2_135m/generate.yaml prompt="def add" show=heads
  in transformers     AutoModelForCausalLM.from_pretrained("runs/quickstart/rho1/export", trust_remote_code=True)
  compare with plain  .venv/bin/tune run --nproc_per_node 2 $recipe --config configs/smollm2_135m/uniform.yaml
  evaluate            set eval_dataset in the config; held-out CE of every head is logged with the run
  change the method   copy $recipe and configs/smollm2_135m/rho1.yaml, and edit
EOF
