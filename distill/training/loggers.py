"""Dashboards: Weights & Biases and TensorBoard, one logger each, opened by `log.to`."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from distill.errors import BadInput
from distill.files import markdown_table, write_text
from distill.training.callbacks import console
from distill.training.records import AlarmFile, MetricsFile, read_metrics


class WandbLogger:
    """A Weights & Biases run; offline without an API key, and it never prompts.

    `log` is the config's section. `log.wandb`: auto (WANDB_MODE if set, else online when there is a key), online, offline.
    The run id is kept in `folder/wandb_id`, and every process announces that it may resume that run, so that `wandb sync`
    joins the offline parts of a restarted run. wandb writes offline rows in blocks of 32 KiB and a killed process loses the
    last one, so a run that continues from step `until` logs again what `metrics.csv` has of the killed part; the step up to
    which everything was written is kept in `folder/wandb_step`.

    Raises:
        BadInput: online without a key, or wandb refuses to start.
    """

    def __init__(
        self, folder: Path, log: Any, name: str, config: dict[str, Any], files: list[Path] = (), until: int = -1
    ):
        import wandb

        mode, self.whole, self.last = log.wandb, folder / "wandb_step", until
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")
        if mode == "online" and not has_api_key():
            raise BadInput("log.wandb=online needs a key: set WANDB_API_KEY, or run `wandb login`, or use offline.")
        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        self.wandb = wandb
        try:
            self.run = wandb.init(
                project=log.project,
                entity=log.entity,
                group=log.group,
                tags=list(log.tags) or None,
                name=name,
                config=config,
                dir=str(folder),
                mode=mode,
                id=identity.read_text(),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
            self._upload(files)
        except Exception as error:  # no network, a refused key, a bad project: each its own class
            text = " ".join(str(error).split())
            raise BadInput(f"wandb did not start ({text}); use log.wandb=offline and sync later.") from error
        if mode == "offline":
            self._say_where(folder / "wandb")
        self._refill(folder, until)

    def _upload(self, files: list[Path]) -> None:
        for path in files:  # copied first: wandb warns of links to files elsewhere
            copy = shutil.copy(path, self.run.dir)
            self.run.save(copy, base_path=self.run.dir, policy="now")

    @staticmethod
    def _say_where(path: Path) -> None:
        console.print(f"wandb logs offline to {path}; `wandb sync {path}/offline-run-*` uploads it.", highlight=False)

    def _refill(self, folder: Path, until: int) -> None:
        written = self.whole.read_text().strip() if self.whole.exists() else ""
        since = max(int(written) + 1 if written.isdigit() else 0, self.run.step)  # online, the server's
        rows: dict[int, dict[str, float]] = {}
        for row in read_metrics(folder) if until >= 0 else ():
            if since <= row["step"] <= until:
                rows.setdefault(int(row["step"]), {}).update(row)
        for step, row in sorted(rows.items()):
            self.run.log({name: value for name, value in row.items() if name != "step"}, step=step)

    def write(self, row: dict[str, Any], step: int) -> None:
        self.last = max(self.last, step)
        self.run.log(row, step=step)

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        self.run.log({name: self.wandb.Image(str(path), caption=caption)}, step=step)

    def alarm(self, alarm: Any) -> None:
        self.run.log({f"alarms/{alarm.kind}": 1}, step=alarm.step)
        self.run.alert(title=alarm.kind, text=alarm.message, level=self.wandb.AlertLevel.WARN, wait_duration=0)

    def chart(self, name: str, steps: list[int], series: dict[str, list[float]]) -> None:
        """Chart of several curves over the same steps: the student's and the teacher baseline."""
        table = self.wandb.plot.line_series(steps, list(series.values()), keys=list(series), title=name, xname="step")
        self.run.log({f"charts/{name}": table}, step=steps[-1])

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self.run.log({name: self.wandb.Table(columns=columns, data=rows)})

    def artifact(self, kind: str, path: Path, **facts: Any) -> None:
        """Upload a file or folder as an artifact of type `kind` ("checkpoint" or "export")."""
        artifact = self.wandb.Artifact(f"{self.run.name}-{kind}".replace("/", "-"), type=kind, metadata=facts)
        artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def close(self) -> None:
        self.run.finish()
        if self.last >= 0:
            write_text(self.whole, str(self.last))


def has_api_key() -> bool:
    """Whether wandb has an API key, in the environment or the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class TensorBoardLogger:
    """TensorBoard event files in `folder/tensorboard`; the page is `tensorboard --logdir` of it.

    Every metric has a chart with the teacher baseline on the Custom Scalars page. `until`: TensorBoard hides events of
    later steps, which a killed process left.

    Raises:
        BadInput: the package is not installed.
    """

    def __init__(self, folder: Path, config: dict[str, Any], until: int = -1):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BadInput(
                "log.to: tensorboard needs its package: pip install 'distill-diffusion[tensorboard]'."
            ) from None
        self.out = SummaryWriter(str(folder / "tensorboard"), purge_step=until + 1 if until >= 0 else None)
        self.charts: dict[str, list[str]] = {}
        if until < 0:
            self.out.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", 0)

    def write(self, row: dict[str, Any], step: int) -> None:
        for name, value in row.items():
            self.out.add_scalar(name, value, step)

    def picture(self, name: str, path: Path, step: int, caption: str) -> None:
        import numpy
        from PIL import Image

        self.out.add_image(name, numpy.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.out.flush()

    def alarm(self, alarm: Any) -> None:
        self.out.add_scalar(f"alarms/{alarm.kind}", 1, alarm.step)
        self.out.add_text("alarms", alarm.message, alarm.step)

    def chart(self, name: str, steps: list[int], series: dict[str, list[float]]) -> None:
        tags = [f"validation/{name}", *(f"validation/{label}/{name}" for label in series if label != "student")]
        if self.charts.get(name) != tags:
            self.charts[name] = tags
            layout = {n: ["Multiline", [f"^{t}$" for t in found]] for n, found in self.charts.items()}
            self.out.add_custom_scalars({"student and teacher": layout})

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in row] for row in rows]
        self.out.add_text(name, markdown_table(columns, cells))

    def close(self) -> None:
        self.out.close()


def open_loggers(
    opened: list[Any], folder: Path, log: Any, name: str, config: dict[str, Any], until: int, files: list[Path] = ()
) -> None:
    """Append the loggers of the config's `log` section to `opened`, so that the caller can close them after an error.

    `until`: the step from which the run continues; `files`: further files to upload, such as the uncommitted changes.
    """
    opened += [MetricsFile(folder / "metrics.csv", until), AlarmFile(folder / "alarms.jsonl", until)]
    if "tensorboard" in log.to:
        opened.append(TensorBoardLogger(folder, config, until))
    if "wandb" in log.to and log.wandb != "disabled":
        opened.append(WandbLogger(folder, log, name, config, files, until))


def log_export(folder: Path, log: Any, name: str, path: Path) -> bool:
    """Upload an export as an artifact of the run in `folder` if `log.artifacts` is set; returns whether it did."""
    if not log.artifacts or "wandb" not in log.to or log.wandb == "disabled":
        return False
    logger = WandbLogger(folder, log, name, {})
    try:
        logger.artifact("export", path)
    finally:
        logger.close()
    return True
