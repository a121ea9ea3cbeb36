"""Where the metrics of a run go: metrics.jsonl, TensorBoard, W&B, CSV files, and a loss curve."""

from jspeed.monitor.events import event_name
from jspeed.monitor.metrics_log import MetricsLog, read_metrics
from jspeed.monitor.monitor import Monitor, ResumePoint, make_monitor
from jspeed.monitor.plot import plot_loss
from jspeed.monitor.writers import CsvWriter, TensorBoardWriter, WandbWriter, Writer

__all__ = [
    "CsvWriter",
    "MetricsLog",
    "Monitor",
    "ResumePoint",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
    "event_name",
    "make_monitor",
    "plot_loss",
    "read_metrics",
]
