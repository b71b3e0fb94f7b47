"""MLflow: runs, metrics, artifacts. What happens is written to a spool first and sent by a thread.

    MLflowLogger    torchtune's metric logger interface; the `tracking` section of a config names it
    spool           what is to be sent, on disk until it was: <output_dir>/tracking_spool
    sender          the thread that sends it, in order, until the store has it; delivery puts one record there
    replay          the same without the run, for what was left behind
    store           which store, and what it accepts
    environment     what a result depends on beside its config, as tags, and the researcher's own modules among it
    system          CPU, memory, disk, network and GPU figures

`python -m wmtp.tracking replay OUTPUT_DIR` sends what a run left behind. mlflow itself is imported by the thread: the
import takes seconds, and only rank 0 of a tracked run needs it.
"""

from wmtp import on_demand

FOLDER = "tracking_spool"  # in output_dir: what MLflow is sent beside the metrics
METRICS = "metrics.jsonl"

__getattr__ = on_demand(
    __name__,
    environment="code_changes environment_tags mlflow_fields",
    logger="MLflowLogger",
    store="check_store mlflow_client store_uri use_store",
)
