"""MLflow: runs, metrics, artifacts. Records are written to a spool first; a thread sends them.

`MLflowLogger` is named by a config's `tracking` section. It writes to the `spool` on disk; the thread of the `sender`
gives its records to a `delivery`, which knows MLflow's client. mlflow itself is imported by the thread: that takes
seconds, and only rank 0 of a tracked run needs it.
"""

from wmtp import on_demand

FOLDER = "tracking_spool"  # in output_dir: the records that MLflow is sent beside the metrics
METRICS = "metrics.jsonl"
TAGS = "tags.json"  # in output_dir: the run's tags, also where MLflow is not used

__getattr__ = on_demand(
    __name__,
    environment="code_changes environment_tags mlflow_fields",
    logger="MLflowLogger",
    store="check_store mlflow_client store_uri use_store",
)
