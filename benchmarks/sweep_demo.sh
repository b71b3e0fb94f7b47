# A small sweep of the tiny model with a kill -9 in the middle, then its table and report: `make sweep-demo`.
set -euo pipefail
out=${1:-runs/sweep_demo}
rm -rf "$out"
sweep() { exec python recipes/sweep_wmtp.py --config configs/tiny/sweep.yaml output_dir="$out" evaluations={} tracking=null; }

echo "== A sweep of 6 cells with 2 seeds, 2 at once; it is killed when about a third of the trainings are done"
sweep &
worker=$!
done_so_far() { cat "$out/table.json" 2>/dev/null | grep -c '"state": "done"'; }  # rows, and cells that are whole
until [ "$(done_so_far)" -ge 6 ]; do
  kill -0 $worker
  sleep 1
done
kill -9 $worker
wait $worker 2>/dev/null || true

echo "== The same command goes on: what is done stays done, what was running continues from its checkpoint"
(sweep)
cat "$out/table.md"
python recipes/report.py --config configs/eval/report.yaml study="$out" output_dir="$out/report"
