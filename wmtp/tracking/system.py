"""System metrics during a run, under the names that MLflow's own pages show."""

import threading
from collections.abc import Callable
from contextlib import suppress


class SystemMetrics(threading.Thread):
    """A thread that measures CPU, memory, disk, network and GPUs with MLflow's own probes.

    MLflow's own monitor around these probes ends at the first server that does not answer; here `log` gets the metrics,
    named ``system/...``, and they go through the spool.
    """

    def __init__(self, seconds: float, log: Callable[[dict[str, float]], None]) -> None:
        super().__init__(name="system metrics", daemon=True)
        self._seconds, self._log, self._ended = seconds, log, threading.Event()
        self.start()

    def stop(self) -> None:
        """Ends the thread. Nothing is logged after this returns."""
        self._ended.set()
        self.join()

    def run(self) -> None:
        probes: list = []  # made after a while: a run that ends before the first measurement needs none
        while not self._ended.wait(self._seconds):
            probes = probes or _probes()
            figures: dict[str, float] = {}
            for probe in probes:
                probe.collect_metrics()
                figures |= {f"system/{name}": value for name, value in probe.aggregate_metrics().items()}
                probe.clear_metrics()
            if not self._ended.is_set():
                with suppress(OSError):  # a full disk: the run's own metrics report it
                    self._log(figures)


def _probes() -> list:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    probes = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(RuntimeError):  # this machine has no NVIDIA GPU, or no driver for it
        probes.append(GPUMonitor())
    return probes
