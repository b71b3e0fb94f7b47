"""Delivery of the records that a run left unsent, without the run."""

from pathlib import Path

from wmtp.errors import UserError, mask_secrets
from wmtp.tracking.delivery import Delivery
from wmtp.tracking.sender import Sender
from wmtp.tracking.spool import Spool, read_run
from wmtp.tracking.store import check_store, store_uri

_SECONDS_TO_ANSWER, _SECONDS_TO_ACCEPT = 120.0, 30.0  # the next record


def replay(output_dir: Path, uri: str | None = None) -> str:
    """Sends the records that a run left unsent. Returns one line that says what was done.

    A run whose process was killed is ended as KILLED. To replay twice changes nothing.

    Args:
        uri: the store; by default the one in the run's config, or else in the environment.
    """
    if not read_run(output_dir):
        raise UserError(f"{output_dir} holds no tracking_spool of a run; give the output_dir of a tracked run")
    spool = Spool(output_dir)
    try:
        run, waiting = spool.run, [record for record, _ in spool.unsent()]
        uri = uri or (run["tracking_uri"] if run["uri_in_config"] else store_uri())
        if not waiting and run.get("run_id"):
            return f"nothing to send: run {run['run_id']} has everything"
        ended = next((kind for kind in reversed(spool.kinds()) if kind in ("status", "resumed")), None) == "status"
        if waiting and not ended:
            spool.append({"kind": "status", "status": "KILLED", "time": max(record["time"] for record in waiting)})
        check_store(uri)
        delivery = Delivery(uri, run, output_dir)
        sender = Sender(delivery, lambda line: None, _SECONDS_TO_ANSWER)
        sender.start(spool)
        left = sender.close(0 if sender.failure else _SECONDS_TO_ACCEPT)
    finally:
        spool.close()
    if left:
        raise UserError(
            f"{left} of {len(waiting)} records of {output_dir} are still unsent: {sender.failure or 'no answer'}; try "
            "again when the store answers"
        )
    return f"sent {len(waiting)} records of {output_dir} to run {delivery.run_id} in {mask_secrets(uri)}"
