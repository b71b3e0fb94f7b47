"""System metrics during a run, under the names that MLflow's own pages show."""

import threading
from collections.abc import Callable
from contextlib import suppress


class SystemMetrics:
    """A thread that measures CPU, memory, disk, network and GPUs with MLflow's own probes.

    MLflow's own monitor around these probes ends at the first server that does not answer; here `log` gets the metrics,
    named ``system/...``, and they go through the spool.
    """

    def __init__(self, seconds: float, log: Callable[[dict[str, float]], None]) -> None:
        self._seconds, self._log = seconds, log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread. Nothing is logged after this returns."""
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        if self._stop.wait(self._seconds):  # a run that ends before the first measurement needs no probes
            return
        probes = _probes()
        while True:
            figures: dict[str, float] = {}
            for probe in probes:
                probe.collect_metrics()
                figures |= probe.aggregate_metrics()
                probe.clear_metrics()
            if not self._stop.is_set():
                with suppress(OSError):  # a full disk: the run's own metrics report it
                    self._log({f"system/{name}": value for name, value in figures.items()})
            if self._stop.wait(self._seconds):
                return


def _probes() -> list:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    probes = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(RuntimeError):  # this machine has no NVIDIA GPU, or no driver for it
        probes.append(GPUMonitor())
    return probes
