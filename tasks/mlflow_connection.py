"""Where MLflow is and whether it answers: checked before anything is computed."""

from __future__ import annotations

import fcntl
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cdpo_core.errors import CdpoError, InputError
from tasks.access import FIX as LOGIN_FIX
from tasks.access import mlflow_authorization
from tasks.environment import local_mlflow, quiet_environment
from tasks.moved_home import settle
from tasks.patience import ServerAway

if TYPE_CHECKING:
    from cdpo_core.config import TrackingConfig

T = TypeVar("T")

PROBE_SECONDS = 10
GLANCE_SECONDS = 3
CONTENDED = ("IntegrityError", "UniqueViolation", "database is locked")
CONTENDED_TRIES = 8
# `user:password@` behind `://`, or at the start of an address without it; a password may hold `/` and `@`.
_LOGIN = re.compile(r"((?<=://)(?!/)|^(?=[^\s/:@]+:(?!//)))(?P<login>[^\s/:@]*:\S*|[^\s/]*)@")
_SECRET = re.compile(r"(?i)(password|passwd|pwd|secret|token)=[^&\s]+")
FIX = "start the server, correct tracking.uri or MLFLOW_TRACKING_URI, or turn it off: --tracking.enabled false"


def connect(tracking: TrackingConfig, home: Path) -> tuple[Any, str, str]:
    """A client, the address and the experiment's id; the experiment is made when it does not exist.

    Args:
        tracking: the config's section; its uri, else MLFLOW_TRACKING_URI, else sqlite under `home`.
        home: the state folder.

    Raises:
        ServerAway: MLflow does not answer within 30 seconds.
        InputError: it refuses, or its address holds credentials.
    """
    quiet_environment()
    uri = address(tracking, home)
    _check_reachable(uri)
    with mlflow_errors(InputError, without_secrets(uri), FIX, away=ServerAway):
        from mlflow import MlflowClient

        artifacts = None if is_http(uri) else local_mlflow(home)[1]
        with _alone_at_the_tables(uri):
            _settle(uri, home)
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            return client, uri, _find_or_create_experiment(client, tracking.experiment, artifacts)


def reader(tracking: TrackingConfig, home: Path) -> tuple[Any, str]:
    """A client that only reads, and the address; nothing is made there. (None, address) where no run was ever tracked.

    Args:
        tracking: see `connect`.
        home: see `connect`.

    Raises:
        InputError: see `connect`; ServerAway is one.
    """
    quiet_environment()
    uri = address(tracking, home)
    if uri == local_mlflow(home)[0] and not (home / "mlflow.db").exists():
        return None, uri
    _check_reachable(uri)
    with mlflow_errors(InputError, without_secrets(uri), FIX, away=ServerAway), _alone_at_the_tables(uri):
        from mlflow import MlflowClient

        _settle(uri, home)
        return MlflowClient(tracking_uri=uri, registry_uri=uri), uri


def address(tracking: TrackingConfig, home: Path) -> str:
    """Where MLflow is: the address given, else sqlite under `home`; see `given_address` for what it raises."""
    return given_address(tracking) or local_mlflow(home)[0]


def given_address(tracking: TrackingConfig) -> str:
    """The config's address, else MLFLOW_TRACKING_URI, else "".

    Raises:
        InputError: it holds credentials. A database takes them no other way, so its address may, in the environment.
    """
    uri, source = tracking.uri, "tracking.uri"
    if not uri:
        uri, source = os.environ.get("MLFLOW_TRACKING_URI", ""), "MLFLOW_TRACKING_URI"
    where = f"{source} = {without_secrets(uri)}"
    if is_http(uri) and without_secrets(uri) != uri:
        raise InputError(
            "the MLflow server's address holds credentials",
            where=where,
            fix="take them out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
    if tracking.uri and _holds_password(uri):
        raise InputError(
            "the MLflow database's address holds a password, and configs are shown and stored",
            where=where,
            fix="leave tracking.uri empty and give the whole address in MLFLOW_TRACKING_URI; a server's credentials "
            "belong into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
    return uri


@contextmanager
def mlflow_errors(kind: type[CdpoError], where: str, fix: str, away: type[CdpoError] | None = None) -> Iterator[None]:
    """Turn what MLflow's client raises into one of our errors, without secrets.

    Args:
        kind: the error to raise.
        where, fix: its address and what to do.
        away: the error to raise when MLflow does not answer, if that is another one.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException, Boto3Error, BotoCoreError, ClientError) as error:
        if isinstance(error, MlflowException) and error.get_http_status_code() == 401:
            answer = "refuses this login" if mlflow_authorization(os.environ) else "asks for a login"
            raise kind(f"the MLflow server {answer}", where=where, fix=LOGIN_FIX) from error
        reason = without_secrets((str(error).splitlines() or [type(error).__name__])[0])[:300]
        raise (away or kind if is_away(error) else kind)(f"MLflow: {reason}", where=where, fix=fix) from error


def is_away(error: BaseException | None) -> bool:
    """Whether the error says that MLflow, or the store of its files, does not answer or cannot answer now."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, RequestException):
        # Without an answer there is no status.
        status = 503 if error.response is None else error.response.status_code
    elif isinstance(error, ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 503))
    else:
        return isinstance(error, (Boto3Error, BotoCoreError))
    return status >= 500 or status in (408, 429)


def answers(uri: str) -> bool:
    """Whether MLflow is there, at a glance: a server says it is healthy within seconds; a database is simply tried."""
    if not is_http(uri):
        return True
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=GLANCE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, HTTPException, ValueError):
        return False
    return True


def while_contended(call: Callable[[], T]) -> T:
    """The call's value; it is repeated while another process writes the same rows at the same moment."""
    from mlflow.exceptions import MlflowException

    for attempt in range(CONTENDED_TRIES):
        try:
            return call()
        except MlflowException as error:
            if attempt == CONTENDED_TRIES - 1 or not any(sign in str(error) for sign in CONTENDED):
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("the last try returns or raises")


def is_http(uri: str) -> bool:
    """Whether the address is a server's."""
    return uri.startswith(("http://", "https://"))


def without_secrets(text: str) -> str:
    """The text without passwords in addresses (`//user:password@`, `password=...`)."""
    return _SECRET.sub(r"\1=***", _LOGIN.sub("***@", text))


def _holds_password(uri: str) -> bool:
    login = _LOGIN.search(uri)
    return bool(_SECRET.search(uri) or (login and ":" in login["login"]))


@contextmanager
def _alone_at_the_tables(uri: str) -> Iterator[None]:
    """Hold the sqlite file's lock: two clients that make a new database's tables at once both fail."""
    from sqlalchemy import make_url

    database = make_url(uri).database if uri.startswith("sqlite:") else None
    if not database or database == ":memory:":
        yield
        return
    try:
        lock = os.open(f"{database}.lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(f"no lock beside the MLflow database: {error.strerror}", where=uri, fix=FIX) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _settle(uri: str, home: Path) -> None:
    if uri == local_mlflow(home)[0]:
        settle(home)


def _find_or_create_experiment(client: Any, name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            # The kind makes the UI open the experiment as model training.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=artifacts, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment.lifecycle_stage != "active":
        fix = f"restore it (`mlflow experiments restore -x {experiment.experiment_id}`) or set tracking.experiment"
        raise InputError("the MLflow experiment was deleted", where=f"tracking.experiment = {name}", fix=fix)
    return str(experiment.experiment_id)


def _check_reachable(uri: str) -> None:
    """Fail within seconds where MLflow's client would try for minutes."""
    where = without_secrets(uri)
    if is_http(uri):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return  # It answers; what it refuses, the client's first call says better.
            what = f"the MLflow server cannot answer: HTTP status {error.code}"
            raise ServerAway(what, where=where, fix=FIX) from error
        except (OSError, HTTPException, ValueError) as error:
            what = f"the MLflow server cannot be reached: {without_secrets(str(error))}"
            raise ServerAway(what, where=where, fix=FIX) from error
    elif re.match(r"\w+(\+\w+)?://", uri) and not uri.startswith("file:"):
        _check_database(uri, where)
    else:
        what = "MLflow keeps runs in a database or on a server, not in a folder"
        raise InputError(what, where=where, fix="use sqlite:///PATH/mlflow.db, postgresql://… or http://…")


def _check_database(uri: str, where: str) -> None:
    import sqlalchemy

    is_sqlite = uri.startswith("sqlite:")
    try:
        address = sqlalchemy.make_url(uri)
    except (sqlalchemy.exc.SQLAlchemyError, ValueError):
        # Its words may repeat a part of a password.
        raise InputError("the MLflow database's address cannot be read", where=where, fix=FIX) from None
    try:
        if is_sqlite and address.database:
            Path(address.database).parent.mkdir(parents=True, exist_ok=True)
        arguments = {} if is_sqlite else {"connect_timeout": PROBE_SECONDS}
        engine = sqlalchemy.create_engine(address, connect_args=arguments)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1 FROM sqlite_master" if is_sqlite else "SELECT 1"))
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, OSError, ImportError) as error:
        reason = without_secrets(str(getattr(error, "orig", None) or error).splitlines()[0])
        away = ServerAway if isinstance(error, sqlalchemy.exc.OperationalError) and not is_sqlite else InputError
        raise away(f"the MLflow database cannot be opened: {reason}", where=where, fix=FIX) from error
