"""The report of a study: claim lines, tables and figures on one HTML page that needs no network, and in Markdown.

    python recipes/report.py --config configs/eval/report.yaml study=runs/tiny/sweep
    python recipes/report.py --config configs/eval/report.yaml study=<a study's name, or its run id in MLflow>
    python recipes/report.py --config configs/eval/report.yaml runs=[runs/tiny/uniform,runs/tiny/rho1]

Everything is read from the runs' folders or from MLflow; nothing is trained or evaluated. The page becomes an artifact
of the sweep's MLflow run, and is the same again from the same runs, byte for byte but for its date.
"""

import sys
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
from omegaconf import DictConfig

from wmtp import config
from wmtp.config import ConfigError, ConfigReader
from wmtp.errors import UserError, clear_errors
from wmtp.files import require_folder, write_whole
from wmtp.report.studies import load_study
from wmtp.report.study_report import study_report
from wmtp.tracking.store import clear_store_errors, existing_client, store_uri, use_store


class ReportRecipe:
    """Order of events: read the config, `load` the study, `write` the pages, `log` them."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads and checks every key."""
        read = ConfigReader(cfg)
        study, runs = read.text("study", None), read.get("runs", None)
        self._title = read.text("title", None)
        self._baseline = read.text("baseline", None)
        self._objective = read.text("objective", None)
        self._other_data = read.plain("other_data", None)
        self._factors = read.plain("factors", None)
        self._allow_mixed = read.flag("allow_mixed", False)
        self._log_artifact = read.flag("log_artifact", True)
        self._output_dir = Path(read.text("output_dir", "runs/report"))
        require_folder(self._output_dir, "output_dir")
        use_store(read.text("tracking_uri", None))
        read.done()
        if (study is None) == (not runs):
            raise ConfigError("give study=<folder, name or MLflow id of a sweep>, or runs=[<folder or MLflow id>, ...]")
        self._names = [study] if study else [str(run) for run in ([runs] if isinstance(runs, str) else runs)]

    def load(self) -> None:
        """Reads all runs; refuses those that cannot be compared."""
        named = {"baseline": self._baseline, "objective": self._objective, "other_data": self._other_data}
        named["factors"] = self._factors
        self._study = load_study(self._names, **named, allow_mixed=self._allow_mixed)

    def write(self) -> None:
        """Writes report.html and report.md, each when it is whole."""
        page, text = study_report(self._study, title=self._title)
        self._files = {"report.html": page, "report.md": text}
        for name, content in self._files.items():
            write_whole(self._output_dir / name, content)
            print(f"wrote {self._output_dir / name}", file=sys.stderr)

    def log(self) -> None:
        """Copies the pages to the sweep's MLflow run, where it has one."""
        if not self._log_artifact or self._study.parent_id is None:
            return
        with clear_store_errors("the report is written, but MLflow did not take it", UserError):
            client = existing_client(store_uri(), UserError)
            for name in self._files:
                client.log_artifact(self._study.parent_id, str(self._output_dir / name), "report")
        print(f"logged as report/ of MLflow run {self._study.parent_id}", file=sys.stderr)


@clear_errors()
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = ReportRecipe(cfg)
    recipe.load()
    recipe.write()
    recipe.log()


if __name__ == "__main__":
    main()
