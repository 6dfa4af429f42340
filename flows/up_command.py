"""The command `cdpo up` and its options; what it does is in `flows.up`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from cdpo_core.errors import InputError


@dataclass(frozen=True)
class UpOptions:
    """What `cdpo up` starts, and where.

    Attributes:
        prefect_port, mlflow_port: 0 takes a free one.
        host: the address of this machine that the servers listen on.
        postgres: address of PostgreSQL for both servers; "" is CDPO_POSTGRES_URL, else files under CDPO_HOME.
        store: where runs keep their artifacts unless they say; "" is CDPO_STORE, else under CDPO_HOME.
        workers: how many experiments run at once here.
        concurrency: how many run at once over all machines; 0 leaves the pool's limit as it is.
    """

    prefect_port: Annotated[int, Parameter(help="Port of the Prefect server.", metavar="PORT")] = 4200
    mlflow_port: Annotated[int, Parameter(help="Port of the MLflow server.", metavar="PORT")] = 5000
    host: Annotated[str, Parameter(help="Address they listen on.", metavar="ADDRESS")] = "127.0.0.1"
    postgres: Annotated[str, Parameter(help="PostgreSQL for both: postgresql://USER@HOST:PORT.", metavar="URL")] = ""
    store: Annotated[str, Parameter(help="Store of the runs: a folder, or s3://bucket/prefix.", metavar="URI")] = ""
    workers: Annotated[int, Parameter(help="Experiments at once on this machine.", metavar="N")] = 1
    concurrency: Annotated[int, Parameter(help="Experiments at once on all machines.", metavar="N")] = 0

    def check(self) -> None:
        """Check the numbers.

        Raises:
            InputError: one is negative.
        """
        for option, number in (("--workers", self.workers), ("--concurrency", self.concurrency)):
            if number < 0:
                raise InputError(f"{number} is no number of experiments", where=option, fix="give 0 or more")


def up(*, options: Annotated[UpOptions, Parameter(name="*")] = UpOptions()) -> int:
    """Start Prefect, MLflow and workers on this machine.

    The Prefect server gets the deployments; the URLs are printed when all is ready; Ctrl-C ends all of it.

    Both servers ask for CDPO_USERNAME and CDPO_PASSWORD where the environment has them.

    A password of PostgreSQL belongs into CDPO_POSTGRES_URL or PGPASSWORD.
    """
    from flows.up import serve

    return serve(options)
