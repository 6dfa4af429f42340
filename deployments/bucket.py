"""Make the bucket of CDPO_STORE where it is missing.

python -m deployments.bucket
"""

from __future__ import annotations

import os
import sys

from cdpo_core.errors import CdpoError, InputError
from cdpo_core.plain_text import visible
from tasks.environment import DEFAULT_STORE
from tasks.storage import open_store


def make_bucket(uri: str) -> bool:
    """Make the bucket of an S3 store, and check that the store works.

    Args:
        uri: s3://bucket/prefix.

    Returns:
        Whether it had to be made.

    Raises:
        InputError: the address is none of S3's, or the server refuses or cannot be reached.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    store = open_store(uri)
    if not store.uri.startswith("s3://"):
        raise InputError("no address of S3", where=f"{DEFAULT_STORE} = {uri}", fix="give s3://bucket/prefix")
    bucket = store.uri.removeprefix("s3://").split("/")[0]
    client = boto3.session.Session().client("s3")
    try:
        there = [item["Name"] for item in client.list_buckets()["Buckets"]]
        if bucket not in there:
            client.create_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        fix = "start the S3 server, correct AWS_ENDPOINT_URL, or make the bucket by hand"
        raise InputError(f"the bucket cannot be made: {error}", where=f"s3://{bucket}", fix=fix) from error
    store.probe()
    return bucket not in there


def main() -> int:
    """Run from the shell; returns the exit code."""
    uri = os.environ.get(DEFAULT_STORE, "")
    try:
        made = make_bucket(uri)
    except CdpoError as error:
        print(visible(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    print(visible(f"{uri}: {'made' if made else 'there already'}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
