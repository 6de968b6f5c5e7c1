"""TorchX's `local_cwd` for `tablemesh train` and `torchx run`.

What is different from TorchX 0.7.0's: a job ends with the process that started it, after a SIGKILL too, and its logs
have a file SUCCESS only when it succeeded. Not in launch/schedulers/local.py, as importing TorchX's takes a second that
`tablemesh status` need not wait for.
"""

from pathlib import Path
from typing import Any

from torchx.schedulers.api import DescribeAppResponse
from torchx.schedulers.local_scheduler import CWDImageProvider, LocalScheduler

from launch import job as jobs


class Local(LocalScheduler):
    def _popen(self, role_name: str, replica_id: int, replica_params: Any) -> Any:
        replica_params.env[jobs.TIED] = "1"
        return super()._popen(role_name, replica_id, replica_params)

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        found = super().describe(app_id)
        self._correct(app_id)
        return found

    def _cancel_existing(self, app_id: str) -> None:
        super()._cancel_existing(app_id)
        self._correct(app_id)

    def _correct(self, app_id: str) -> None:
        """Take SUCCESS away where a process ended with anything but 0."""
        app = self._apps.get(app_id)
        replicas = [replica for role in app.role_replicas.values() for replica in role] if app else []
        if app and any(replica.proc.returncode for replica in replicas):
            Path(app.log_dir, "SUCCESS").unlink(missing_ok=True)


def create_scheduler(session_name: str, **kwargs: Any) -> Local:
    return Local(session_name, CWDImageProvider)
