"""MLflow: runs, metrics, artifacts. Records are written to a spool first; a thread sends them.

    MLflowLogger    torchtune's metric logger interface; the `tracking` section of a config names it
    spool           the records on disk until they are sent: <output_dir>/tracking_spool
    sender          the thread that sends them, in order, until the store has them; delivery sends one kind of record
    replay          sends the records that a run left unsent, without the run
    store           the MLflow store: which one, and which names it accepts
    environment     code versions, packages, hardware and the researcher's own modules of a run
    system          CPU, memory, disk, network and GPU figures

mlflow itself is imported by the thread: the import takes seconds, and only rank 0 of a tracked run needs it.
"""

from wmtp import on_demand

FOLDER = "tracking_spool"  # in output_dir: the records that MLflow is sent beside the metrics
METRICS = "metrics.jsonl"

__getattr__ = on_demand(
    __name__,
    environment="code_changes environment_tags mlflow_fields",
    logger="MLflowLogger",
    store="check_store mlflow_client store_uri use_store",
)
