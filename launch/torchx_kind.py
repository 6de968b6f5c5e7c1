"""What the schedulers that TorchX knows have in common: AppDef, dry run, submission, status, logs, cancellation.

A kind in launch/schedulers/ derives from `TorchxKind`, names its TorchX scheduler and corrects there what TorchX 0.7.0
gets wrong. pyproject.toml gives the corrected ones to `torchx run` as well.
"""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from kernels import registry
from kernels.errors import UserError
from launch import app
from launch import job as jobs
from launch.job import Job
from launch.schedulers.base import Forgotten, State

SESSION = "tablemesh"


class TorchxKind:
    """A derived class has its names, and `backend`, which makes the TorchX scheduler."""

    name: ClassVar[str]
    torchx_name: ClassVar[str]  # what TorchX calls it
    shares_files: bool = True
    needs_image = False
    port: ClassVar[int | str] = jobs.PORT

    def __init__(self) -> None:
        self._made: Any = None

    def backend(self) -> Any:
        """A torchx.schedulers.api.Scheduler."""
        raise NotImplementedError

    def options(self, job: Job) -> dict[str, Any]:
        """Run options of the TorchX scheduler for this job. UserError for one that it does not have."""
        known = dict(self._backend().run_opts())
        for name in job.place.options:
            if name not in known:
                raise UserError(
                    f"--option {name}: {self.name} has no such option; {registry.nearest(name, sorted(known))}"
                )
        missing = [name for name, option in known.items() if option.is_required and name not in job.place.options]
        if missing:
            raise UserError(f"{self.name} needs --option {missing[0]}=...: {known[missing[0]].help}")
        return {name: _typed(self.name, name, text, known[name].opt_type) for name, text in job.place.options.items()}

    def check(self, job: Job) -> None:
        """UserError when the job asks for what this kind cannot give. Looks at nothing outside this process."""
        if self.needs_image and not job.place.image:
            raise UserError(
                f"--on {self.name} runs a container: name its image with --image; "
                "`docker build -f docker/Dockerfile --target cpu -t tablemesh:cpu .` makes one"
            )

    def request(self, job: Job) -> str:
        self.check(job)
        return str(self._dry_run(job)).rstrip("\n") + "\n"

    def reach(self, job: Job) -> None:
        """Nothing is asked by default; `submit` tells."""

    def submit(self, job: Job) -> str:
        self.check(job)
        made = self._dry_run(job)
        return self._backend().schedule(made)

    def status(self, id: str) -> State:
        from torchx.specs import AppState

        found = self._backend().describe(id)
        names = {
            AppState.SUCCEEDED: State.SUCCEEDED,
            AppState.FAILED: State.FAILED,
            AppState.CANCELLED: State.CANCELLED,
            AppState.RUNNING: State.RUNNING,
        }
        if found is None:
            raise Forgotten(f"{self.name} knows no job {id}")
        return names.get(found.state, State.WAITING)

    def detail(self, id: str) -> str:
        """The scheduler's own words on the job's state."""
        found = self._backend().describe(id)
        return (found.msg if found else "").strip()

    def logs(self, id: str, run_dir: Path | None) -> Iterator[str]:
        found = self._backend().describe(id)
        replicas = next((role.num_replicas for role in found.roles), 1) if found else 1
        for node in range(replicas):
            for line in self._backend().log_iter(id, app.ROLE, node):
                yield f"node {node}: {line.rstrip()}" if replicas > 1 else line.rstrip()

    def cancel(self, id: str) -> None:
        self._backend().cancel(id)

    def _backend(self) -> Any:
        if self._made is None:
            self._made = self.backend()
        return self._made

    def _dry_run(self, job: Job) -> Any:
        from torchx.runner import Runner

        logging.getLogger("torchx").setLevel(logging.ERROR)
        runner = Runner(SESSION, {self.torchx_name: lambda session, **_: self._backend()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return runner.dryrun(app.make(job, port=self.port), self.torchx_name, self.options(job))


def _typed(kind: str, name: str, text: str, wanted: Any) -> Any:
    """An option's value as TorchX wants it; its own parser takes a comma for the next option."""
    try:
        if wanted is bool:
            return {"true": True, "false": False}[text.lower()]
        if wanted is int:
            return int(text)
        if wanted is str:
            return text
        if getattr(wanted, "__origin__", None) is list:
            return text.split(",")
        return dict(pair.split(":", 1) for pair in text.split(","))
    except (KeyError, ValueError):
        what = {bool: "true or false", int: "a whole number"}.get(wanted, "KEY:VALUE,...")
        raise UserError(f"--option {name}={text!r}: {kind} wants {what}") from None
