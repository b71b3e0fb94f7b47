"""Delivery of the records that a run left unsent, without the run."""

from pathlib import Path

from wmtp.errors import UserError, mask_secrets, one_line
from wmtp.tracking.delivery import Delivery, Postponed, Refused, deliver
from wmtp.tracking.spool import Spool, read_run
from wmtp.tracking.store import check_store, store_uri


def replay(output_dir: Path, uri: str | None = None) -> str:
    """Sends the records that a run left unsent. Returns one line that says what was done.

    A run whose process was killed is ended as KILLED. To replay twice changes nothing.

    Args:
        uri: the store; by default the one in the run's config, or else in the environment.

    Raises:
        ValueError: no spool in the folder, a run that is under way, or a store that refuses or does not answer.
    """
    if not read_run(output_dir):
        raise UserError(f"{output_dir} holds no tracking_spool of a run; give the output_dir of a tracked run")
    spool = Spool(output_dir)
    try:
        run, count = spool.run, spool.count_unsent()
        uri = uri or (run["tracking_uri"] if run["uri_in_config"] else store_uri())
        if count == 0 and run.get("run_id"):
            return f"nothing to send: run {run['run_id']} has everything"
        records = spool.unsent(limit=10**9)
        if records and records[-1][0]["kind"] != "status":
            spool.append({"kind": "status", "status": "KILLED", "time": max(record["time"] for record, _ in records)})
        check_store(uri)
        delivery = Delivery(uri, run, output_dir)
        try:
            spool.set_run(run_id=delivery.open_run())
            _deliver_all(spool, delivery)
        except Refused:
            raise
        except Exception as error:
            raise UserError(
                f"{spool.count_unsent()} of {count} records of {output_dir} are still unsent: {one_line(error):.300}; "
                "try again when the store answers"
            ) from error
        return f"sent {count} records of {output_dir} to run {delivery.run_id} in {mask_secrets(uri)}"
    finally:
        spool.close()


def _deliver_all(spool: Spool, delivery: Delivery) -> None:
    """Sends records until none is left, or only artifacts that have each failed once."""
    postponed = 0
    while True:
        try:
            if not deliver(spool, delivery):
                return
            postponed = 0
        except Postponed:
            postponed += 1
            if postponed >= spool.count_unsent():
                raise
